//! NumPy arrays to the core's slices, names to its types. Lengths and ranges are the core's to check.

use half::{bf16, f16};
use numpy::ndarray::Dimension;
use numpy::{
    PyArrayDescrMethods, PyReadonlyArray, PyReadonlyArrayDyn, PyReadwriteArray, PyReadwriteArrayDyn,
    PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use turboquant_core::{
    Mode, Planes, Rounding, ScaleDtype, ScaleRule, Scales, ScalesMut, Scheme, Shape, Source, Target,
    ZeroPoints, ZeroPointsMut,
};

use crate::enter::to_python;

/// A borrowed array, its rows one behind the other; bf16 and f16 come as u16, told apart by the name beside them.
pub(crate) enum Array<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F64(PyReadonlyArrayDyn<'py, f64>),
    U16(PyReadonlyArrayDyn<'py, u16>),
    U8(PyReadonlyArrayDyn<'py, u8>),
}

/// An array borrowed to be written to.
pub(crate) enum ArrayMut<'py> {
    F32(PyReadwriteArrayDyn<'py, f32>),
    F64(PyReadwriteArrayDyn<'py, f64>),
    U16(PyReadwriteArrayDyn<'py, u16>),
    U8(PyReadwriteArrayDyn<'py, u8>),
}

/// Kind and size in bytes of an array's elements.
fn element_type(array: Borrowed<'_, '_, PyAny>) -> PyResult<(u8, usize)> {
    let dtype = array.cast::<PyUntypedArray>()?.dtype();
    Ok((dtype.kind(), dtype.itemsize()))
}

fn unknown_type(array: Borrowed<'_, '_, PyAny>) -> PyErr {
    let name = array.getattr("dtype").map_or_else(|_| "unknown".to_owned(), |dtype| dtype.to_string());
    PyTypeError::new_err(format!(
        "arrays hold float32, float64, uint16 or uint8, got {name}; convert it first"
    ))
}

impl<'a, 'py> FromPyObject<'a, 'py> for Array<'py> {
    type Error = PyErr;

    fn extract(array: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match element_type(array)? {
            (b'f', 4) => array.extract().map(Self::F32),
            (b'f', 8) => array.extract().map(Self::F64),
            (b'u', 2) => array.extract().map(Self::U16),
            (b'u', 1) => array.extract().map(Self::U8),
            _ => Err(unknown_type(array)),
        }
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for ArrayMut<'py> {
    type Error = PyErr;

    fn extract(array: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        match element_type(array)? {
            (b'f', 4) => array.extract().map(Self::F32),
            (b'f', 8) => array.extract().map(Self::F64),
            (b'u', 2) => array.extract().map(Self::U16),
            (b'u', 1) => array.extract().map(Self::U8),
            _ => Err(unknown_type(array)),
        }
    }
}

/// The elements of a borrowed array, which must lie one behind the other.
pub(crate) fn slice<'a, T: numpy::Element, D: Dimension>(
    array: &'a PyReadonlyArray<'_, T, D>,
) -> PyResult<&'a [T]> {
    if !array.is_c_contiguous() {
        return Err(not_contiguous(array.len()));
    }
    array.as_slice().map_err(|_| not_contiguous(array.len()))
}

/// [`slice`] of an array to be written to.
pub(crate) fn slice_mut<'a, T: numpy::Element, D: Dimension>(
    array: &'a mut PyReadwriteArray<'_, T, D>,
) -> PyResult<&'a mut [T]> {
    let (len, rows_in_order) = (array.len(), array.is_c_contiguous());
    match array.as_slice_mut() {
        Ok(slice) if rows_in_order => Ok(slice),
        _ => Err(not_contiguous(len)),
    }
}

fn not_contiguous(len: usize) -> PyErr {
    PyValueError::new_err(format!("an array of {len} elements is not contiguous and aligned; copy it first"))
}

fn mismatch(argument: &str, dtype: &str, array: &str) -> PyErr {
    PyTypeError::new_err(format!(
        "{argument} is an array of {array} where dtype {dtype:?} was named; \
         f32 and f64 come as themselves, bf16 and f16 as uint16"
    ))
}

impl Array<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::F32(_) => "float32",
            Self::F64(_) => "float64",
            Self::U16(_) => "uint16",
            Self::U8(_) => "uint8",
        }
    }

    /// Elements of a tensor of type `dtype`.
    pub(crate) fn source(&self, dtype: &str) -> PyResult<Source<'_>> {
        Ok(match (self, dtype) {
            (Self::F32(x), "f32") => Source::F32(slice(x)?),
            (Self::F64(x), "f64") => Source::F64(slice(x)?),
            (Self::U16(x), "bf16") => Source::Bf16(bytemuck::cast_slice::<u16, bf16>(slice(x)?)),
            (Self::U16(x), "f16") => Source::F16(bytemuck::cast_slice::<u16, f16>(slice(x)?)),
            _ => return Err(mismatch("x", dtype, self.name())),
        })
    }

    /// Scales of type `dtype`.
    pub(crate) fn scales(&self, dtype: ScaleDtype) -> PyResult<Scales<'_>> {
        Ok(match (self, dtype) {
            (Self::U16(s), ScaleDtype::Bf16) => Scales::Bf16(slice(s)?),
            (Self::U16(s), ScaleDtype::F16) => Scales::F16(slice(s)?),
            (Self::F32(s), ScaleDtype::F32) => Scales::F32(slice(s)?),
            _ => return Err(mismatch("scales", &dtype.to_string(), self.name())),
        })
    }

    /// Zero points; an empty array of u8 stands for none where `scheme` has a constant one.
    pub(crate) fn zero_points(&self, scheme: &Scheme) -> PyResult<ZeroPoints<'_>> {
        Ok(match self {
            Self::U8(z) if z.is_empty() && scheme.zero_point().is_some() => ZeroPoints::Constant,
            Self::U8(z) => ZeroPoints::U8(slice(z)?),
            Self::F32(z) => ZeroPoints::F32(slice(z)?),
            _ => return Err(wrong_zero_points(self.name())),
        })
    }
}

