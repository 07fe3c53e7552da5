//! The kernel for codes and activations in floats.
//!
//! ```text
//! for each few panels of 64 rows of W:
//!   for each block of columns:                      of a panel, in floats, it fits the first-level cache
//!     for each panel:                               the rows of x, of one block, the second-level cache
//!       expand the block's codes to floats
//!       for each tile of rows of x:                 dots += codes · x; at a segment's end what tile.rs does
//!   write the columns of the result
//! ```
//!
//! For few rows of x that would not pay: [`Stream`] widens codes in registers.

use std::ops::Range;

use crate::quantize::Rows;
use crate::simd::floats::{Products, ProductsKernel};
use crate::simd::{Isa, LANES, VECTORS};

use super::Work;
use super::affine::Affine;
use super::codes::common;
use super::cuts::{Cuts, UNIT};
use super::factors::Factors;
use super::panel::{
    Ahead, AlignedWords, BYTES, Codes, Laid, Lanes, Lines, Panel, PanelPlanes, Unit, Word, ahead, bits_of,
    by_stack,
};
use super::sums::{Sums, by_height, runs_of_tiles};
use super::tile::{Operands, add_bracket};

/// Bytes of a whole panel's block in floats, for few rows and for more: long blocks are worth more the more rows they
/// meet, short ones leave the first-level cache to be written again.
const BLOCKS: [usize; 2] = [16 << 10, 32 << 10];
/// The most rows that count as few: measured.
const FEW_ROWS: usize = 24;
/// Bytes of running results that stay in the second-level cache beside x.
const SUMS: usize = 512 << 10;
/// Panels beyond which taking more of them together saves little.
const MAX_TOGETHER: usize = 8;
/// How far ahead of the codes that few rows take memory is asked for, in lines of all planes together: measured.
const AHEAD: usize = 40;

/// Rows of x up to which codes are better widened again for every few rows than once, in memory, for all: measured,
/// more where tiles are narrow.
const fn stream_rows<I: Isa>() -> usize {
    if I::TILE_VECTORS == VECTORS { 4 } else { 8 }
}

/// Words of the blocks that suit `rows` of activations of `word` bytes a word: their codes take as many for each lane.
pub(super) fn block_for_rows(rows: usize, word: usize) -> usize {
    BLOCKS[usize::from(rows > FEW_ROWS)] / (word * LANES * VECTORS)
}

impl ProductsKernel for Work<'_> {
    type Output = ();

    #[inline(always)]
    fn run<P: Products>(mut self, by: P) {
        let isa = by.isa();
        let panels: Vec<Panel> = Panel::all(self.outputs.clone()).collect();
        let together = (SUMS / (self.rows.len() * VECTORS * size_of::<Lanes>())).clamp(1, MAX_TOGETHER);
        let new = || Side::new(self.cuts, self.rows.len());
        let mut sides: Vec<Side> = (0..together.min(panels.len())).map(|_| new()).collect();
        let mut expanded = Expanded::new::<P>(self.cuts);
        for panels in panels.chunks(together) {
            let mut codes = Vec::with_capacity(panels.len());
            for (side, &panel) in sides.iter_mut().zip(panels) {
                side.factors.load(isa, self.weight, self.layout, self.affine, panel);
                let Rows { packed, ref prefix, shape, ref scheme, .. } = *self.weight;
                let table = scheme.table();
                codes.push(Codes::open(isa, packed, prefix, shape, table, self.layout, self.cuts, panel));
            }
            self.multiply_together(by, panels, &mut codes, &mut sides, &mut expanded);
            for (side, &panel) in sides.iter().zip(panels) {
                let (finite, first) = (self.x.finite(&self.rows), panel.first - self.outputs.start);
                side.sums.write(isa, panel, self.bias, finite, self.bypass, &mut self.out, first);
            }
        }
    }
}

