//! Activations as the kernels take them: scaled per row and per group of columns, four columns a word.
//!
//! In bytes they are quantized: symmetric, to nearest, −127 … 127. In floats the scale is a power of two that
//! brings the largest of a group to 1 … 2, so nothing is rounded, and no product leaves the range of f32; what is
//! 2^100 times smaller than that counts as zero, so none gets subnormal either.

use std::ops::Range;

use crate::parallel::{self, take_mut};
use crate::planes::padded;
use crate::quantize::Source;
use crate::simd::{Isa, Kernel, LANES, TILE, Token, total};

use super::affine::Affine;
use super::cuts::{Cuts, MAX_SEGMENT, RUN, UNIT};
use super::panel::{Laid, Lanes, Lines};

/// The numbers that activations are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    /// Signed bytes, in the order of the columns.
    Int8,
    /// bfloat16, in the order 0, 2, 1, 3 of the columns of a word. For activations that it holds.
    Bf16,
    /// f32, in the order 2, 0, 3, 1.
    F32,
}

impl Numbers {
    /// Bytes of a word.
    pub(super) fn word(self) -> usize {
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
    /// Words of four columns, zeros behind them: whole lines a row; or `[16 rows][step][row][word]`, in tiles.
    words: Lines<u8, TILE>,
    /// The order of codes that the tiles are for.
    tiles: Option<Laid>,
    /// Each segment's sum, as brackets take it: `[row][segment]`, in tiles `[16 rows][segment][row]`.
    terms: Vec<u32>,
    /// Scale of each segment, likewise.
    scales: Vec<f32>,
    /// Whether the row holds neither NaN nor ±Inf.
    finite: Vec<bool>,
    lines_a_row: usize,
    segments: usize,
}

/// One row of [`Activations`].
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    /// The bytes of a word of bytes, or of a step of floats.
    pub(super) words: &'a [[u8; 4]],
    pub(super) terms: &'a [u32],
    pub(super) scales: &'a [f32],
}

/// All rows of [`Activations`], which are not in tiles.
#[derive(Clone, Copy)]
pub(super) struct AllRows<'a> {
    words: &'a [[u8; 4]],
    /// From row to row.
    stride: usize,
    terms: &'a [u32],
    scales: &'a [f32],
    segments: usize,
}

impl<'a> AllRows<'a> {
    /// The words, or steps of floats, `range` of `R` rows from `row` on.
    #[inline(always)]
    pub(super) fn words<const R: usize>(&self, row: usize, range: Range<usize>) -> [&'a [[u8; 4]]; R] {
        let mut words: [&[[u8; 4]]; R] = [&[]; R];
        for r in 0..R {
            words[r] = &self.words[(row + r) * self.stride + range.start..][..range.len()];
        }
        words
    }

    /// The scales and terms of a segment of `R` rows from `row` on.
    #[inline(always)]
    pub(super) fn factors<const R: usize>(&self, row: usize, segment: usize) -> ([f32; R], [u32; R]) {
        let (mut scales, mut terms) = ([0.0; R], [0; R]);
        for r in 0..R {
            let at = (row + r) * self.segments + segment;
            (scales[r], terms[r]) = (self.scales[at], self.terms[at]);
        }
        (scales, terms)
    }
}

/// Elements that one task quantizes.
pub(super) const TASK: usize = 1 << 14;

impl Activations {
    /// Brings `rows` rows of `k` elements to `numbers`; as a unit for blocks takes them, in the order of its codes,
    /// if there are `tiles`.
    pub(super) fn new(
        token: Token,
        numbers: Numbers,
        x: Source<'_>,
        rows: usize,
        k: usize,
        cuts: &Cuts,
        affine: &Affine,
        tiles: Option<Laid>,
        threads: usize,
    ) -> Self {
        // An odd number, so that the rows of a tile, read side by side, do not meet in the cache's sets.
        let lines_a_row = (numbers.word() * cuts.words()).div_ceil(TILE) | 1;
        let segments = cuts.segments.len();
        let (together, padded) = match tiles {
            Some(_) => (LANES, rows.next_multiple_of(LANES)),
            None => (1, rows),
        };
        let mut all = Self {
            words: Lines::new(padded * lines_a_row),
            tiles,
            terms: vec![0; padded * segments],
            scales: vec![0.0; padded * segments],
            finite: vec![true; rows],
            lines_a_row,
            segments,
        };
        let (mut words, mut terms, mut scales) =
            (all.words.lines_mut(), &mut all.terms[..], &mut all.scales[..]);
        let step = TASK.div_ceil(k.max(1)).next_multiple_of(together);
        let tasks = all.finite.chunks_mut(step).enumerate().map(|(i, finite)| {
            let padded = finite.len().next_multiple_of(together);
            FillRows {
                numbers,
                x: x.part(i * step * k, finite.len() * k),
                k,
                cuts,
                affine,
                stride: lines_a_row * TILE,
                words: take_mut(&mut words, padded * lines_a_row).as_flattened_mut(),
                tiles,
                terms: take_mut(&mut terms, padded * segments),
                scales: take_mut(&mut scales, padded * segments),
                finite,
            }
        });
        parallel::for_each(threads, tasks.collect(), |task| token.run(task));
        all
    }

