//! Faces of the allocation of choices under a budget.

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;
use turboquant_core as core;

use crate::convert::slice;
use crate::enter::enter;

/// One of choices for each item: the least sum of scores within budget.
#[pyfunction]
pub(crate) fn allocate(
    py: Python<'_>,
    costs: PyReadonlyArray1<'_, u64>,
    scores: PyReadonlyArray1<'_, f64>,
    choices: usize,
    budget: u64,
) -> PyResult<Vec<usize>> {
    let table = core::Choices { costs: slice(&costs)?, scores: slice(&scores)?, choices };
    enter(py, || core::allocate(table, budget))
}

/// Nested solutions, one for each of budgets, one behind the other.
#[pyfunction]
pub(crate) fn ladder(
    py: Python<'_>,
    costs: PyReadonlyArray1<'_, u64>,
    scores: PyReadonlyArray1<'_, f64>,
    choices: usize,
    budgets: PyReadonlyArray1<'_, u64>,
) -> PyResult<Vec<usize>> {
    let table = core::Choices { costs: slice(&costs)?, scores: slice(&scores)?, choices };
    let budgets = slice(&budgets)?;
    enter(py, || core::ladder(table, budgets))
}