impl Work<'_> {
    /// The sums of all rows with a few panels.
    #[inline(always)]
    fn multiply_together<P: Products>(
        &self,
        by: P,
        panels: &[Panel],
        codes: &mut [Codes<'_>],
        sides: &mut [Side],
        expanded: &mut Expanded,
    ) {
        for ((side, &panel), codes) in sides.iter_mut().zip(panels).zip(&*codes) {
            side.streams = self.widens_in_registers::<P>(panel, codes);
            side.sums.begin(panel.vectors(), if side.streams { VECTORS } else { P::Isa::TILE_VECTORS });
        }
        for (number, block) in self.cuts.blocks.iter().enumerate() {
            for ((side, &panel), codes) in sides.iter_mut().zip(panels).zip(&mut *codes) {
                let (scales, zeros) = side.factors.of(self.weight, self.layout, panel);
                let (cuts, affine, vectors) = (self.cuts, self.affine, panel.vectors());
                let on = Operands { x: self.x, cuts, block, affine, vectors, scales, zeros };
                let (rows, sums) = (self.rows.clone(), &mut side.sums);
                match codes {
                    // All blocks in one go.
                    Codes::Panels(codes) if side.streams => {
                        if number == 0 {
                            Streams { on, codes, rows, sums }.run(by);
                        }
                    }
                    codes => {
                        let k = self.weight.shape.k;
                        if sums.wide(P::Isa::TILE_VECTORS) {
                            expanded.take::<P, VECTORS>(by, on, k, codes);
                        } else {
                            expanded.take::<P, 1>(by, on, k, codes);
                        }
                        let (planes, carried) = (codes.planes(), side.carried.as_mut());
                        Tiles { on, expanded, rows, planes, sums, carried }.run(by);
                    }
                }
            }
        }
    }

    /// Whether rows are so few that the codes of a panel, if a whole one, are widened in registers.
    #[inline(always)]
    fn widens_in_registers<P: Products>(&self, panel: Panel, codes: &Codes<'_>) -> bool {
        self.rows.len() <= const { stream_rows::<P::Isa>() }
            && panel.vectors() == VECTORS
            && self.cuts.by_units
            && codes.planes().is_some_and(|planes| has_stream::<P>(planes.stack()))
    }
}

/// Whether a stack's codes have the bits that these products are chosen for.
const fn fits<P: Products>(stack: u32) -> bool {
    let bits = bits_of(stack);
    *P::BITS.start() <= bits && bits <= *P::BITS.end()
}

/// Whether few rows have a kernel of their own for the codes of a stack.
const fn has_stream<P: Products>(stack: u32) -> bool {
    common(stack) && fits::<P>(stack)
}

/// What belongs to one of the panels that are multiplied together.
struct Side {
    /// Whether its codes are widened in registers.
    streams: bool,
    factors: Factors,
    /// Running results, as bits of f32.
    sums: Sums,
    /// Sums of products carried from block to block, if any ever are.
    carried: Option<Sums>,
}

impl Side {
    fn new(cuts: &Cuts, rows: usize) -> Self {
        let carried = (!cuts.whole).then(|| Sums::new(rows));
        Self { streams: false, factors: Factors::default(), sums: Sums::new(rows), carried }
    }
}

/// One block of one panel, as tiles take it.
struct Expanded {
    /// Codes on their way to floats.
    bytes: AlignedWords,
    /// `[step][vector]` where tiles are as wide as the panel, else `[vector][step]`.
    floats: Lines<u32, LANES>,
    /// Scales and zero points of each piece: `[piece][vector]`.
    scales: Lines<u32, LANES>,
    zeros: Lines<u32, LANES>,
}

impl Expanded {
    fn new<P: Products>(cuts: &Cuts) -> Self {
        // Rows of the canonical layout come in pairs of units.
        let words = Laid::Pairs.words(cuts.block_units(), VECTORS);
        let pieces = cuts.blocks.iter().map(|block| block.pieces.len()).max().unwrap_or(0) * VECTORS;
        Self {
            bytes: Lines::new(words),
            floats: Lines::new(words * P::STEPS),
            scales: Lines::new(pieces),
            zeros: Lines::new(pieces),
        }
    }

