//! The micro-kernels: a few rows of x against a panel of the weight, their sums in registers.
//!
//! ```text
//! for each piece of a segment:
//!   dots = −z·Σq, or 0, or what the block before left          i32, exact; or f32
//!   for each word of four columns:  dots += codes · q
//!   sum  = fma(s_r · s_x, f32(bracket of dots), sum)           at the segment's end
//! ```
//!
//! [`Tile`] reads expanded codes, which many rows of x share; [`Stream`] expands them in registers.

use crate::simd::multiply::{FEW, Multiply, MultiplyKernel};
use crate::simd::{Isa, LANES, VECTORS};

use super::activations::{Activations, Row};
use super::affine::{Affine, Form};
use super::cuts::{Block, Cuts, Piece, UNIT};
use super::panel::{Ahead, Lanes, PanelPlanes, PanelScales, Word, ahead};
use super::sums::Sums;

const _: () = assert!(UNIT <= FEW, "a partial sum takes the products of a unit");

/// What the kernels share: x, and one block of columns of one panel.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub(super) x: &'a Activations,
    pub(super) cuts: &'a Cuts,
    pub(super) block: &'a Block,
    pub(super) affine: &'a Affine,
    /// Vectors of the panel.
    pub(super) vectors: usize,
    pub(super) scales: PanelScales<'a>,
    /// Zero points of the panel: `[group][vector]`, as [`Affine::zero`] has them, or a single vector for all.
    pub(super) zeros: &'a [Lanes],
}

