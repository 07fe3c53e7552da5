//! The memory that packing reads and fills: elements, scales and zero points of every type.

use half::{bf16, f16};

use crate::Shape;
use crate::error::Error;
use crate::parallel::{take, take_mut};
use crate::planes::padded;
use crate::scheme::{Rounding, ScaleDtype, Scheme};
use crate::simd::{Aligned, Isa, LANES, TILE, four};

/// Elements to be packed.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Double precision, rounded to f32 first.
    F64(&'a [f64]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
}

/// Memory for unpacked elements.
#[derive(Debug)]
pub enum Target<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Double precision, widened from f32.
    F64(&'a mut [f64]),
    /// bfloat16, rounded to nearest even.
    Bf16(&'a mut [bf16]),
    /// Half precision, rounded to nearest even.
    F16(&'a mut [f16]),
}

/// Stored scales, one a group, row by row; 16-bit types as their bits.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// Bits of bfloat16.
    Bf16(&'a [u16]),
    /// Bits of half precision.
    F16(&'a [u16]),
    /// Single precision.
    F32(&'a [f32]),
}

/// Memory for scales.
#[derive(Debug)]
pub enum ScalesMut<'a> {
    /// Bits of bfloat16.
    Bf16(&'a mut [u16]),
    /// Bits of half precision.
    F16(&'a mut [u16]),
    /// Single precision.
    F32(&'a mut [f32]),
}

/// Stored zero points, one a group, row by row.
#[derive(Debug, Clone, Copy)]
pub enum ZeroPoints<'a> {
    /// The scheme has a constant one.
    Constant,
    /// Asymmetric schemes.
    U8(&'a [u8]),
    /// `preserve="mean+var"`.
    F32(&'a [f32]),
}

/// Memory for zero points.
#[derive(Debug)]
pub enum ZeroPointsMut<'a> {
    /// The scheme has a constant one.
    Constant,
    /// Asymmetric schemes.
    U8(&'a mut [u8]),
    /// `preserve="mean+var"`.
    F32(&'a mut [f32]),
}

impl<'a> Scales<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Bf16(s) | Self::F16(s) => s.len(),
            Self::F32(s) => s.len(),
        }
    }

    pub(super) fn dtype(&self) -> ScaleDtype {
        match self {
            Self::Bf16(_) => ScaleDtype::Bf16,
            Self::F16(_) => ScaleDtype::F16,
            Self::F32(_) => ScaleDtype::F32,
        }
    }

    pub(crate) fn take(&mut self, len: usize) -> Self {
        match self {
            Self::Bf16(s) => Self::Bf16(take(s, len)),
            Self::F16(s) => Self::F16(take(s, len)),
            Self::F32(s) => Self::F32(take(s, len)),
        }
    }

    /// The scale of a group, widened.
    #[inline(always)]
    pub fn get(&self, group: usize) -> f32 {
        match self {
            Self::Bf16(s) => f32::from_bits(u32::from(s[group]) << 16),
            Self::F16(s) => f16::from_bits(s[group]).to_f32_const(),
            Self::F32(s) => s[group],
        }
    }
}

impl<'a> ScalesMut<'a> {
    /// What has been written.
    pub fn view(&self) -> Scales<'_> {
        match self {
            Self::Bf16(s) => Scales::Bf16(s),
            Self::F16(s) => Scales::F16(s),
            Self::F32(s) => Scales::F32(s),
        }
    }

    pub(crate) fn take(&mut self, len: usize) -> ScalesMut<'a> {
        match self {
            Self::Bf16(s) => ScalesMut::Bf16(take_mut(s, len)),
            Self::F16(s) => ScalesMut::F16(take_mut(s, len)),
            Self::F32(s) => ScalesMut::F32(take_mut(s, len)),
        }
    }

    /// Stores rounded scales from `at` on.
    #[inline(always)]
    pub(super) fn store(&mut self, at: usize, from: &[f32]) {
        match self {
            Self::Bf16(s) => {
                for (to, s) in s[at..].iter_mut().zip(from) {
                    *to = (s.to_bits() >> 16) as u16;
                }
            }
            Self::F16(s) => {
                for (to, s) in s[at..].iter_mut().zip(from) {
                    *to = f16::from_f32_const(*s).to_bits();
                }
            }
            Self::F32(s) => s[at..at + from.len()].copy_from_slice(from),
        }
    }
}

impl<'a> ZeroPoints<'a> {
    pub(super) fn kind(&self) -> (&'static str, usize) {
        match self {
            Self::Constant => (NO_ZERO_POINTS, 0),
            Self::U8(z) => (U8_ZERO_POINTS, z.len()),
            Self::F32(z) => (F32_ZERO_POINTS, z.len()),
        }
    }

    pub(crate) fn take(&mut self, len: usize) -> Self {
        match self {
            Self::Constant => Self::Constant,
            Self::U8(z) => Self::U8(take(z, len)),
            Self::F32(z) => Self::F32(take(z, len)),
        }
    }

    /// The zero point of a group, where `constant` is that of the scheme.
    #[inline(always)]
    pub fn get(&self, group: usize, constant: f32) -> f32 {
        match self {
            Self::Constant => constant,
            Self::U8(z) => f32::from(z[group]),
            Self::F32(z) => z[group],
        }
    }
}

impl<'a> ZeroPointsMut<'a> {
    /// What has been written.
    pub fn view(&self) -> ZeroPoints<'_> {
        match self {
            Self::Constant => ZeroPoints::Constant,
            Self::U8(z) => ZeroPoints::U8(z),
            Self::F32(z) => ZeroPoints::F32(z),
        }
    }

    pub(crate) fn take(&mut self, len: usize) -> ZeroPointsMut<'a> {
        match self {
            Self::Constant => ZeroPointsMut::Constant,
            Self::U8(z) => ZeroPointsMut::U8(take_mut(z, len)),
            Self::F32(z) => ZeroPointsMut::F32(take_mut(z, len)),
        }
    }

    #[inline(always)]
    pub(super) fn store(&mut self, at: usize, from: &[f32]) {
        match self {
            Self::Constant => {}
            Self::U8(z) => {
                for (to, z) in z[at..].iter_mut().zip(from) {
                    *to = *z as u8;
                }
            }
            Self::F32(z) => z[at..at + from.len()].copy_from_slice(from),
        }
    }
}

const NO_ZERO_POINTS: &str = "absent";
const U8_ZERO_POINTS: &str = "u8";
const F32_ZERO_POINTS: &str = "f32";

/// Refuses scales and zero points that do not belong to the scheme.
pub(crate) fn check_groups(
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    scales: Scales<'_>,
    zero_points: ZeroPoints<'_>,
) -> Result<(), Error> {
    let groups = shape.rows * scheme.groups(shape.k);
    let dtype_name = |dtype: ScaleDtype| match dtype {
        ScaleDtype::Bf16 => "bf16",
        ScaleDtype::F16 => "f16",
        ScaleDtype::F32 => "f32",
    };
    if scales.dtype() != scheme.scale_dtype() {
        let (got, need) = (dtype_name(scales.dtype()), dtype_name(scheme.scale_dtype()));
        return Err(Error::Kind { name: "scales", got, need });
    }
    shape.check("scales", scales.len(), groups)?;
    let (need, len) = match (rounding.preserve_variance(), scheme.zero_point()) {
        (true, _) => (F32_ZERO_POINTS, groups),
        (false, None) => (U8_ZERO_POINTS, groups),
        (false, Some(_)) => (NO_ZERO_POINTS, 0),
    };
    let (got, got_len) = zero_points.kind();
    if got != need {
        return Err(Error::Kind { name: "zero_points", got, need });
    }
    shape.check("zero_points", got_len, len)
}

/// A type of elements: how sixteen of them become lanes and back.
pub(crate) trait Element: Copy + Default + Send + Sync {
    fn load<I: Isa>(isa: I, from: &[Self; LANES]) -> I::F32;
    fn store<I: Isa, const STREAM: bool>(isa: I, to: &mut [Self; LANES], v: I::F32);
}

macro_rules! element {
    ($type:ty, $load:ident, $store:ident) => {
        impl Element for $type {
            #[inline(always)]
            fn load<I: Isa>(isa: I, from: &[Self; LANES]) -> I::F32 {
                isa.$load(from)
            }
            #[inline(always)]
            fn store<I: Isa, const STREAM: bool>(isa: I, to: &mut [Self; LANES], v: I::F32) {
                isa.$store::<STREAM>(to, v);
            }
        }
    };
}
element!(f32, load, store);
element!(f64, load_f64, store_f64);
element!(bf16, load_bf16, store_bf16);
element!(f16, load_f16, store_f16);

/// Calls the same code on the slice of any type.
macro_rules! each_type {
    ($type:ident, $value:expr, |$x:ident| $call:expr) => {
        match $value {
            $type::F32($x) => $type::F32($call),
            $type::F64($x) => $type::F64($call),
            $type::Bf16($x) => $type::Bf16($call),
            $type::F16($x) => $type::F16($call),
        }
    };
}

impl<'a> Source<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F64(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F16(x) => x.len(),
        }
    }

    /// `len` elements from `at` on.
    #[inline(always)]
    pub(crate) fn part(&self, at: usize, len: usize) -> Self {
        each_type!(Source, self, |x| &x[at..at + len])
    }

    /// Element `at` as f64 (exact).
    pub(crate) fn get(&self, at: usize) -> f64 {
        match self {
            Self::F32(x) => x[at].into(),
            Self::F64(x) => x[at],
            Self::Bf16(x) => x[at].into(),
            Self::F16(x) => x[at].into(),
        }
    }

    /// 64 elements from `at` on as f32, zeros behind the end.
    #[inline(always)]
    pub(crate) fn tile<I: Isa>(&self, isa: I, at: usize) -> [I::F32; 4] {
        match self {
            Self::F32(x) => load_tile(isa, &x[at..]),
            Self::F64(x) => load_tile(isa, &x[at..]),
            Self::Bf16(x) => load_tile(isa, &x[at..]),
            Self::F16(x) => load_tile(isa, &x[at..]),
        }
    }
}