    /// Takes the next block of `codes`, for tiles `C` vectors wide.
    #[inline(always)]
    fn take<P: Products, const C: usize>(
        &mut self,
        by: P,
        on: Operands<'_>,
        k: usize,
        codes: &mut Codes<'_>,
    ) {
        let (block, vectors) = (on.block, on.vectors);
        let lines = block.units.len() * UNIT * vectors;
        let (floats, scales) = (&mut self.floats.lines_mut()[..lines * P::STEPS], self.scales.lines_mut());
        let into = Widen::<_, C> { on, words: (), floats, scales, zeros: self.zeros.lines_mut() };
        if let Some(planes) = codes.planes() {
            by_stack!(planes.stack(), STACK => {
                if const { STACK != BYTES && C == P::Isa::TILE_VECTORS && fits::<P>(STACK) } && vectors == VECTORS {
                    by.vectorize(into.of(InPlanes::<STACK> { planes, units: block.units.start }));
                    return;
                }
            });
        }
        let words = match codes.planes().and_then(|planes| planes.as_words(block)) {
            Some(words) => words,
            None => {
                let to = &mut self.bytes.lines_mut()[..lines];
                codes.expand(by.isa(), on.cuts, k, block, to, Laid::Units, &mut Ahead::default());
                to
            }
        };
        by.vectorize(into.of(InBytes { words, vectors }));
    }
}

/// Codes of a block, unit by unit.
trait Words {
    /// The words of a unit of vector `c`.
    fn unit<I: Isa>(&self, isa: I, unit: usize, c: usize) -> [I::U8; UNIT];
}

/// Codes in bytes: `[unit][vector][word]`.
struct InBytes<'a> {
    words: &'a [Word],
    vectors: usize,
}

impl Words for InBytes<'_> {
    #[inline(always)]
    fn unit<I: Isa>(&self, isa: I, unit: usize, c: usize) -> [I::U8; UNIT] {
        let from = &self.words[(unit * self.vectors + c) * UNIT..][..UNIT];
        let mut words = [isa.splat_u8(0); UNIT];
        for j in 0..UNIT {
            words[j] = isa.load_u8(&from[j]);
        }
        words
    }
}

/// Codes of a whole panel as they lie in the compute layout, from unit `units` on, with the planes of `STACK`.
struct InPlanes<'a, const STACK: u32> {
    planes: &'a PanelPlanes<'a>,
    units: usize,
}

impl<const STACK: u32> Words for InPlanes<'_, STACK> {
    #[inline(always)]
    fn unit<I: Isa>(&self, isa: I, unit: usize, c: usize) -> [I::U8; UNIT] {
        // In a hurry as a single row is: nothing is multiplied meanwhile.
        let unit = self.planes.unit::<STACK>(self.units + unit, VECTORS);
        unit.words::<I, STACK>(isa, c, ahead(1))
    }
}

/// A block on its way to [`Expanded`], for tiles `C` vectors wide.
struct Widen<'a, W, const C: usize> {
    on: Operands<'a>,
    words: W,
    floats: &'a mut [Lanes],
    scales: &'a mut [Lanes],
    zeros: &'a mut [Lanes],
}

impl<'a, const C: usize> Widen<'a, (), C> {
    /// The same with the block's codes.
    fn of<W: Words>(self, words: W) -> Widen<'a, W, C> {
        let Self { on, floats, scales, zeros, .. } = self;
        Widen { on, words, floats, scales, zeros }
    }
}

impl<W: Words, const C: usize> ProductsKernel for Widen<'_, W, C> {
    type Output = ();

    #[inline(always)]
    fn run<P: Products>(self, by: P) {
        let isa = by.isa();
        let vectors = self.on.vectors;
        for (i, piece) in self.on.pieces().iter().enumerate() {
            for c in 0..vectors {
                let ([scale], [zero]) = self.on.factors::<P::Isa, 1>(isa, piece, c);
                isa.store_i32(&mut self.scales[i * vectors + c], isa.to_bits(scale));
                self.zeros[i * vectors + c] = *zero;
            }
        }
        let to = self.floats.as_chunks_mut::<C>().0;
        let steps = to.len() / vectors * C;
        for (pass, to) in to.chunks_exact_mut(steps.max(1)).enumerate() {
            for (unit, to) in to.chunks_exact_mut(UNIT * P::STEPS).enumerate() {
                for c in 0..C {
                    let words = self.words.unit(isa, unit, pass * C + c);
                    for j in 0..UNIT {
                        for s in 0..P::STEPS {
                            by.store(&mut to[j * P::STEPS + s][c], by.codes(words[j], s));
                        }
                    }
                }
            }
        }
    }
}

