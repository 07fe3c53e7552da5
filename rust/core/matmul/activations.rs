//! Activations as the kernels take them: scaled per row and per group of columns, four columns a word.
//!
//! In bytes they are quantized: symmetric, to nearest, −127 … 127. In floats the scale is a power of two that
//! brings the largest of a group to 1 … 2, so nothing is rounded, and no product leaves the range of f32; what is
//! 2^100 times smaller than that counts as zero, so none gets subnormal either.

use std::ops::Range;

use crate::parallel::{self, take_mut};
use crate::planes::padded;
use crate::quantize::Source;
use crate::simd::multiply::Multiply;
use crate::simd::{Isa, Kernel, LANES, TILE, Token, total};

use super::affine::Affine;
use super::cuts::{Cuts, MAX_SEGMENT};
use super::panel::Lines;

/// The numbers that activations are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    /// Signed bytes, in the order of the columns.
    Int8,
    /// bfloat16, in the order 0, 2, 1, 3 of the columns of a word. For activations that it holds.
    Bf16,
    /// f32, in the order of the columns.
    F32,
}

impl Numbers {
    /// Bytes of a word.
    fn word(self) -> usize {
        match self {
            Self::Int8 => 4,
            Self::Bf16 => 8,
            Self::F32 => 16,
        }
    }

    /// Longest run of columns whose products are summed by themselves: what an i32 always holds, or what keeps
    /// the rounding of f32 small.
    pub(super) fn longest_segment(self) -> usize {
        match self {
            Self::Int8 => MAX_SEGMENT,
            Self::Bf16 | Self::F32 => 256,
        }
    }
}

/// Rows of activations, cut like the weights they meet.
pub(super) struct Activations {
    /// Words of four columns, zeros behind them: whole lines a row.
    words: Lines<u8, TILE>,
    /// Each segment's sum, as brackets take it.
    terms: Vec<u32>,
    /// Scale of each segment.
    scales: Vec<f32>,
    /// Whether the row holds neither NaN nor ±Inf.
    finite: Vec<bool>,
    /// The same words as a unit for blocks takes them: `[16 rows][step][row][word]`, if it takes any.
    tiles: Lines<u8, TILE>,
    lines_a_row: usize,
    segments: usize,
}

/// One row of [`Activations`].
#[derive(Clone, Copy)]
pub(super) struct Row<'a, W> {
    pub(super) words: &'a [W],
    pub(super) terms: &'a [u32],
    pub(super) scales: &'a [f32],
}

/// Elements that one task quantizes.
pub(super) const TASK: usize = 1 << 14;

impl Activations {
    /// Brings `rows` rows of `k` elements to `numbers`.
    pub(super) fn new(
        token: Token,
        numbers: Numbers,
        x: Source<'_>,
        rows: usize,
        k: usize,
        cuts: &Cuts,
        affine: &Affine,
        threads: usize,
    ) -> Self {
        // An odd number, so that the rows of a tile, read side by side, do not meet in the cache's sets.
        let lines_a_row = (numbers.word() * cuts.words()).div_ceil(TILE) | 1;
        let segments = cuts.segments.len();
        let mut all = Self {
            words: Lines::new(rows * lines_a_row),
            terms: vec![0; rows * segments],
            scales: vec![0.0; rows * segments],
            finite: vec![true; rows],
            tiles: Lines::new(0),
            lines_a_row,
            segments,
        };
        let (mut words, mut terms, mut scales) =
            (all.words.lines_mut(), &mut all.terms[..], &mut all.scales[..]);
        let step = TASK.div_ceil(k.max(1));
        let tasks = all.finite.chunks_mut(step).enumerate().map(|(i, finite)| FillRows {
            numbers,
            x: x.part(i * step * k, finite.len() * k),
            k,
            cuts,
            affine,
            stride: lines_a_row * TILE,
            words: take_mut(&mut words, finite.len() * lines_a_row).as_flattened_mut(),
            terms: take_mut(&mut terms, finite.len() * segments),
            scales: take_mut(&mut scales, finite.len() * segments),
            finite,
        });
        parallel::for_each(threads, tasks.collect(), |task| token.run(task));
        all
    }

