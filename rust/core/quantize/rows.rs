//! Single rows of a packed matrix, dequantized to f32 exactly as [`super::unpack`] does.

use std::ops::Range;

use crate::Shape;
use crate::parallel::Span;
use crate::planes::PlaneReader;
use crate::scheme::{Planes, Rounding, Scheme};
use crate::simd::Isa;

use super::{Reading, Scales, Target, UnpackSpan, ZeroPoints};

/// A packed matrix whose rows are wanted a few at a time.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) packed: &'a [u8],
    pub(crate) scales: Scales<'a>,
    pub(crate) zero_points: ZeroPoints<'a>,
    pub(crate) shape: Shape,
    pub(crate) scheme: Scheme,
    pub(crate) rounding: Rounding,
    /// The planes read.
    pub(crate) prefix: Planes,
    pub(crate) read_bits: u32,
}

impl Rows<'_> {
    /// Dequantizes `rows` into `out`: as many times `k` elements.
    #[inline(always)]
    pub(crate) fn unpack<I: Isa>(&self, isa: I, rows: Range<usize>, out: &mut [f32]) {
        let Shape { k, .. } = self.shape;
        let groups = self.scheme.groups(k);
        let span = |rows: Range<usize>| Span {
            row: rows.start,
            rows: rows.len(),
            group: 0,
            groups,
            begin: 0,
            end: k,
        };
        let spans = [span(0..rows.start), span(rows.clone())];
        let planes = PlaneReader::cut(self.packed, self.prefix, self.shape, &spans)[1];
        let (mut scales, mut zero_points) = (self.scales, self.zero_points);
        scales.take(rows.start * groups);
        zero_points.take(rows.start * groups);
        let job = Reading {
            shape: self.shape,
            scheme: self.scheme,
            rounding: self.rounding,
            dropped: self.scheme.bits() - self.read_bits,
            stream: false,
        };
        let [_, span] = spans;
        let out = Target::F32(out);
        isa.vectorize(UnpackSpan { job: &job, span, planes, scales, zero_points, out });
    }
}

impl Scales<'_> {
    /// Widens the scales from `first` on.
    #[inline(always)]
    pub(crate) fn widen(&self, first: usize, to: &mut [f32]) {
        match self {
            Self::Bf16(s) => {
                for (to, s) in to.iter_mut().zip(&s[first..]) {
                    *to = f32::from_bits(u32::from(*s) << 16);
                }
            }
            _ => {
                for (i, to) in to.iter_mut().enumerate() {
                    *to = self.get(first + i);
                }
            }
        }
    }
}
