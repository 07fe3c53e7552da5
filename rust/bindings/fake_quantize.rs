//! Faces of `fake_quantize`, its backward pass and `inject_noise`.

use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use turboquant_core::{self as core, Numbers};

use crate::convert::{self, Array, ArrayMut, RoundingArgs, SchemeArgs, slice, slice_mut};
use crate::enter::enter;

/// Quantizes and dequantizes x (rows · k elements of type dtype), on `given` scales or on those it chooses.
#[pyfunction]
pub(crate) fn fake_quantize(
    py: Python<'_>,
    x: Array<'_>,
    dtype: &str,
    rows: i64,
    k: i64,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    given: bool,
    read_bits: i64,
    mut scales: ArrayMut<'_>,
    mut zero_points: ArrayMut<'_>,
    mut out: ArrayMut<'_>,
    threads: usize,
) -> PyResult<()> {
    let (scheme, rounding) = (&scheme.check()?, &rounding.check()?);
    let (shape, read) = (convert::shape(rows, k)?, convert::unsigned("read_bits", read_bits)?);
    let (x, out) = (x.source(dtype)?, out.target(dtype)?);
    let (scales, zeros) = (scales.scales(scheme.scale_dtype())?, zero_points.zero_points(scheme)?);
    enter(py, || {
        let numbers = if given {
            Numbers::given(shape, scheme, scales.view(), zeros.view())?
        } else {
            Numbers::Chosen(scales, zeros)
        };
        core::fake_quantize(x, shape, scheme, rounding, numbers, read, out, threads)
    })
}

/// The gradients of `fake_quantize` in x and in the scales it used.
#[pyfunction]
pub(crate) fn fake_quantize_backward(
    py: Python<'_>,
    grad: Array<'_>,
    x: Array<'_>,
    dtype: &str,
    scales: Array<'_>,
    zero_points: Array<'_>,
    rows: i64,
    k: i64,
    scheme: SchemeArgs,
    read_bits: i64,
    mut grad_x: ArrayMut<'_>,
    mut grad_scales: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let scheme = &scheme.check()?;
    let (shape, read) = (convert::shape(rows, k)?, convert::unsigned("read_bits", read_bits)?);
    let (grad, x, grad_x) = (grad.source(dtype)?, x.source(dtype)?, grad_x.target(dtype)?);
    let (s, z) = (scales.scales(scheme.scale_dtype())?, zero_points.zero_points(scheme)?);
    let grad_s = slice_mut(&mut grad_scales)?;
    enter(py, || core::fake_quantize_backward(grad, x, s, z, shape, scheme, read, grad_x, grad_s, threads))
}

/// Adds uniform noise of ±width / 2 to x, one width a group.
#[pyfunction]
pub(crate) fn inject_noise(
    py: Python<'_>,
    x: Array<'_>,
    dtype: &str,
    widths: PyReadonlyArray1<'_, f32>,
    rows: i64,
    k: i64,
    group_size: i64,
    preserve_variance: bool,
    rounding: RoundingArgs,
    mut out: ArrayMut<'_>,
    threads: usize,
) -> PyResult<()> {
    let (rounding, shape) = (&rounding.check()?, convert::shape(rows, k)?);
    let size = convert::unsigned::<u32>("group_size", group_size)? as usize;
    let (x, widths, out) = (x.source(dtype)?, slice(&widths)?, out.target(dtype)?);
    enter(py, || core::inject_noise(x, widths, shape, size, preserve_variance, rounding, out, threads))
}