    /// A row that lies in one piece: there are no tiles.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> Row<'_> {
        let lines = &self.words.lines()[row * self.lines_a_row..][..self.lines_a_row];
        Row {
            words: lines.as_flattened().as_chunks().0,
            terms: &self.terms[row * self.segments..][..self.segments],
            scales: &self.scales[row * self.segments..][..self.segments],
        }
    }

    /// All rows, where there are no tiles.
    #[inline(always)]
    pub(super) fn all(&self) -> AllRows<'_> {
        AllRows {
            words: self.words.lines().as_flattened().as_chunks().0,
            stride: self.lines_a_row * TILE / 4,
            terms: &self.terms,
            scales: &self.scales,
            segments: self.segments,
        }
    }

    /// The order of codes that the words are laid out for, if in tiles.
    pub(super) fn tiles(&self) -> Option<Laid> {
        self.tiles
    }

    /// The tiles from word `word` of row `row` on, which begin one, and the words from 16 rows to the next.
    #[inline(always)]
    pub(super) fn tiles_from(&self, row: usize, word: usize) -> (&[[u8; 4]], usize) {
        let strip = LANES * self.lines_a_row * TILE / 4;
        (&self.words.lines().as_flattened().as_chunks().0[row / LANES * strip + LANES * word..], strip)
    }

    /// The scales and terms of one segment of the 16 rows from `row` on, in tiles.
    #[inline(always)]
    pub(super) fn factors(&self, row: usize, segment: usize) -> (&Lanes, &[f32; LANES]) {
        let at = row / LANES * self.segments + segment;
        (&self.terms.as_chunks().0[at], &self.scales.as_chunks().0[at])
    }

    #[inline(always)]
    pub(super) fn finite(&self, rows: &Range<usize>) -> &[bool] {
        &self.finite[rows.clone()]
    }
}

/// Makes a row the row `r` of its tiles.
#[inline(always)]
fn place(row: &[u8], r: usize, order: Laid, tiles: &mut [u8]) {
    match order {
        Laid::Units => place_steps::<32>(row, r, tiles),
        Laid::Pairs => place_steps::<64>(row, r, tiles),
        Laid::Runs => {
            let runs = tiles.as_chunks_mut::<{ LANES * RUN * UNIT * 4 }>().0;
            for (from, to) in row.as_chunks::<{ RUN * UNIT * 4 }>().0.iter().zip(runs) {
                let (words, to) = (from.as_chunks::<4>().0, to.as_chunks_mut::<4>().0);
                for j in 0..UNIT {
                    for unit in 0..RUN {
                        to[(j * LANES + r) * RUN + unit] = words[unit * UNIT + j];
                    }
                }
            }
        }
    }
}

/// [`place`] where words that lie together belong together, in steps of `BYTES` bytes a row.
#[inline(always)]
fn place_steps<const BYTES: usize>(row: &[u8], r: usize, tiles: &mut [u8]) {
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
    /// Whether the words go to tiles, and in which order.
    tiles: Option<Laid>,
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
        let (words, stride) = (std::mem::take(&mut self.words), self.stride);
        // A row on its way to tiles.
        let mut line = vec![0; if self.tiles.is_some() { stride } else { 0 }];
        for row in 0..self.finite.len() {
            let to = match self.tiles {
                Some(_) => &mut line[..],
                None => &mut words[row * stride..][..stride],
            };
            match self.x {
                Source::F32(x) => self.fill_row(isa, &x[row * k..][..k], row, to),
                x => {
                    widen_row(isa, x, row * k, &mut widened);
                    self.fill_row(isa, &widened[..k], row, to);
                }
            }
            if let Some(order) = self.tiles {
                place(&line, row % LANES, order, &mut words[row / LANES * LANES * stride..]);
            }
        }
    }
}

impl FillRows<'_> {
    #[inline(always)]
    fn fill_row<I: Isa>(&mut self, isa: I, x: &[f32], row: usize, words: &mut [u8]) {
        let segments = self.cuts.segments.len();
        let word = self.numbers.word();
        // Where the factors of the row begin, and how far they lie apart.
        let (first, step) = match self.tiles {
            Some(_) => (row / LANES * LANES * segments + row % LANES, LANES),
            None => (row * segments, 1),
        };
        // The segments of a long group share its scale, so the scale is found group by group.
        let mut number = 0;
        for same_group in self.cuts.segments.chunk_by(|a, b| a.group == b.group) {
            let (begin, last) = (same_group[0].begin, same_group[same_group.len() - 1]);
            let largest = largest_magnitude(isa, &x[begin..last.begin + last.len]);
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
                self.terms[first + number * step] = match self.numbers {
                    Numbers::Int8 => self.affine.term(quantize(isa, x, inverse, to, 4 * self.k)),
                    Numbers::Bf16 => scale_floats::<I, true>(isa, x, inverse, to).to_bits(),
                    Numbers::F32 => scale_floats::<I, false>(isa, x, inverse, to).to_bits(),
                };
                self.scales[first + number * step] = scale;
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

/// codes = RNE(x · inverse) as signed bytes, zeros behind them; returns their sum. Asks for the memory `ahead` bytes
/// behind x meanwhile.
#[inline(always)]
fn quantize<I: Isa>(isa: I, x: &[f32], inverse: f32, codes: &mut [u8], ahead: usize) -> i32 {
    let mut sum = isa.splat_i32(0);
    let (whole, rest) = x.as_chunks::<TILE>();
    let (to, to_rest) = codes.split_at_mut(whole.len() * TILE);
    for (to, x) in to.as_chunks_mut::<TILE>().0.iter_mut().zip(whole) {
        for quarter in x.as_chunks::<LANES>().0 {
            isa.prefetch(quarter, ahead);
        }
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
            for (word, to) in lanes.as_chunks::<4>().0.iter().zip(to.as_chunks_mut::<16>().0) {
                let to = to.as_chunks_mut::<4>().0;
                for (to, column) in to.iter_mut().zip([2, 0, 3, 1]) {
                    *to = word[column].to_le_bytes();
                }
            }
        }
    }
    let mut lanes = [0.0; LANES];
    isa.store::<false>(&mut lanes, sum);
    total(lanes)
}

/// 2^−100: scaled activations below count as zero.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);
