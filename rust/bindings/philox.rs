//! Face of the random number generator, for known answers.

use pyo3::prelude::*;
use turboquant_core as core;

type Counter = (u32, u32, u32, u32);

/// Philox4x32-10: four words of counter and two of key to four random words.
#[pyfunction]
pub(crate) fn philox(counter: Counter, key: (u32, u32)) -> Counter {
    core::philox(counter.into(), key.into()).into()
}
