//! Faces of the probes of the machine.

use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use turboquant_core as core;

use crate::convert::{slice, slice_mut};
use crate::enter::enter;

/// Reads buffer once; returns a checksum. Timing is the caller's.
#[pyfunction]
pub(crate) fn read_bandwidth(
    py: Python<'_>,
    buffer: PyReadonlyArray1<'_, u8>,
    threads: usize,
) -> PyResult<u64> {
    let buffer = slice(&buffer)?;
    enter(py, || Ok(core::read_bandwidth(buffer, threads)))
}

/// Copies source to target once. Timing is the caller's.
#[pyfunction]
pub(crate) fn copy_bandwidth(
    py: Python<'_>,
    source: PyReadonlyArray1<'_, u8>,
    mut target: PyReadwriteArray1<'_, u8>,
    threads: usize,
) -> PyResult<()> {
    let (source, target) = (slice(&source)?, slice_mut(&mut target)?);
    enter(py, || {
        core::copy_bandwidth(source, target, threads);
        Ok(())
    })
}

/// Multiplies in registers; returns the multiply-adds done. Timing is the caller's.
#[pyfunction]
pub(crate) fn multiply_peak(
    py: Python<'_>,
    activations: &str,
    rounds: usize,
    threads: usize,
) -> PyResult<u64> {
    enter(py, || Ok(core::multiply_peak(core::Activations::from_name(activations)?, rounds, threads)))
}
