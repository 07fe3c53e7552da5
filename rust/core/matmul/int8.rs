//! The integer kernel: panels of 16 weight rows against a few rows of quantized activations at a time.
//!
//! ```text
//! for each panel of 16 rows of W:
//!   for each block of columns:                        fits the L1 or L2 cache
//!     unpack the block's codes, four columns a word, one row a lane
//!     for each few rows of x:                         their sums stay in registers
//!       for each segment (a group of columns):
//!         dot  = Σ codes · q                          i32, exact
//!         sum  = fma(s_r · s_x, f32(dot − z_r · Σq), sum)
//!   write the 16 columns of the result
//! ```

use std::ops::Range;

use crate::planes::PlaneReader;
use crate::quantize::{Rows, ZeroPoints};
use crate::scheme::Scheme;
use crate::simd::dot::{Dot, DotKernel};
use crate::simd::{Isa, LANES, TILE};

use super::activations::{Activations, Row};
use super::layout::{Block, Layout};
use super::output::Columns;
use super::panel::{Ahead, Lanes, row_readers, store_transposed, transpose_rows};

/// How the codes that are read stand to integers: `2^shift · (Σ k_r·q − z_r·Σq)` is one, with
/// `2^shift · z_r = zero` (or the stored zero point z: `2^shift · z_r = z_factor · z − z_offset`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Affine {
    shift: u32,
    zero: i32,
    z_factor: i32,
    z_offset: i32,
    /// What reading a prefix multiplies the scale with: 2^(bits − read_bits).
    scale: f32,
}

impl Affine {
    pub(super) fn new(scheme: &Scheme, read_bits: u32) -> Self {
        let dropped = scheme.bits() - read_bits;
        // Twice the value of the dropped bits' middle.
        let middle = (1 << dropped) - 1;
        let fixed = scheme.zero_point().map(|z| (2.0 * z) as i32);
        let scale = (1u32 << dropped) as f32;
        match fixed {
            None if dropped == 0 => Self { shift: 0, zero: 0, z_factor: 1, z_offset: 0, scale },
            None => Self { shift: dropped + 1, zero: 0, z_factor: 2, z_offset: middle, scale },
            Some(twice) if dropped == 0 && twice % 2 == 0 => {
                Self { shift: 0, zero: twice / 2, z_factor: 0, z_offset: 0, scale }
            }
            Some(twice) => Self { shift: dropped + 1, zero: twice - middle, z_factor: 0, z_offset: 0, scale },
        }
    }
}

/// The work of one thread at a time: some panels of the weight, some rows of x.
pub(super) struct Panels<'a> {
    pub(super) weight: &'a Rows<'a>,
    pub(super) layout: &'a Layout,
    pub(super) affine: Affine,
    pub(super) x: &'a Activations,
    pub(super) bias: Option<&'a [f32]>,
    /// Rows of x.
    pub(super) rows: Range<usize>,
    /// Rows of the weight, from a multiple of 16.
    pub(super) outputs: Range<usize>,
    pub(super) out: Columns<'a>,
}

impl DotKernel for Panels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<D: Dot>(mut self, dot: D) {
        let isa = dot.isa();
        let mut scratch = Scratch::new(self.layout, self.rows.len());
        let (begin, end) = (self.outputs.start, self.outputs.end);
        for first in (begin..end).step_by(LANES) {
            let count = LANES.min(end - first);
            scratch.load_scales(isa, self.weight, self.affine, first, count);
            scratch.sums.fill([0; LANES]);
            let Rows { packed, prefix, shape, ref scheme, .. } = *self.weight;
            let mut readers = row_readers(packed, prefix, shape, first, count);
            let mut ahead = Ahead::new(packed, prefix, shape, first + LANES);
            for block in &self.layout.blocks {
                scratch.read_block(dot, scheme, &mut readers, &mut ahead, self.layout, block);
                self.multiply(dot, block, &mut scratch);
            }
            self.write(isa, &scratch.sums, first, count);
        }
    }
}

