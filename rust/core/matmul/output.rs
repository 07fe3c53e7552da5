//! The result, cut into bands of rows and columns that threads can own.

use std::ops::Range;

use half::{bf16, f16};

use crate::quantize::{Element, Target};
use crate::simd::{Isa, LANES, VECTORS};

/// Some columns of some rows of the result: a slice a row.
pub(super) enum Columns<'a> {
    F32(Vec<&'a mut [f32]>),
    F64(Vec<&'a mut [f64]>),
    Bf16(Vec<&'a mut [bf16]>),
    F16(Vec<&'a mut [f16]>),
}

/// Bytes of a result from which it bypasses the caches: beside x and the weight they have no room for it, and a
/// line that is written as a whole need not be read before.
const BYPASS: usize = 1 << 20;

/// The part of the result that one task computes.
pub(super) struct Part<'a> {
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
    pub(super) out: Columns<'a>,
    /// Whether the result bypasses the caches.
    pub(super) bypass: bool,
}

/// Cuts rows of `n` columns into bands of `row_step` rows and `column_step` columns.
pub(super) fn cut(out: Columns<'_>, n: usize, row_step: usize, column_step: usize) -> Vec<Part<'_>> {
    match out {
        Columns::F32(rows) => cut_rows(rows, n, row_step, column_step, Columns::F32),
        Columns::F64(rows) => cut_rows(rows, n, row_step, column_step, Columns::F64),
        Columns::Bf16(rows) => cut_rows(rows, n, row_step, column_step, Columns::Bf16),
        Columns::F16(rows) => cut_rows(rows, n, row_step, column_step, Columns::F16),
    }
}

fn cut_rows<'a, E>(
    rows: Vec<&'a mut [E]>,
    n: usize,
    row_step: usize,
    column_step: usize,
    wrap: impl Fn(Vec<&'a mut [E]>) -> Columns<'a>,
) -> Vec<Part<'a>> {
    let mut parts = Vec::new();
    let (count, mut rows) = (rows.len(), rows.into_iter());
    let bypass = count * n * size_of::<E>() >= BYPASS;
    for first in (0..count).step_by(row_step) {
        let height = row_step.min(count - first);
        let mut bands: Vec<Vec<&'a mut [E]>> = (0..n.div_ceil(column_step)).map(|_| Vec::new()).collect();
        for row in rows.by_ref().take(height) {
            for (band, piece) in bands.iter_mut().zip(row.chunks_mut(column_step)) {
                band.push(piece);
            }
        }
        parts.extend(bands.into_iter().enumerate().map(|(i, pieces)| Part {
            rows: first..first + height,
            columns: i * column_step..n.min((i + 1) * column_step),
            out: wrap(pieces),
            bypass,
        }));
    }
    parts
}

/// The rows that are not `chosen`, and those that are.
fn split<'a, E>(rows: Vec<&'a mut [E]>, chosen: &[bool]) -> [Vec<&'a mut [E]>; 2] {
    let mut parts = [Vec::new(), Vec::new()];
    for (row, &chosen) in rows.into_iter().zip(chosen) {
        parts[usize::from(chosen)].push(row);
    }
    parts
}

impl<'a> Columns<'a> {
    /// All of a result of rows of `n` columns, at least one.
    pub(super) fn of(out: Target<'a>, n: usize) -> Self {
        match out {
            Target::F32(out) => Self::F32(out.chunks_mut(n).collect()),
            Target::F64(out) => Self::F64(out.chunks_mut(n).collect()),
            Target::Bf16(out) => Self::Bf16(out.chunks_mut(n).collect()),
            Target::F16(out) => Self::F16(out.chunks_mut(n).collect()),
        }
    }

    /// The rows that are not `chosen`, and those that are.
    pub(super) fn split(self, chosen: &[bool]) -> [Self; 2] {
        match self {
            Self::F32(rows) => split(rows, chosen).map(Self::F32),
            Self::F64(rows) => split(rows, chosen).map(Self::F64),
            Self::Bf16(rows) => split(rows, chosen).map(Self::Bf16),
            Self::F16(rows) => split(rows, chosen).map(Self::F16),
        }
    }
}

impl Columns<'_> {
    /// Writes the first `count` of `lanes` to columns `column …` of `row`, rounded to the type of the result;
    /// `STREAM` as in [`Isa::store`].
    #[inline(always)]
    pub(super) fn write<I: Isa, const STREAM: bool>(
        &mut self,
        isa: I,
        row: usize,
        column: usize,
        count: usize,
        lanes: &[I::F32; VECTORS],
    ) {
        match self {
            Self::F32(rows) => write::<I, _, STREAM>(isa, &mut rows[row][column..][..count], lanes),
            Self::F64(rows) => write::<I, _, STREAM>(isa, &mut rows[row][column..][..count], lanes),
            Self::Bf16(rows) => write::<I, _, STREAM>(isa, &mut rows[row][column..][..count], lanes),
            Self::F16(rows) => write::<I, _, STREAM>(isa, &mut rows[row][column..][..count], lanes),
        }
    }
}

#[inline(always)]
fn write<I: Isa, E: Element, const STREAM: bool>(isa: I, to: &mut [E], lanes: &[I::F32; VECTORS]) {
    for (to, v) in to.chunks_mut(LANES).zip(lanes) {
        let v = one_nan(isa, *v);
        if let Some(to) = to.first_chunk_mut() {
            E::store::<I, STREAM>(isa, to, v);
        } else {
            let mut whole = [E::default(); LANES];
            E::store::<I, false>(isa, &mut whole, v);
            to.copy_from_slice(&whole[..to.len()]);
        }
    }
}

/// One NaN for all instruction sets, which differ in the sign of theirs.
#[inline(always)]
fn one_nan<I: Isa>(isa: I, v: I::F32) -> I::F32 {
    let magnitude = isa.and(isa.to_bits(v), isa.splat_i32(i32::MAX));
    let infinity = isa.splat_i32(f32::INFINITY.to_bits().cast_signed());
    let nan = isa.negative(isa.from_bits(isa.sub_i32(infinity, magnitude)));
    isa.select(nan, isa.splat(f32::NAN), v)
}
