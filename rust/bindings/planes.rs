//! Faces of `pack_codes` and `unpack_codes`.

use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use turboquant_core as core;

use crate::convert::{self, slice, slice_mut};
use crate::enter::enter;

/// Stacks codes (rows · k bytes) into bit planes.
#[pyfunction]
pub(crate) fn pack_codes(
    py: Python<'_>,
    codes: PyReadonlyArray1<'_, u8>,
    rows: i64,
    k: i64,
    planes: Vec<i64>,
    mut packed: PyReadwriteArray1<'_, u8>,
    threads: usize,
) -> PyResult<()> {
    let (planes, shape) = (convert::planes(&planes)?, convert::shape(rows, k)?);
    let (codes, packed) = (slice(&codes)?, slice_mut(&mut packed)?);
    enter(py, || core::pack_codes(codes, shape, &planes, packed, threads))
}

/// Reads the top read_bits bits of every code into codes (rows · k bytes).
#[pyfunction]
pub(crate) fn unpack_codes(
    py: Python<'_>,
    packed: PyReadonlyArray1<'_, u8>,
    rows: i64,
    k: i64,
    planes: Vec<i64>,
    read_bits: i64,
    mut codes: PyReadwriteArray1<'_, u8>,
    threads: usize,
) -> PyResult<()> {
    let (planes, shape) = (convert::planes(&planes)?, convert::shape(rows, k)?);
    let (packed, codes) = (slice(&packed)?, slice_mut(&mut codes)?);
    let read_bits = convert::unsigned("read_bits", read_bits)?;
    enter(py, || core::unpack_codes(packed, shape, &planes, read_bits, codes, threads))
}