impl ArrayMut<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::F32(_) => "float32",
            Self::F64(_) => "float64",
            Self::U16(_) => "uint16",
            Self::U8(_) => "uint8",
        }
    }

    /// Memory for a tensor of type `dtype`.
    pub(crate) fn target(&mut self, dtype: &str) -> PyResult<Target<'_>> {
        let name = self.name();
        Ok(match (self, dtype) {
            (Self::F32(x), "f32") => Target::F32(slice_mut(x)?),
            (Self::F64(x), "f64") => Target::F64(slice_mut(x)?),
            (Self::U16(x), "bf16") => Target::Bf16(bytemuck::cast_slice_mut::<u16, bf16>(slice_mut(x)?)),
            (Self::U16(x), "f16") => Target::F16(bytemuck::cast_slice_mut::<u16, f16>(slice_mut(x)?)),
            _ => return Err(mismatch("out", dtype, name)),
        })
    }

    /// Memory for scales of type `dtype`.
    pub(crate) fn scales(&mut self, dtype: ScaleDtype) -> PyResult<ScalesMut<'_>> {
        let name = self.name();
        Ok(match (self, dtype) {
            (Self::U16(s), ScaleDtype::Bf16) => ScalesMut::Bf16(slice_mut(s)?),
            (Self::U16(s), ScaleDtype::F16) => ScalesMut::F16(slice_mut(s)?),
            (Self::F32(s), ScaleDtype::F32) => ScalesMut::F32(slice_mut(s)?),
            _ => return Err(mismatch("scales", &dtype.to_string(), name)),
        })
    }

    /// Memory for zero points; an empty array of u8 stands for none where `scheme` has a constant one.
    pub(crate) fn zero_points(&mut self, scheme: &Scheme) -> PyResult<ZeroPointsMut<'_>> {
        let name = self.name();
        Ok(match self {
            Self::U8(z) if z.is_empty() && scheme.zero_point().is_some() => ZeroPointsMut::Constant,
            Self::U8(z) => ZeroPointsMut::U8(slice_mut(z)?),
            Self::F32(z) => ZeroPointsMut::F32(slice_mut(z)?),
            _ => return Err(wrong_zero_points(name)),
        })
    }
}