/// All rows of x against a block.
struct Tiles<'a> {
    on: Operands<'a>,
    expanded: &'a Expanded,
    rows: Range<usize>,
    /// Where the codes come from, if memory can be asked for ahead.
    planes: Option<&'a PanelPlanes<'a>>,
    sums: &'a mut Sums,
    carried: Option<&'a mut Sums>,
}

impl Tiles<'_> {
    #[inline(always)]
    fn run<P: Products>(mut self, by: P) {
        let (rows, limit) = (self.rows.len(), P::Isa::TILE_ROWS);
        let wide = self.sums.wide(P::Isa::TILE_VECTORS);
        let passes = if wide { 1 } else { self.on.vectors };
        let steps = rows.div_ceil(limit) * passes * self.on.pieces().len();
        let mut ahead = match self.planes {
            Some(planes) => planes.ahead(self.on.block, steps),
            None => Ahead::default(),
        };
        for first in 0..passes {
            for (rows, height) in runs_of_tiles(rows, limit).into_iter().filter(|(rows, _)| !rows.is_empty())
            {
                if wide {
                    self.tiles::<P, VECTORS>(by, rows, height, 0, &mut ahead);
                } else {
                    self.tiles::<P, 1>(by, rows, height, first, &mut ahead);
                }
            }
        }
    }

    /// Tiles of `height` rows and the vectors `first` to `first + C`.
    #[inline(always)]
    fn tiles<P: Products, const C: usize>(
        &mut self,
        by: P,
        sum: Range<usize>,
        height: usize,
        first: usize,
        ahead: &mut Ahead<'_>,
    ) {
        let (on, row, rows) = (self.on, self.rows.start + sum.start, sum);
        let Expanded { floats, scales, zeros, .. } = self.expanded;
        let steps = on.block.units.len() * UNIT * P::STEPS;
        let floats = &floats.lines()[first * steps..][..C * steps];
        let (scales, zeros) = (scales.lines(), zeros.lines());
        let (sums, carried) = (&mut *self.sums, self.carried.as_deref_mut());
        by_height!(height, P::Isa::TILE_ROWS, R => {
            by.vectorize(Tile::<R, C> { on, row, rows, first, floats, scales, zeros, sums, carried, ahead });
        });
    }
}

/// Every `R` rows of some rows of x against the vectors `first` to `first + C`.
struct Tile<'a, 'b, const R: usize, const C: usize> {
    on: Operands<'a>,
    /// The first row within x.
    row: usize,
    /// The rows within the sums.
    rows: Range<usize>,
    first: usize,
    /// See [`Expanded`]; those of the vectors.
    floats: &'a [Lanes],
    scales: &'a [Lanes],
    zeros: &'a [Lanes],
    /// Running results, the bits of f32.
    sums: &'a mut Sums,
    /// Sums of products of segments that began in an earlier block, if any do.
    carried: Option<&'a mut Sums>,
    ahead: &'a mut Ahead<'b>,
}

