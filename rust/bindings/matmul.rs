//! Faces of `matmul`, prepared for a weight, and of the layout it likes best.

use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use turboquant_core::{self as core, Activations, Layout, Planes, Rounding, Scheme, Shape};

use crate::convert::{self, Array, ArrayMut, RoundingArgs, SchemeArgs, slice, slice_mut};
use crate::enter::{enter, to_python};
use crate::memory::advise_large_pages;

/// x · Wᵀ (+ bias) for one weight of n rows and k columns: all that stays the same from call to call, checked.
/// The memory comes with each call.
#[pyclass(frozen, module = "turboquant_rs._core")]
pub(crate) struct Product {
    shape: Shape,
    scheme: Scheme,
    rounding: Rounding,
    planes: Planes,
    read_bits: u32,
    layout: Layout,
    activations: Activations,
}

#[pymethods]
impl Product {
    #[new]
    fn new(
        n: i64,
        k: i64,
        scheme: SchemeArgs,
        rounding: RoundingArgs,
        planes: Vec<i64>,
        read_bits: i64,
        layout: &str,
        activations: &str,
    ) -> PyResult<Self> {
        let scheme = scheme.check()?;
        Ok(Self {
            shape: convert::shape(n, k)?,
            scheme,
            rounding: rounding.check()?,
            planes: convert::planes_of(&scheme, &planes)?,
            read_bits: convert::unsigned("read_bits", read_bits)?,
            layout: Layout::from_name(layout).map_err(to_python)?,
            activations: Activations::from_name(activations).map_err(to_python)?,
        })
    }

    /// out = x · Wᵀ (+ bias): x (m · k elements of type dtype), W packed, out (m · n of out_dtype).
    #[pyo3(signature = (x, dtype, m, packed, scales, zero_points, bias, out, out_dtype, threads, /))]
    fn fill(
        &self,
        py: Python<'_>,
        x: Array<'_>,
        dtype: &str,
        m: usize,
        packed: PyReadonlyArray1<'_, u8>,
        scales: Array<'_>,
        zero_points: Array<'_>,
        bias: Option<PyReadonlyArray1<'_, f32>>,
        mut out: ArrayMut<'_>,
        out_dtype: &str,
        threads: usize,
    ) -> PyResult<()> {
        let Self { scheme, rounding, planes, .. } = self;
        let (x, packed, out) = (x.source(dtype)?, slice(&packed)?, out.target(out_dtype)?);
        let (scales, zeros) = (scales.scales(scheme.scale_dtype())?, zero_points.zero_points(scheme)?);
        let bias = bias.as_ref().map(slice).transpose()?;
        let (shape, read, layout, how) = (self.shape, self.read_bits, self.layout, self.activations);
        enter(py, || {
            core::matmul(
                x, m, packed, scales, zeros, bias, shape, scheme, rounding, planes, read, layout, how, out,
                threads,
            )
        })
    }

    /// The same, W read at refined_bits by the rows of x whose size is above threshold; `refined` (m elements)
    /// says which, the result how many. Activations are int8.
    #[pyo3(signature = (x, dtype, m, packed, scales, zero_points, bias, out, out_dtype, refined_bits, threshold, refined, threads, /))]
    fn fill_refined(
        &self,
        py: Python<'_>,
        x: Array<'_>,
        dtype: &str,
        m: usize,
        packed: PyReadonlyArray1<'_, u8>,
        scales: Array<'_>,
        zero_points: Array<'_>,
        bias: Option<PyReadonlyArray1<'_, f32>>,
        mut out: ArrayMut<'_>,
        out_dtype: &str,
        refined_bits: i64,
        threshold: f64,
        mut refined: PyReadwriteArray1<'_, bool>,
        threads: usize,
    ) -> PyResult<usize> {
        let Self { scheme, rounding, planes, .. } = self;
        let (x, packed, out) = (x.source(dtype)?, slice(&packed)?, out.target(out_dtype)?);
        let (scales, zeros) = (scales.scales(scheme.scale_dtype())?, zero_points.zero_points(scheme)?);
        let (bias, refined) = (bias.as_ref().map(slice).transpose()?, slice_mut(&mut refined)?);
        let refined_bits = convert::unsigned("refined_bits", refined_bits)?;
        let (shape, read, layout) = (self.shape, self.read_bits, self.layout);
        enter(py, || {
            core::matmul_refined(
                x,
                m,
                packed,
                scales,
                zeros,
                bias,
                shape,
                scheme,
                rounding,
                planes,
                read,
                refined_bits,
                threshold,
                layout,
                out,
                refined,
                threads,
            )
        })
    }
}

/// Rearranges a packed matrix into the compute layout.
#[pyfunction]
pub(crate) fn to_panels(
    py: Python<'_>,
    packed: PyReadonlyArray1<'_, u8>,
    scales: Array<'_>,
    zero_points: Array<'_>,
    rows: i64,
    k: i64,
    scheme: SchemeArgs,
    planes: Vec<i64>,
    mut panels: PyReadwriteArray1<'_, u8>,
    mut panel_scales: ArrayMut<'_>,
    mut panel_zero_points: ArrayMut<'_>,
    threads: usize,
) -> PyResult<()> {
    let (scheme, shape) = (&scheme.check()?, convert::shape(rows, k)?);
    let (planes, dtype) = (&convert::planes(&planes)?, scheme.scale_dtype());
    let (packed, panels) = (slice(&packed)?, slice_mut(&mut panels)?);
    advise_large_pages(panels);
    let (scales, zeros) = (scales.scales(dtype)?, zero_points.zero_points(scheme)?);
    let (to_scales, to_zeros) = (panel_scales.scales(dtype)?, panel_zero_points.zero_points(scheme)?);
    enter(py, || {
        core::to_panels(packed, scales, zeros, shape, scheme, planes, panels, to_scales, to_zeros, threads)
    })
}

/// The inverse of to_panels.
#[pyfunction]
pub(crate) fn from_panels(
    py: Python<'_>,
    panels: PyReadonlyArray1<'_, u8>,
    panel_scales: Array<'_>,
    panel_zero_points: Array<'_>,
    rows: i64,
    k: i64,
    scheme: SchemeArgs,
    planes: Vec<i64>,
    mut packed: PyReadwriteArray1<'_, u8>,
    mut scales: ArrayMut<'_>,
    mut zero_points: ArrayMut<'_>,
    threads: usize,
) -> PyResult<()> {
    let (scheme, shape) = (&scheme.check()?, convert::shape(rows, k)?);
    let (planes, dtype) = (&convert::planes(&planes)?, scheme.scale_dtype());
    let (panels, packed) = (slice(&panels)?, slice_mut(&mut packed)?);
    let (from_scales, from_zeros) = (panel_scales.scales(dtype)?, panel_zero_points.zero_points(scheme)?);
    let (scales, zeros) = (scales.scales(dtype)?, zero_points.zero_points(scheme)?);
    enter(py, || {
        core::from_panels(
            panels,
            from_scales,
            from_zeros,
            shape,
            scheme,
            planes,
            packed,
            scales,
            zeros,
            threads,
        )
    })
}