impl Panels<'_> {
    /// Adds a block's products to the sums of all rows.
    #[inline(always)]
    fn multiply<D: Dot>(&self, dot: D, block: &Block, scratch: &mut Scratch) {
        let mut row = self.rows.start;
        if D::TILE_ROWS >= 8 {
            while row + 8 <= self.rows.end {
                self.multiply_rows::<D, 8, 1>(dot, block, scratch, row);
                row += 8;
            }
        }
        if D::TILE_ROWS >= 4 {
            while row + 4 <= self.rows.end {
                self.multiply_rows::<D, 4, 1>(dot, block, scratch, row);
                row += 4;
            }
        }
        while row + 2 <= self.rows.end {
            self.multiply_rows::<D, 2, 2>(dot, block, scratch, row);
            row += 2;
        }
        if row < self.rows.end {
            self.multiply_rows::<D, 1, 4>(dot, block, scratch, row);
        }
    }

    /// `R` rows of x at a time. `C` chains of additions hide the latency of a dot product where rows are few.
    #[inline(always)]
    fn multiply_rows<D: Dot, const R: usize, const C: usize>(
        &self,
        dot: D,
        block: &Block,
        scratch: &mut Scratch,
        first: usize,
    ) {
        let isa = dot.isa();
        let mut x = [self.x.row(first); R];
        for r in 1..R {
            x[r] = self.x.row(first + r);
        }
        let sums: &mut [Lanes; R] =
            scratch.sums[first - self.rows.start..].first_chunk_mut().expect("a sum for each row");
        let mut acc = [isa.splat(0.0); R];
        for r in 0..R {
            acc[r] = isa.from_bits(isa.load_i32(&sums[r]));
        }
        for number in block.segments.clone() {
            let segment = self.layout.segments[number];
            let codes = &scratch.words[segment.word - block.words.start..][..segment.words()];
            let dots = dot_segment::<D, R, C>(dot, codes, &x, segment.word);
            let scale = isa.from_bits(isa.load_i32(&scratch.scales[segment.group]));
            for r in 0..R {
                let zero = match scratch.zeros.get(segment.group) {
                    Some(zeros) => isa.mul_i32(isa.load_i32(zeros), isa.splat_i32(x[r].sums[number])),
                    None => isa.splat_i32(self.affine.zero.wrapping_mul(x[r].sums[number])),
                };
                let mut bracket = dots[r];
                if self.affine.shift > 0 {
                    bracket = isa.mul_i32(bracket, isa.splat_i32(1 << self.affine.shift));
                }
                let mut bracket = isa.to_f32(isa.sub_i32(bracket, zero));
                if self.affine.shift > 0 {
                    // Exact: a division by a power of two far from the ends of the range.
                    bracket = isa.mul(bracket, isa.splat(1.0 / (1u32 << self.affine.shift) as f32));
                }
                acc[r] = isa.mul_add(isa.mul(scale, isa.splat(x[r].scales[number])), bracket, acc[r]);
            }
        }
        for r in 0..R {
            isa.store_i32(&mut sums[r], isa.to_bits(acc[r]));
        }
    }

    /// Writes `count` columns of the result: sums plus bias, NaN for rows that are not finite.
    #[inline(always)]
    fn write<I: Isa>(&mut self, isa: I, sums: &[Lanes], first: usize, count: usize) {
        let mut bias = [0.0; LANES];
        if let Some(all) = self.bias {
            bias[..count].copy_from_slice(&all[first..first + count]);
        }
        let bias = isa.load(&bias);
        for (row, lanes) in sums.iter().enumerate() {
            let mut sum = isa.from_bits(isa.load_i32(lanes));
            if self.bias.is_some() {
                sum = isa.add(sum, bias);
            }
            if !self.x.is_finite(self.rows.start + row) {
                sum = isa.splat(f32::NAN);
            }
            self.out.write(isa, row, first - self.outputs.start, count, sum);
        }
    }
}