impl<const R: usize, const C: usize> ProductsKernel for Tile<'_, '_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<P: Products>(mut self, by: P) {
        let (isa, on) = (by.isa(), self.on);
        let (x, pieces, begin) = (on.x.all(), on.pieces(), on.block.words().start);
        let floats = self.floats.as_chunks::<C>().0;
        for (sum, row) in self.rows.step_by(R).zip((self.row..).step_by(R)) {
            let sums = self.sums.tile::<R, C>(sum, self.first);
            let mut carried = self.carried.as_mut().map(|carried| carried.tile::<R, C>(sum, self.first));
            for (i, piece) in pieces.iter().enumerate() {
                let mut dots = [[isa.splat(0.0); C]; R];
                if let Some(carried) = carried.as_deref().filter(|_| !piece.first) {
                    for r in 0..R {
                        for c in 0..C {
                            dots[r][c] = isa.from_bits(isa.load_i32(&carried[r][c]));
                        }
                    }
                }
                self.ahead.fetch(isa);
                let words =
                    x.words::<R>(row, (begin + piece.begin) * P::STEPS..(begin + piece.end) * P::STEPS);
                dots =
                    multiply_steps(by, dots, &floats[piece.begin * P::STEPS..piece.end * P::STEPS], &words);
                if piece.last {
                    let at = i * on.vectors + self.first;
                    let (of_scales, of_zeros) = (&self.scales[at..][..C], &self.zeros[at..][..C]);
                    let (mut scales, mut zeros) = ([isa.splat(0.0); C], [&of_zeros[0]; C]);
                    for c in 0..C {
                        scales[c] = isa.from_bits(isa.load_i32(&of_scales[c]));
                        zeros[c] = &of_zeros[c];
                    }
                    add_brackets(isa, sums, dots, x.factors(row, piece.segment), scales, zeros);
                } else if let Some(carried) = carried.as_deref_mut() {
                    for r in 0..R {
                        for c in 0..C {
                            isa.store_i32(&mut carried[r][c], isa.to_bits(dots[r][c]));
                        }
                    }
                }
            }
        }
    }
}

/// Adds the brackets of a segment to the sums. The loop over rows and vectors must unroll, or the sums of products
/// it reads by index would live in memory: nothing but arithmetic is left in it.
#[inline(always)]
fn add_brackets<I: Isa, const R: usize, const C: usize>(
    isa: I,
    sums: &mut [[Lanes; C]; R],
    dots: [[I::F32; C]; R],
    (scales_x, terms): ([f32; R], [u32; R]),
    scales: [I::F32; C],
    zeros: [&Lanes; C],
) {
    for r in 0..R {
        for c in 0..C {
            let bracket = Affine::bracket::<I, false>(isa, dots[r][c], zeros[c], terms[r]);
            add_bracket(isa, &mut sums[r][c], scales[c], scales_x[r], bracket);
        }
    }
}

/// Adds the products of some steps of `C` vectors with those of `R` rows.
#[inline(always)]
fn multiply_steps<P: Products, const R: usize, const C: usize>(
    by: P,
    mut dots: [[<P::Isa as Isa>::F32; C]; R],
    floats: &[[Lanes; C]],
    x: &[&[[u8; 4]]; R],
) -> [[<P::Isa as Isa>::F32; C]; R] {
    let mut rows: [&[[u8; 4]]; R] = [&[]; R];
    for r in 0..R {
        rows[r] = &x[r][..floats.len()];
    }
    for i in 0..floats.len() {
        let mut codes = [by.load(&floats[i][0]); C];
        for c in 1..C {
            codes[c] = by.load(&floats[i][c]);
        }
        for r in 0..R {
            let x = by.splat(rows[r][i]);
            for c in 0..C {
                dots[r][c] = by.multiply(dots[r][c], codes[c], x);
            }
        }
    }
    dots
}

/// A few rows of x against a whole panel as it lies in memory.
struct Streams<'a> {
    on: Operands<'a>,
    codes: &'a PanelPlanes<'a>,
    rows: Range<usize>,
    sums: &'a mut Sums,
}

impl Streams<'_> {
    #[inline(always)]
    fn run<P: Products>(mut self, by: P) {
        by_stack!(self.codes.stack(), STACK => {
            if const { has_stream::<P>(STACK) } {
                self.stack::<P, STACK>(by);
            }
        });
    }

    #[inline(always)]
    fn stack<P: Products, const STACK: u32>(&mut self, by: P) {
        let mut done = 0;
        while done < self.rows.len() {
            done += match self.rows.len() - done {
                1 => self.rows_of::<P, STACK, 1>(by, done),
                2 | 3 => self.rows_of::<P, STACK, 2>(by, done),
                _ => self.rows_of::<P, STACK, 4>(by, done),
            };
        }
    }

    /// `R` rows from `sum` on; returns their number.
    #[inline(always)]
    fn rows_of<P: Products, const STACK: u32, const R: usize>(&mut self, by: P, sum: usize) -> usize {
        let (on, codes, row, sums) = (self.on, self.codes, self.rows.start + sum, &mut *self.sums);
        by.vectorize(Stream::<R, STACK> { on, row, codes, sum, sums });
        R
    }
}