/// One vector of elements, zeros behind the end of `x`.
#[inline(always)]
pub(super) fn load_vector<I: Isa, E: Element>(isa: I, x: &[E]) -> I::F32 {
    match x.first_chunk::<LANES>() {
        Some(vector) => E::load(isa, vector),
        None => E::load(isa, &padded(x)),
    }
}

/// Four vectors of consecutive elements, zeros behind the end of `x`.
#[inline(always)]
pub(crate) fn load_tile<I: Isa, E: Element>(isa: I, x: &[E]) -> [I::F32; 4] {
    let short;
    let tile = match x.first_chunk::<TILE>() {
        Some(tile) => tile,
        None => {
            short = Aligned(padded(x));
            &short.0
        }
    };
    let (vectors, _) = tile.as_chunks::<LANES>();
    four!(j => E::load(isa, &vectors[j]))
}

impl<'a> Target<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F64(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F16(x) => x.len(),
        }
    }

    pub(super) fn nbytes(&self) -> usize {
        match self {
            Self::F32(x) => size_of_val(*x),
            Self::F64(x) => size_of_val(*x),
            Self::Bf16(x) => size_of_val(*x),
            Self::F16(x) => size_of_val(*x),
        }
    }

    pub(crate) fn take(&mut self, len: usize) -> Target<'a> {
        each_type!(Target, self, |x| take_mut(x, len))
    }

    /// Writes the first `len` elements of a tile and moves behind them.
    #[inline(always)]
    pub(crate) fn push<I: Isa>(&mut self, isa: I, stream: bool, len: usize, v: [I::F32; 4]) {
        match self {
            Self::F32(x) => store_tile(isa, x, stream, len, v),
            Self::F64(x) => store_tile(isa, x, stream, len, v),
            Self::Bf16(x) => store_tile(isa, x, stream, len, v),
            Self::F16(x) => store_tile(isa, x, stream, len, v),
        }
    }
}

/// Writes the first `len` elements of a tile and moves `out` behind them.
///
/// Where there is room the whole tile is stored: what is written too much is overwritten by the next one.
#[inline(always)]
pub(super) fn store_tile<I: Isa, E: Element>(
    isa: I,
    out: &mut &mut [E],
    stream: bool,
    len: usize,
    v: [I::F32; 4],
) {
    if len == TILE && stream {
        store_vectors::<I, E, true>(isa, take_mut(out, TILE), v);
    } else if out.len() >= TILE {
        store_vectors::<I, E, false>(isa, &mut out[..TILE], v);
        take_mut(out, len);
    } else {
        let mut tile = [E::default(); TILE];
        store_vectors::<I, E, false>(isa, &mut tile, v);
        take_mut(out, len).copy_from_slice(&tile[..len]);
    }
}

#[inline(always)]
pub(super) fn store_vectors<I: Isa, E: Element, const STREAM: bool>(isa: I, to: &mut [E], v: [I::F32; 4]) {
    let (vectors, _) = to.as_chunks_mut::<LANES>();
    for j in 0..4 {
        E::store::<I, STREAM>(isa, &mut vectors[j], v[j]);
    }
}