/// The integer sums of `R` rows of x with the 16 weight rows of `codes`.
#[inline(always)]
fn dot_segment<D: Dot, const R: usize, const C: usize>(
    dot: D,
    codes: &[Lanes],
    x: &[Row<'_>; R],
    word: usize,
) -> [<D::Isa as Isa>::I32; R] {
    let isa = dot.isa();
    let mut q: [&[[u8; 4]]; R] = [&[]; R];
    for r in 0..R {
        q[r] = &x[r].words[word..][..codes.len()];
    }
    let mut sums = [[isa.splat_i32(0); C]; R];
    let whole = codes.len() / C * C;
    for w in (0..whole).step_by(C) {
        for c in 0..C {
            let lanes = isa.bytes(isa.load_i32(&codes[w + c]));
            for r in 0..R {
                sums[r][c] = dot.dot(sums[r][c], lanes, i32::from_le_bytes(q[r][w + c]));
            }
        }
    }
    for w in whole..codes.len() {
        let lanes = isa.bytes(isa.load_i32(&codes[w]));
        for r in 0..R {
            sums[r][0] = dot.dot(sums[r][0], lanes, i32::from_le_bytes(q[r][w]));
        }
    }
    let mut total = [isa.splat_i32(0); R];
    for r in 0..R {
        total[r] = sums[r][0];
        for c in 1..C {
            total[r] = isa.add_i32(total[r], sums[r][c]);
        }
    }
    total
}

/// Memory of one task.
struct Scratch {
    /// Words of the block, one row of the panel a lane.
    words: Vec<Lanes>,
    /// Codes of the block row by row, where segments do not begin at whole words.
    codes: Vec<u8>,
    /// The same codes, each segment moved to its words.
    spread: Vec<u8>,
    /// Bytes of a row in `codes` and in `spread`.
    strides: (usize, usize),
    /// Scales of the panel by group, `s · 2^(bits − read_bits)`, as bits of f32.
    scales: Vec<Lanes>,
    /// The same row by row.
    scales_by_row: Vec<f32>,
    /// Zero points of the panel by group in units of 2^−shift; empty if the scheme fixes it.
    zeros: Vec<Lanes>,
    /// Running results, a row of x each, as bits of f32.
    sums: Vec<Lanes>,
}

impl Scratch {
    fn new(layout: &Layout, rows: usize) -> Self {
        let strides = if layout.contiguous {
            (0, 0)
        } else {
            (layout.block_columns().next_multiple_of(TILE), (4 * layout.block_words()).next_multiple_of(TILE))
        };
        Self {
            words: vec![[0; LANES]; layout.block_words().next_multiple_of(LANES)],
            codes: vec![0; LANES * strides.0],
            spread: vec![0; LANES * strides.1],
            strides,
            scales: Vec::new(),
            scales_by_row: Vec::new(),
            zeros: Vec::new(),
            sums: vec![[0; LANES]; rows],
        }
    }

    /// Loads the scales and zero points of the rows `first` to `first + count`.
    #[inline(always)]
    fn load_scales<I: Isa>(&mut self, isa: I, weight: &Rows<'_>, affine: Affine, first: usize, count: usize) {
        let groups = weight.scheme.groups(weight.shape.k);
        self.scales_by_row.resize(count * groups, 0.0);
        weight.scales.widen(first * groups, &mut self.scales_by_row);
        self.scales_by_row.iter_mut().for_each(|scale| *scale *= affine.scale);
        self.scales.resize(groups.next_multiple_of(LANES), [0; LANES]);
        transpose_rows(isa, &self.scales_by_row, groups, &mut self.scales);
        if let ZeroPoints::U8(zeros) = weight.zero_points {
            self.zeros.resize(groups, [0; LANES]);
            for row in 0..count {
                for (lanes, z) in self.zeros.iter_mut().zip(&zeros[(first + row) * groups..][..groups]) {
                    lanes[row] = (affine.z_factor * i32::from(*z) - affine.z_offset) as u32;
                }
            }
        }
    }

    /// Unpacks the next block of the panel into `words`.
    #[inline(always)]
    fn read_block<D: Dot>(
        &mut self,
        dot: D,
        scheme: &Scheme,
        readers: &mut [PlaneReader<'_>],
        ahead: &mut Ahead<'_>,
        layout: &Layout,
        block: &Block,
    ) {
        let isa = dot.isa();
        let columns = block.columns.len();
        if !layout.contiguous {
            self.read_spread(isa, scheme, readers, layout, block);
        }
        for (tile, to) in self.words.chunks_exact_mut(LANES).enumerate() {
            let mut lanes = [isa.splat(0.0); LANES];
            if layout.contiguous {
                if tile * TILE >= columns {
                    break;
                }
                let len = TILE.min(columns - tile * TILE);
                for r in 0..readers.len() {
                    lanes[r] = isa.from_bits(isa.words(read_levels(isa, scheme, &mut readers[r], len)));
                }
            } else {
                for r in 0..readers.len() {
                    let row = &self.spread[r * self.strides.1..][tile * TILE..];
                    let codes = isa.load_u8(row.first_chunk().expect("strides are whole tiles"));
                    lanes[r] = isa.from_bits(isa.words(codes));
                }
            }
            store_transposed(isa, &lanes, to);
            ahead.fetch(dot);
        }
    }

    /// Unpacks the next block row by row and moves each segment to its words.
    #[inline(always)]
    fn read_spread<I: Isa>(
        &mut self,
        isa: I,
        scheme: &Scheme,
        readers: &mut [PlaneReader<'_>],
        layout: &Layout,
        block: &Block,
    ) {
        for (r, reader) in readers.iter_mut().enumerate() {
            let codes = &mut self.codes[r * self.strides.0..][..self.strides.0];
            for (tile, to) in codes.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                let done = tile * TILE;
                if done < block.columns.len() {
                    let len = TILE.min(block.columns.len() - done);
                    isa.store_u8(to, read_levels(isa, scheme, reader, len));
                }
            }
            let spread = &mut self.spread[r * self.strides.1..][..self.strides.1];
            for segment in &layout.segments[block.segments.clone()] {
                let from = &codes[segment.begin - block.columns.start..][..segment.len];
                spread[4 * (segment.word - block.words.start)..][..segment.len].copy_from_slice(from);
            }
        }
    }
}

/// The next `len` codes of a row, or the levels they stand for.
#[inline(always)]
fn read_levels<I: Isa>(isa: I, scheme: &Scheme, reader: &mut PlaneReader<'_>, len: usize) -> I::U8 {
    let codes = reader.read(isa, len);
    match scheme.table() {
        Some(table) => isa.lookup_u8(isa.shr_and_u8(codes, 0, 15), table.padded()),
        None => codes,
    }
}