/// `R` rows of x against all blocks of a whole panel, its codes widened in registers.
struct Stream<'a, const R: usize, const STACK: u32> {
    on: Operands<'a>,
    row: usize,
    codes: &'a PanelPlanes<'a>,
    /// Running results, the bits of f32.
    sums: &'a mut Sums,
    /// The tile's first row within the sums.
    sum: usize,
}

impl<const R: usize, const STACK: u32> ProductsKernel for Stream<'_, R, STACK> {
    type Output = ();

    #[inline(always)]
    fn run<P: Products>(self, by: P) {
        let isa = by.isa();
        let x = self.on.x.all();
        let sums = self.sums.tile::<R, VECTORS>(self.sum, 0);
        let mut dots = [[isa.splat(0.0); VECTORS]; R];
        for block in &self.on.cuts.blocks {
            let on = Operands { block, ..self.on };
            for piece in on.pieces() {
                if piece.first {
                    dots = [[isa.splat(0.0); VECTORS]; R];
                }
                // Whole units: what pads one meets zeros of x.
                for unit in piece.begin / UNIT..piece.end.div_ceil(UNIT) {
                    let unit = block.units.start + unit;
                    let words = x.words::<R>(self.row, unit * UNIT * P::STEPS..(unit + 1) * UNIT * P::STEPS);
                    let unit = self.codes.unit::<STACK>(unit, VECTORS);
                    dots = multiply_unit::<P, R, STACK>(by, dots, &unit, &words);
                }
                if piece.last {
                    let (scales, zeros) = on.factors::<P::Isa, VECTORS>(isa, piece, 0);
                    add_brackets(isa, sums, dots, x.factors(self.row, piece.segment), scales, zeros);
                }
            }
        }
    }
}

/// Adds the products of a unit of a panel.
#[inline(always)]
fn multiply_unit<P: Products, const R: usize, const STACK: u32>(
    by: P,
    mut dots: [[<P::Isa as Isa>::F32; VECTORS]; R],
    unit: &Unit<'_>,
    x: &[&[[u8; 4]]; R],
) -> [[<P::Isa as Isa>::F32; VECTORS]; R] {
    // As many vectors side by side as there are registers: the sums of one hang on each other.
    let wide = P::Isa::TILE_VECTORS == VECTORS;
    let mut first = 0;
    while first < VECTORS {
        first += match R {
            _ if wide => multiply_vectors::<P, R, STACK, VECTORS>(by, &mut dots, unit, x, first),
            1 => multiply_vectors::<P, R, STACK, 2>(by, &mut dots, unit, x, first),
            _ => multiply_vectors::<P, R, STACK, 1>(by, &mut dots, unit, x, first),
        };
    }
    dots
}

/// [`multiply_unit`] for `A` vectors from `first` on; returns `A`.
#[inline(always)]
fn multiply_vectors<P: Products, const R: usize, const STACK: u32, const A: usize>(
    by: P,
    dots: &mut [[<P::Isa as Isa>::F32; VECTORS]; R],
    unit: &Unit<'_>,
    x: &[&[[u8; 4]]; R],
    first: usize,
) -> usize {
    let isa = by.isa();
    let mut sums = [[isa.splat(0.0); A]; R];
    for r in 0..R {
        for c in 0..A {
            sums[r][c] = dots[r][first + c];
        }
    }
    for j in 0..UNIT {
        let mut words = [isa.splat_u8(0); A];
        for c in 0..A {
            words[c] = unit.word::<P::Isa, STACK>(isa, first + c, j, AHEAD);
        }
        for s in 0..P::STEPS {
            let mut codes = [by.codes(words[0], s); A];
            for c in 1..A {
                codes[c] = by.codes(words[c], s);
            }
            for r in 0..R {
                let x = by.splat(x[r][j * P::STEPS + s]);
                for c in 0..A {
                    sums[r][c] = by.multiply(sums[r][c], codes[c], x);
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..A {
            dots[r][first + c] = sums[r][c];
        }
    }
    A
}