    #[inline(always)]
    pub(super) fn row<M: Multiply>(&self, row: usize) -> Row<'_, M::Word> {
        Row {
            words: M::words(self.words.lines()[row * self.lines_a_row..][..self.lines_a_row].as_flattened()),
            terms: &self.terms[row * self.segments..][..self.segments],
            scales: &self.scales[row * self.segments..][..self.segments],
        }
    }

    /// Lays the words out in tiles of 16 rows and steps of `step` words, 8 or 16.
    pub(super) fn tile(&mut self, step: usize, threads: usize) {
        let (lines, rows) = (self.lines_a_row, self.finite.len());
        let mut tiles = Lines::new(rows.next_multiple_of(LANES) * lines);
        if lines > 0 {
            let from = self.words.lines()[..rows * lines].chunks(LANES * lines);
            let tasks = tiles.lines_mut().chunks_mut(LANES * lines).zip(from);
            parallel::for_each(threads, tasks.collect(), |(to, from): (&mut [[u8; TILE]], &[[u8; TILE]])| {
                for (r, row) in from.chunks(lines).enumerate() {
                    match step {
                        8 => place::<32>(row.as_flattened(), r, to.as_flattened_mut()),
                        _ => place::<64>(row.as_flattened(), r, to.as_flattened_mut()),
                    }
                }
            });
        }
        self.tiles = tiles;
    }

    /// The tiles from word `word` of row `row` on, which begin one, and the words from 16 rows to the next.
    #[inline(always)]
    pub(super) fn tiles_from(&self, row: usize, word: usize) -> (&[[u8; 4]], usize) {
        let strip = LANES * self.lines_a_row * TILE / 4;
        (&self.tiles.lines().as_flattened().as_chunks().0[row / LANES * strip + LANES * word..], strip)
    }

    /// The scale and the term of one segment of a row.
    #[inline(always)]
    pub(super) fn factors(&self, row: usize, segment: usize) -> (f32, u32) {
        let at = row * self.segments + segment;
        (self.scales[at], self.terms[at])
    }

    #[inline(always)]
    pub(super) fn finite(&self, rows: &Range<usize>) -> &[bool] {
        &self.finite[rows.clone()]
    }
}

/// Makes a row the row `r` of its tiles, whose rows have `BYTES` bytes.
fn place<const BYTES: usize>(row: &[u8], r: usize, tiles: &mut [u8]) {
    let tiles = tiles.as_chunks_mut::<BYTES>().0.chunks_mut(LANES);
    for (from, tile) in row.as_chunks::<BYTES>().0.iter().zip(tiles) {
        tile[r] = *from;
    }
}

struct FillRows<'a> {
    numbers: Numbers,
    x: Source<'a>,
    k: usize,
    cuts: &'a Cuts,
    affine: &'a Affine,
    /// Bytes from row to row.
    stride: usize,
    words: &'a mut [u8],
    terms: &'a mut [u32],
    scales: &'a mut [f32],
    finite: &'a mut [bool],
}

impl Kernel for FillRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let k = self.k;
        let mut widened = match self.x {
            Source::F32(_) => Vec::new(),
            _ => vec![0.0; k.next_multiple_of(TILE)],
        };
        for row in 0..self.finite.len() {
            match self.x {
                Source::F32(x) => self.fill_row(isa, &x[row * k..][..k], row),
                x => {
                    widen_row(isa, x, row * k, &mut widened);
                    self.fill_row(isa, &widened[..k], row);
                }
            }
        }
    }
}

impl FillRows<'_> {
    #[inline(always)]
    fn fill_row<I: Isa>(&mut self, isa: I, x: &[f32], row: usize) {
        let segments = self.cuts.segments.len();
        let word = self.numbers.word();
        let words = &mut self.words[row * self.stride..][..self.stride];
        let (terms, scales) = (&mut self.terms[row * segments..], &mut self.scales[row * segments..]);
        // The segments of a long group share its scale, so the scale is found group by group.
        let mut number = 0;
        for same_group in self.cuts.segments.chunk_by(|a, b| a.group == b.group) {
            let (first, last) = (same_group[0], same_group[same_group.len() - 1]);
            let largest = largest_magnitude(isa, &x[first.begin..last.begin + last.len]);
            if !largest.is_finite() {
                self.finite[row] = false;
                return;
            }
            let scale = match self.numbers {
                Numbers::Int8 => int8_scale(largest),
                // Its power of two.
                Numbers::Bf16 | Numbers::F32 => {
                    normal_or_zero(f32::from_bits(largest.to_bits() & f32::INFINITY.to_bits()))
                }
            };
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            for segment in same_group {
                let x = &x[segment.begin..][..segment.len];
                let to = &mut words[word * segment.word..][..word * segment.words()];
                terms[number] = match self.numbers {
                    Numbers::Int8 => self.affine.term(quantize(isa, x, inverse, to)),
                    Numbers::Bf16 => scale_floats::<I, true>(isa, x, inverse, to).to_bits(),
                    Numbers::F32 => scale_floats::<I, false>(isa, x, inverse, to).to_bits(),
                };
                scales[number] = scale;
                number += 1;
            }
        }
    }
}

/// The elements of `x` from `begin` on as f32, as many as `to` holds.
#[inline(always)]
fn widen_row<I: Isa>(isa: I, x: Source<'_>, begin: usize, to: &mut [f32]) {
    for (i, to) in to.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        let tile = x.tile(isa, begin + i * TILE);
        for (to, v) in to.as_chunks_mut::<LANES>().0.iter_mut().zip(tile) {
            isa.store::<false>(to, v);
        }
    }
}

/// The scale of a group in bytes, from its largest magnitude.
#[inline(always)]
pub(super) fn int8_scale(largest: f32) -> f32 {
    normal_or_zero(largest / 127.0)
}