fn wrong_zero_points(got: &str) -> PyErr {
    PyTypeError::new_err(format!("zero_points are uint8, or float32 for preserve=\"mean+var\", got {got}"))
}

/// An argument that must fit an unsigned type of the core.
pub(crate) fn unsigned<T: TryFrom<i64>>(name: &str, value: i64) -> PyResult<T> {
    let bits = 8 * size_of::<T>();
    T::try_from(value).map_err(|_| {
        PyValueError::new_err(format!("{name} must be an unsigned number of {bits} bits, got {value}"))
    })
}

/// `rows` rows of `k` elements.
pub(crate) fn shape(rows: i64, k: i64) -> PyResult<Shape> {
    let (rows, k): (usize, usize) = (unsigned("rows", rows)?, unsigned("k", k)?);
    if rows.checked_mul(k).is_none_or(|len| len > isize::MAX as usize / 8) {
        return Err(PyValueError::new_err(format!(
            "rows={rows} times k={k} elements do not fit into memory"
        )));
    }
    Ok(Shape { rows, k })
}

/// SCHEME: bits, group_size (0 is the whole row), symmetric, nested, table, scale, scale_dtype.
#[derive(FromPyObject)]
pub(crate) struct SchemeArgs(i64, i64, bool, bool, Vec<i64>, String, String);

impl SchemeArgs {
    /// The core's scheme of these numbers.
    pub(crate) fn check(&self) -> PyResult<Scheme> {
        let Self(bits, group_size, symmetric, nested, table, scale, scale_dtype) = self;
        let table = table.iter().map(|level| unsigned("a level", *level)).collect::<PyResult<Vec<u8>>>()?;
        let scale = match scale.as_str() {
            "extreme" => ScaleRule::Extreme,
            "mse" => ScaleRule::Mse,
            "rms" => ScaleRule::Rms,
            _ => return Err(unknown("scale", scale, &["extreme", "mse", "rms"])),
        };
        let scale_dtype = match scale_dtype.as_str() {
            "bf16" => ScaleDtype::Bf16,
            "f16" => ScaleDtype::F16,
            "f32" => ScaleDtype::F32,
            _ => return Err(unknown("scale_dtype", scale_dtype, &["bf16", "f16", "f32"])),
        };
        let (bits, group_size) = (unsigned("bits", *bits)?, unsigned("group_size", *group_size)?);
        Scheme::new(bits, group_size, *symmetric, *nested, &table, scale, scale_dtype).map_err(to_python)
    }
}

fn unknown(name: &str, got: &str, valid: &[&str]) -> PyErr {
    PyValueError::new_err(format!("unknown {name} {got:?}; use one of {valid:?}"))
}

/// ROUNDING: mode, seed (a u64 in two's complement), step, stream, draw_bits, variance, preserve_variance, offset.
#[derive(FromPyObject)]
pub(crate) struct RoundingArgs(String, i64, i64, i64, i64, f32, bool, i64);

impl RoundingArgs {
    /// The core's rounding of these numbers.
    pub(crate) fn check(&self) -> PyResult<Rounding> {
        let Self(mode, seed, step, stream, draw_bits, variance, preserve_variance, offset) = self;
        Rounding::new(
            Mode::from_name(mode).map_err(to_python)?,
            seed.cast_unsigned(),
            unsigned("step", *step)?,
            unsigned("stream", *stream)?,
            unsigned("draw_bits", *draw_bits)?,
            *variance,
            *preserve_variance,
            unsigned("offset", *offset)?,
        )
        .map_err(to_python)
    }
}

fn widths(planes: &[i64]) -> PyResult<Vec<u32>> {
    planes.iter().map(|width| unsigned("a plane's width", *width)).collect()
}

/// Planes that store codes on their own.
pub(crate) fn planes(planes: &[i64]) -> PyResult<Planes> {
    Planes::new(&widths(planes)?).map_err(to_python)
}

/// Planes of codes of `scheme`.
pub(crate) fn planes_of(scheme: &Scheme, planes: &[i64]) -> PyResult<Planes> {
    Planes::for_scheme(&widths(planes)?, scheme).map_err(to_python)
}