impl Operands<'_> {
    #[inline(always)]
    pub(super) fn pieces(&self) -> &[Piece] {
        &self.cuts.pieces[self.block.pieces.clone()]
    }

    /// `R` rows of x, from `row` on, cut to the block.
    #[inline(always)]
    fn rows<const R: usize>(&self, row: usize) -> [Row<'_>; R] {
        let mut rows = [self.x.row(row); R];
        for r in 0..R {
            rows[r] = self.x.row(row + r);
            rows[r].words = &rows[r].words[self.block.words()];
        }
        rows
    }

    /// Adds a segment's brackets to the sums of `R` rows and the `C` vectors from `first` on.
    #[inline(always)]
    fn add<M: Multiply, const R: usize, const C: usize>(
        &self,
        by: M,
        sums: &mut [[Lanes; C]; R],
        dots: [[M::Sum; C]; R],
        x: &[Row<'_>; R],
        piece: &Piece,
        first: usize,
    ) {
        match self.affine.form {
            Form::Start => self.add_form::<M, R, C, true>(by, sums, dots, x, piece, first),
            Form::Float => self.add_form::<M, R, C, false>(by, sums, dots, x, piece, first),
            Form::Integer => {
                // Row by row, from memory: all at once is too much to unroll, and such segments are long.
                let mut lanes = [[[0; LANES]; C]; R];
                for r in 0..R {
                    for c in 0..C {
                        by.store(&mut lanes[r][c], dots[r][c]);
                    }
                }
                let isa = by.isa();
                let (scales, zeros) = self.factors::<M::Isa, C>(isa, piece, first);
                for (r, (sums, lanes)) in sums.iter_mut().zip(&lanes).enumerate() {
                    let (scale_x, term) = (x[r].scales[piece.segment], x[r].terms[piece.segment]);
                    for c in 0..C {
                        let dots = isa.load_i32(&lanes[c]);
                        let bracket = self.affine.integer_bracket(isa, dots, zeros[c], term);
                        add_bracket(isa, &mut sums[c], scales[c], scale_x, bracket);
                    }
                }
            }
        }
    }

    /// [`Operands::add`] for brackets in the form `START` or [`Form::Float`]. The loop over rows and vectors must
    /// unroll, or the sums of products it reads by index would live in memory: nothing but arithmetic is left in it.
    #[inline(always)]
    fn add_form<M: Multiply, const R: usize, const C: usize, const START: bool>(
        &self,
        by: M,
        sums: &mut [[Lanes; C]; R],
        dots: [[M::Sum; C]; R],
        x: &[Row<'_>; R],
        piece: &Piece,
        first: usize,
    ) {
        let isa = by.isa();
        let (scales, zeros) = self.factors::<M::Isa, C>(isa, piece, first);
        let (mut scales_x, mut terms) = ([0.0; R], [0; R]);
        for r in 0..R {
            (scales_x[r], terms[r]) = (x[r].scales[piece.segment], x[r].terms[piece.segment]);
        }
        for r in 0..R {
            for c in 0..C {
                let sum = by.value(dots[r][c]);
                let bracket = Affine::bracket::<M::Isa, START>(isa, sum, zeros[c], terms[r]);
                add_bracket(isa, &mut sums[r][c], scales[c], scales_x[r], bracket);
            }
        }
    }

    /// The scales and zero points of a piece and the `C` vectors from `first` on.
    #[inline(always)]
    pub(super) fn factors<I: Isa, const C: usize>(
        &self,
        isa: I,
        piece: &Piece,
        first: usize,
    ) -> ([I::F32; C], [&Lanes; C]) {
        let at = piece.group * self.vectors + first;
        let mut zeros = [&self.zeros[0]; C];
        if self.affine.stored {
            for c in 0..C {
                zeros[c] = &self.zeros[at + c];
            }
        }
        let mut scales = self.scales.load::<I, C>(isa, at);
        if self.affine.scale != 1.0 {
            for c in 0..C {
                scales[c] = isa.mul(scales[c], isa.splat(self.affine.scale));
            }
        }
        (scales, zeros)
    }

    /// Adds a segment's brackets to the sums of the rows from `row` on, or begins these with the first segment's: for
    /// x in tiles, from products that began at 0 and lie in memory, those of a pair of vectors. The panel may have
    /// but one of them, or none.
    #[inline(always)]
    pub(super) fn add_strip<I: Isa>(
        &self,
        isa: I,
        sums: &mut [[Lanes; VECTORS]],
        products: &[[Lanes; VECTORS]],
        row: usize,
        piece: &Piece,
        pair: usize,
    ) {
        match self.vectors.saturating_sub(2 * pair) {
            0 => {}
            1 => self.add_columns::<I, 1>(isa, sums, products, row, piece, 2 * pair),
            _ => self.add_columns::<I, 2>(isa, sums, products, row, piece, 2 * pair),
        }
    }

    /// [`Operands::add_strip`] for the `C` vectors from `first` on.
    #[inline(always)]
    fn add_columns<I: Isa, const C: usize>(
        &self,
        isa: I,
        sums: &mut [[Lanes; VECTORS]],
        products: &[[Lanes; VECTORS]],
        row: usize,
        piece: &Piece,
        first: usize,
    ) {
        match self.affine.form {
            Form::Start => {
                self.add_form_of_strip::<I, C>(isa, sums, products, row, piece, first, |dots, zero, term| {
                    let dots = isa.add_i32(dots, isa.splat_i32(term.cast_signed()));
                    Affine::bracket::<I, true>(isa, isa.to_f32(dots), zero, term)
                })
            }
            Form::Float => {
                self.add_form_of_strip::<I, C>(isa, sums, products, row, piece, first, |dots, zero, term| {
                    Affine::bracket::<I, false>(isa, isa.to_f32(dots), zero, term)
                })
            }
            Form::Integer => {
                self.add_form_of_strip::<I, C>(isa, sums, products, row, piece, first, |dots, zero, term| {
                    self.affine.integer_bracket(isa, dots, zero, term)
                })
            }
        }
    }

    /// [`Operands::add_columns`] with the bracket of one form.
    #[inline(always)]
    fn add_form_of_strip<I: Isa, const C: usize>(
        &self,
        isa: I,
        sums: &mut [[Lanes; VECTORS]],
        products: &[[Lanes; VECTORS]],
        row: usize,
        piece: &Piece,
        first: usize,
        bracket: impl Fn(I::I32, &Lanes, u32) -> I::F32,
    ) {
        let (scales, zeros) = self.factors::<I, C>(isa, piece, first);
        let begins = piece.segment == 0;
        let tiles = sums.chunks_mut(LANES).zip(products.chunks(LANES));
        for (row, (sums, products)) in (row..).step_by(LANES).zip(tiles) {
            let (terms, scales_x) = self.x.factors(row, piece.segment);
            for (r, (sums, products)) in sums.iter_mut().zip(products).enumerate() {
                for c in 0..C {
                    let bracket = bracket(isa.load_i32(&products[first + c]), zeros[c], terms[r]);
                    let sum = &mut sums[first + c];
                    let before = if begins { isa.splat(0.0) } else { isa.from_bits(isa.load_i32(sum)) };
                    let added = with_bracket(isa, before, scales[c], scales_x[r], bracket);
                    isa.store_i32(sum, isa.to_bits(added));
                }
            }
        }
    }

    /// The sums of products with which a piece begins.
    #[inline(always)]
    fn begin<M: Multiply, const R: usize, const C: usize>(
        &self,
        by: M,
        x: &[Row<'_>; R],
        piece: &Piece,
        carried: Option<&mut [[Lanes; C]; R]>,
    ) -> [[M::Sum; C]; R] {
        let mut dots = [[by.splat(0); C]; R];
        if let Some(carried) = carried.filter(|_| !piece.first) {
            for r in 0..R {
                for c in 0..C {
                    dots[r][c] = by.load(&carried[r][c]);
                }
            }
        } else if self.affine.form == Form::Start {
            for r in 0..R {
                dots[r] = [by.splat(x[r].terms[piece.segment]); C];
            }
        }
        dots
    }

    /// What becomes of the sums of products where a piece ends: results, or a sum to carry on.
    #[inline(always)]
    fn end<M: Multiply, const R: usize, const C: usize>(
        &self,
        by: M,
        dots: [[M::Sum; C]; R],
        x: &[Row<'_>; R],
        piece: &Piece,
        first: usize,
        sums: &mut [[Lanes; C]; R],
        carried: Option<&mut [[Lanes; C]; R]>,
    ) {
        if piece.last {
            self.add(by, sums, dots, x, piece, first);
        } else if let Some(carried) = carried {
            for r in 0..R {
                for c in 0..C {
                    by.store(&mut carried[r][c], dots[r][c]);
                }
            }
        }
    }
}

/// sum = fma(s_r · s_x, bracket, sum)
#[inline(always)]
pub(super) fn add_bracket<I: Isa>(isa: I, sum: &mut Lanes, scale: I::F32, scale_x: f32, bracket: I::F32) {
    let added = with_bracket(isa, isa.from_bits(isa.load_i32(sum)), scale, scale_x, bracket);
    isa.store_i32(sum, isa.to_bits(added));
}

/// fma(s_r · s_x, bracket, sum)
#[inline(always)]
fn with_bracket<I: Isa>(isa: I, sum: I::F32, scale: I::F32, scale_x: f32, bracket: I::F32) -> I::F32 {
    isa.mul_add(isa.mul(scale, isa.splat(scale_x)), bracket, sum)
}

/// `R` rows of x against the vectors `first` to `first + C` of expanded codes.
pub(super) struct Tile<'a, 'b, const R: usize, const C: usize> {
    pub(super) on: Operands<'a>,
    pub(super) row: usize,
    pub(super) first: usize,
    /// The block: `[unit][vector][word]`.
    pub(super) codes: &'a [Word],
    /// Running results, the bits of f32.
    pub(super) sums: &'a mut Sums,
    /// Sums of products of segments that began in an earlier block, if any do.
    pub(super) carried: Option<&'a mut Sums>,
    /// The tile's first row within the sums.
    pub(super) sum: usize,
    pub(super) ahead: &'a mut Ahead<'b>,
}

impl<const R: usize, const C: usize> MultiplyKernel for Tile<'_, '_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<M: Multiply>(self, by: M) {
        let isa = by.isa();
        let on = self.on;
        let x = on.rows::<R>(self.row);
        let sums = self.sums.tile::<R, C>(self.sum, self.first);
        let mut carried = self.carried.map(|carried| carried.tile::<R, C>(self.sum, self.first));
        for piece in on.pieces() {
            let mut dots = on.begin(by, &x, piece, carried.as_deref_mut());
            let mut word = piece.begin;
            while word < piece.end {
                let len = (UNIT - word % UNIT).min(piece.end - word);
                self.ahead.fetch(isa);
                let from = (word / UNIT * on.vectors + self.first) * UNIT + word % UNIT;
                dots = multiply_words(by, dots, &self.codes[from..], &x, word, len);
                word += len;
            }
            on.end(by, dots, &x, piece, self.first, sums, carried.as_deref_mut());
        }
    }
}

/// Adds the products of `len` words, at most a unit, of `C` vectors with as many of `R` rows.
#[inline(always)]
fn multiply_words<M: Multiply, const R: usize, const C: usize>(
    by: M,
    mut dots: [[M::Sum; C]; R],
    codes: &[Word],
    x: &[Row<'_>; R],
    word: usize,
    len: usize,
) -> [[M::Sum; C]; R] {
    let mut vectors: [&[Word]; C] = [&[]; C];
    for c in 0..C {
        vectors[c] = &codes[c * UNIT..][..len];
    }
    let mut q: [&[[u8; 4]]; R] = [&[]; R];
    for r in 0..R {
        q[r] = &x[r].words[word..][..len];
    }
    if M::ABREAST {
        return multiply_abreast(by, dots, &vectors, &q, len);
    }
    for c in 0..C {
        let mut column = [[by.splat(0)]; R];
        for r in 0..R {
            column[r] = [dots[r][c]];
        }
        column = multiply_abreast(by, column, &[vectors[c]], &q, len);
        for r in 0..R {
            dots[r][c] = column[r][0];
        }
    }
    dots
}

/// [`multiply_words`] with all vectors side by side, in one partial sum each.
#[inline(always)]
fn multiply_abreast<M: Multiply, const R: usize, const C: usize>(
    by: M,
    mut dots: [[M::Sum; C]; R],
    vectors: &[&[Word]; C],
    q: &[&[[u8; 4]]; R],
    len: usize,
) -> [[M::Sum; C]; R] {
    let mut partials = [[by.begin(by.splat(0)); C]; R];
    for r in 0..R {
        for c in 0..C {
            partials[r][c] = by.begin(dots[r][c]);
        }
    }
    // Unrolled only where there is room: the compiler loads ahead, and spills what it has no register for.
    if len == UNIT && M::ABREAST {
        for j in 0..UNIT {
            partials = multiply_word(by, partials, vectors, q, j);
        }
    } else {
        for j in 0..len {
            partials = multiply_word(by, partials, vectors, q, j);
        }
    }
    for r in 0..R {
        for c in 0..C {
            dots[r][c] = by.end(dots[r][c], partials[r][c]);
        }
    }
    dots
}

/// Word `j` of [`multiply_abreast`].
#[inline(always)]
fn multiply_word<M: Multiply, const R: usize, const C: usize>(
    by: M,
    mut partials: [[M::Partial; C]; R],
    vectors: &[&[Word]; C],
    q: &[&[[u8; 4]]; R],
    j: usize,
) -> [[M::Partial; C]; R] {
    let isa = by.isa();
    for c in 0..C {
        let codes = by.codes(isa.load_u8(&vectors[c][j]));
        for r in 0..R {
            partials[r][c] = by.multiply(partials[r][c], codes, q[r][j]);
        }
    }
    partials
}

/// `R` rows of x against a whole panel, its codes expanded in registers: for few rows, which
/// would not pay for writing the expanded codes down.
pub(super) struct Stream<'a, const R: usize, const STACK: u32> {
    pub(super) on: Operands<'a>,
    pub(super) row: usize,
    pub(super) codes: &'a PanelPlanes<'a>,
    /// Running results, the bits of f32.
    pub(super) sums: &'a mut Sums,
    /// Sums of products of segments that began in an earlier block, if any do.
    pub(super) carried: Option<&'a mut Sums>,
    /// The tile's first row within the sums.
    pub(super) sum: usize,
}

impl<const R: usize, const STACK: u32> MultiplyKernel for Stream<'_, R, STACK> {
    type Output = ();

    #[inline(always)]
    fn run<M: Multiply>(self, by: M) {
        let isa = by.isa();
        let on = self.on;
        let x = on.rows::<R>(self.row);
        let sums = self.sums.tile::<R, VECTORS>(self.sum, 0);
        let mut carried = self.carried.map(|carried| carried.tile::<R, VECTORS>(self.sum, 0));
        for piece in on.pieces() {
            let mut dots = on.begin(by, &x, piece, carried.as_deref_mut());
            // Whole units: what pads one meets zeros of x.
            for number in piece.begin / UNIT..piece.end.div_ceil(UNIT) {
                let unit = self.codes.unit::<STACK>(on.block.units.start + number, VECTORS);
                let mut q: [&[[u8; 4]]; R] = [&[]; R];
                for r in 0..R {
                    q[r] = &x[r].words[number * UNIT..][..UNIT];
                }
                for c in 0..VECTORS {
                    let words = unit.words::<M::Isa, STACK>(isa, c, ahead(R));
                    // Taken out of their array: in it, found by a count, they would be stored after every word.
                    let mut column = [by.splat(0); R];
                    let mut partials = [by.begin(by.splat(0)); R];
                    for r in 0..R {
                        column[r] = dots[r][c];
                        partials[r] = by.begin(column[r]);
                    }
                    for j in 0..UNIT {
                        let codes = by.codes(words[j]);
                        for r in 0..R {
                            partials[r] = by.multiply(partials[r], codes, q[r][j]);
                        }
                    }
                    for r in 0..R {
                        dots[r][c] = by.end(column[r], partials[r]);
                    }
                }
            }
            on.end(by, dots, &x, piece, 0, sums, carried.as_deref_mut());
        }
    }
}