#[inline(always)]
fn normal_or_zero(scale: f32) -> f32 {
    if scale < f32::MIN_POSITIVE { 0.0 } else { scale }
}

/// max|x|; infinite or NaN if an element is.
#[inline(always)]
pub(super) fn largest_magnitude<I: Isa>(isa: I, x: &[f32]) -> f32 {
    // Magnitudes order like their bits, NaN above infinity.
    let magnitude = isa.splat_i32(i32::MAX);
    let mut largest = isa.splat_i32(0);
    let (whole, rest) = x.as_chunks::<16>();
    for lanes in whole {
        largest = isa.max_i32(largest, isa.and(isa.to_bits(isa.load(lanes)), magnitude));
    }
    let rest = isa.load(&padded(rest));
    largest = isa.max_i32(largest, isa.and(isa.to_bits(rest), magnitude));
    let mut lanes = [0; 16];
    isa.store_i32(&mut lanes, largest);
    f32::from_bits(lanes.into_iter().fold(0, u32::max))
}

/// codes = RNE(x · inverse) as signed bytes, zeros behind them; returns their sum.
#[inline(always)]
fn quantize<I: Isa>(isa: I, x: &[f32], inverse: f32, codes: &mut [u8]) -> i32 {
    let mut sum = isa.splat_i32(0);
    let (whole, rest) = x.as_chunks::<TILE>();
    let (to, to_rest) = codes.split_at_mut(whole.len() * TILE);
    for (to, x) in to.as_chunks_mut::<TILE>().0.iter_mut().zip(whole) {
        quantize_tile(isa, x, inverse, to, &mut sum);
    }
    if !rest.is_empty() {
        let mut last = [0; TILE];
        quantize_tile(isa, &padded(rest), inverse, &mut last, &mut sum);
        to_rest.copy_from_slice(&last[..to_rest.len()]);
    }
    let mut lanes = [0; 16];
    isa.store_i32(&mut lanes, sum);
    lanes.into_iter().fold(0, |sum, lane| sum.wrapping_add(lane as i32))
}

/// One tile of [`quantize`]; adds its codes to the lanes of `sum`.
#[inline(always)]
fn quantize_tile<I: Isa>(isa: I, x: &[f32; TILE], inverse: f32, to: &mut [u8; TILE], sum: &mut I::I32) {
    let (quarters, _) = x.as_chunks::<16>();
    let inverse = isa.splat(inverse);
    let mut rounded = [isa.splat_i32(0); 4];
    for j in 0..4 {
        rounded[j] = isa.round(isa.mul(isa.load(&quarters[j]), inverse));
        *sum = isa.add_i32(*sum, rounded[j]);
    }
    // Narrowing is unsigned: shifted by 128 and back.
    let biased = isa.narrow(rounded, 128, 255);
    isa.store_u8(to, isa.sub_u8(biased, isa.splat_u8(128)));
}

/// x · inverse, a power of two, as bfloat16 or f32 words, zeros behind them; returns their sum.
///
/// Element `i` goes to lane `i` mod 16 of the sum, then lanes j and j + 8, j + 4, j + 2, j + 1 are added.
#[inline(always)]
fn scale_floats<I: Isa, const BF16: bool>(isa: I, x: &[f32], inverse: f32, to: &mut [u8]) -> f32 {
    let (inverse, smallest) = (isa.splat(inverse), isa.splat(SMALLEST));
    let magnitude = isa.splat_i32(i32::MAX);
    let mut sum = isa.splat(0.0);
    let bytes = if BF16 { 2 } else { 4 };
    for (x, to) in x.chunks(LANES).zip(to.chunks_mut(bytes * LANES)) {
        let x = match x.first_chunk() {
            Some(whole) => isa.load(whole),
            None => isa.load(&padded(x)),
        };
        let scaled = isa.mul(x, inverse);
        let small = isa.gt(smallest, isa.from_bits(isa.and(isa.to_bits(scaled), magnitude)));
        let scaled = isa.select(small, isa.splat(0.0), scaled);
        sum = isa.add(sum, scaled);
        let mut lanes = [0; LANES];
        isa.store_i32(&mut lanes, isa.to_bits(scaled));
        if BF16 {
            // Columns 0 and 2, 1 and 3.
            for (word, to) in lanes.as_chunks::<4>().0.iter().zip(to.as_chunks_mut::<8>().0) {
                let pair = |low: u32, high: u32| u64::from(low >> 16 | high & 0xffff_0000);
                *to = (pair(word[0], word[2]) | pair(word[1], word[3]) << 32).to_le_bytes();
            }
        } else {
            for (lane, to) in lanes.iter().zip(to.as_chunks_mut::<4>().0) {
                *to = lane.to_le_bytes();
            }
        }
    }
    let mut lanes = [0.0; LANES];
    isa.store::<false>(&mut lanes, sum);
    total(lanes)
}

/// 2^−100: scaled activations below count as zero.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);
