//! Faces of `pack`, `encode` and `unpack`.

use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use turboquant_core as core;

use crate::convert::{self, Array, ArrayMut, RoundingArgs, SchemeArgs, slice, slice_mut};
use crate::enter::enter;

/// Quantizes x (rows · k elements of type dtype) and packs its codes into packed, scales and zero_points.
#[pyfunction]
pub(crate) fn pack(
    py: Python<'_>,
    x: Array<'_>,
    dtype: &str,
    rows: i64,
    k: i64,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Vec<i64>,
    nan_zero: bool,
    mut packed: PyReadwriteArray1<'_, u8>,
    mut scales: ArrayMut<'_>,
    mut zero_points: ArrayMut<'_>,
    threads: usize,
) -> PyResult<()> {
    let (scheme, rounding) = (&scheme.check()?, &rounding.check()?);
    let (planes, shape) = (&convert::planes_of(scheme, &planes)?, convert::shape(rows, k)?);
    let (x, packed) = (x.source(dtype)?, slice_mut(&mut packed)?);
    let (scales, zeros) = (scales.scales(scheme.scale_dtype())?, zero_points.zero_points(scheme)?);
    enter(py, || core::pack(x, shape, scheme, rounding, planes, nan_zero, packed, scales, zeros, threads))
}

/// Packs the codes of x on given scales and zero points, to nearest.
#[pyfunction]
pub(crate) fn encode(
    py: Python<'_>,
    x: Array<'_>,
    dtype: &str,
    scales: Array<'_>,
    zero_points: Array<'_>,
    rows: i64,
    k: i64,
    scheme: SchemeArgs,
    planes: Vec<i64>,
    mut packed: PyReadwriteArray1<'_, u8>,
    threads: usize,
) -> PyResult<()> {
    let scheme = &scheme.check()?;
    let (planes, shape) = (&convert::planes_of(scheme, &planes)?, convert::shape(rows, k)?);
    let (x, packed) = (x.source(dtype)?, slice_mut(&mut packed)?);
    let (scales, zeros) = (scales.scales(scheme.scale_dtype())?, zero_points.zero_points(scheme)?);
    enter(py, || core::encode(x, shape, scheme, planes, packed, scales, zeros, threads))
}

/// Unpacks and dequantizes the top read_bits bits into out (rows · k elements of type dtype).
#[pyfunction]
pub(crate) fn unpack(
    py: Python<'_>,
    packed: PyReadonlyArray1<'_, u8>,
    scales: Array<'_>,
    zero_points: Array<'_>,
    rows: i64,
    k: i64,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Vec<i64>,
    read_bits: i64,
    mut out: ArrayMut<'_>,
    dtype: &str,
    threads: usize,
) -> PyResult<()> {
    let (scheme, rounding) = (&scheme.check()?, &rounding.check()?);
    let (planes, shape) = (&convert::planes_of(scheme, &planes)?, convert::shape(rows, k)?);
    let (packed, out, read) =
        (slice(&packed)?, out.target(dtype)?, convert::unsigned("read_bits", read_bits)?);
    let (scales, zeros) = (scales.scales(scheme.scale_dtype())?, zero_points.zero_points(scheme)?);
    enter(py, || core::unpack(packed, scales, zeros, shape, scheme, rounding, planes, read, out, threads))
}
