//! Face of `matmul`.

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;
use turboquant_core::{self as core, Activations};

use crate::convert::{self, Array, ArrayMut, RoundingArgs, SchemeArgs, slice};
use crate::enter::{enter, to_python};

/// out = x · Wᵀ (+ bias): x (m · k elements of type dtype), W packed (n rows of k), out (m · n of out_dtype).
#[pyfunction]
#[pyo3(signature = (
    x, dtype, m, packed, scales, zero_points, bias, n, k, scheme, rounding, planes, read_bits, activations, out,
    out_dtype, threads
))]
pub(crate) fn matmul(
    py: Python<'_>,
    x: Array<'_>,
    dtype: &str,
    m: usize,
    packed: PyReadonlyArray1<'_, u8>,
    scales: Array<'_>,
    zero_points: Array<'_>,
    bias: Option<PyReadonlyArray1<'_, f32>>,
    n: i64,
    k: i64,
    scheme: SchemeArgs,
    rounding: RoundingArgs,
    planes: Vec<i64>,
    read_bits: i64,
    activations: &str,
    mut out: ArrayMut<'_>,
    out_dtype: &str,
    threads: usize,
) -> PyResult<()> {
    let (scheme, rounding) = (&scheme.check()?, &rounding.check()?);
    let (planes, shape) = (&convert::planes_of(scheme, &planes)?, convert::shape(n, k)?);
    let (x, packed, out) = (x.source(dtype)?, slice(&packed)?, out.target(out_dtype)?);
    let (scales, zeros) = (scales.scales(scheme.scale_dtype())?, zero_points.zero_points(scheme)?);
    let (bias, read) = (bias.as_ref().map(slice).transpose()?, convert::unsigned("read_bits", read_bits)?);
    let how = Activations::from_name(activations).map_err(to_python)?;
    enter(py, || {
        core::matmul(
            x, m, packed, scales, zeros, bias, shape, scheme, rounding, planes, read, how, out, threads,
        )
    })
}
