//! Random bits in the order the elements come in.

use super::BATCH;
use crate::philox::{Generator, Purpose};
use crate::scheme::{FULL_RANDOMNESS, Mode, Rounding};
use crate::simd::{Aligned, Isa, Kernel, LANES, TILE, array, four};

/// Words of a window of draws: those of a batch, wherever it begins in a tile.
const WINDOW: usize = BATCH + 4 * TILE;

/// Blocks whose words are kept: those of a batch, wherever they begin in a tile.
const BLOCKS: usize = BATCH / STRATUM + 2 * TILE;

/// Elements of a stratified block.
pub(super) const STRATUM: usize = 8;

/// `draw` of `bits` random bits with its distance from ½ multiplied by ρ = `shrink` · 2^−16.
fn shrunk(draw: u32, bits: u32, shrink: u32) -> u32 {
    let half = 1i64 << (bits - 1);
    (half + ((i64::from(shrink) * (i64::from(draw) - half)) >> 16)) as u32
}

/// The draws of consecutive elements, generated a window at a time.
pub(super) struct Draws {
    generator: Generator,
    purpose: Purpose,
    mode: Mode,
    wide: bool,
    shrink: u32,
    /// Words are kept as they are, two draws in each, and taken apart on the way out.
    paired: bool,
    /// Logical index of the first draw in `window`.
    begin: u64,
    /// Logical index behind the last draw in `window`.
    end: u64,
    window: Aligned<[u32; WINDOW]>,
}

impl Draws {
    /// Draws of 32 bits for noise, addressed as `rounding` says.
    pub(super) fn of_noise(rounding: &Rounding) -> Self {
        let purpose = Purpose::Noise;
        Self {
            purpose,
            mode: Mode::Iid,
            wide: true,
            shrink: FULL_RANDOMNESS,
            paired: false,
            ..Self::new(rounding, false)
        }
    }

    /// Draws for rounding. `aligned`: every tile asked for begins at a multiple of 64.
    pub(super) fn new(rounding: &Rounding, aligned: bool) -> Self {
        let wide = rounding.draw_bits() == 32;
        let altered = rounding.shrink() != FULL_RANDOMNESS;
        Self {
            generator: Generator::new(rounding),
            purpose: Purpose::Element,
            mode: rounding.mode(),
            wide,
            shrink: rounding.shrink(),
            paired: aligned && !wide && !altered,
            begin: 0,
            end: 0,
            window: Aligned([0; WINDOW]),
        }
    }

    /// Random bits a draw.
    fn bits(&self) -> u32 {
        if self.wide { 32 } else { 16 }
    }

    /// Whether [`Draws::paired_tile`] may be used.
    pub(super) fn is_paired(&self) -> bool {
        self.paired
    }

    /// Makes the draws of the `len` elements from `index` on ready, at most a batch.
    #[inline(always)]
    pub(super) fn cover<I: Isa>(&mut self, isa: I, index: u64, len: usize) {
        if !self.covers(index, len) {
            isa.vectorize(Refill { draws: self, index, len });
        }
    }

    /// Whether the draws of those elements are ready.
    #[inline(always)]
    pub(super) fn covers(&self, index: u64, len: usize) -> bool {
        self.begin <= index && index + len as u64 <= self.end
    }

    /// The draws of 64 elements from `index` on, all covered that matter.
    #[inline(always)]
    pub(super) fn tile<I: Isa>(&self, isa: I, index: u64) -> [I::I32; 4] {
        if self.paired {
            return self.paired_tile(isa, index);
        }
        self.words(isa, (index - self.begin) as usize)
    }

    /// [`Draws::tile`] where words are kept as they are.
    #[inline(always)]
    pub(super) fn paired_tile<I: Isa>(&self, isa: I, index: u64) -> [I::I32; 4] {
        let at = (index - self.begin) as usize;
        let words = self.words(isa, at / (2 * TILE) * TILE);
        if at.is_multiple_of(2 * TILE) {
            four!(j => isa.and(words[j], isa.splat_i32(0xffff)))
        } else {
            four!(j => isa.shr::<16>(words[j]))
        }
    }

    /// 64 words of the window.
    #[inline(always)]
    fn words<I: Isa>(&self, isa: I, at: usize) -> [I::I32; 4] {
        let (vectors, _) = self.window.0[at..at + TILE].as_chunks::<LANES>();
        four!(j => isa.load_i32(&vectors[j]))
    }

    #[inline(always)]
    fn refill<I: Isa>(&mut self, isa: I, index: u64, len: usize) {
        let elements = if self.wide { TILE } else { 2 * TILE };
        let words = if self.paired { TILE } else { elements };
        let first = index / elements as u64;
        self.begin = first * elements as u64;
        let needed = ((index - self.begin) as usize + len).div_ceil(elements);
        self.end = self.begin + (needed * elements) as u64;
        let split = !self.wide && !self.paired;
        let (generator, pairs) = (self.generator, self.window.0.chunks_exact_mut(2 * words));
        for (i, pair) in pairs.take(needed.div_ceil(2)).enumerate() {
            let tile = first + 2 * i as u64;
            let (even, odd) = pair.split_at_mut(words);
            if I::TWO_TILES {
                let [a, b] = generator.tiles(isa, self.purpose, [tile, tile + 1]);
                keep(isa, even, a, split);
                keep(isa, odd, b, split);
            } else {
                keep(isa, even, generator.tile(isa, self.purpose, tile), split);
                keep(isa, odd, generator.tile(isa, self.purpose, tile + 1), split);
            }
        }
        if self.mode == Mode::Antithetic {
            self.pair(isa, needed * words);
        }
        // Stratification replaces high bits of the draw: its shrinking comes after that.
        if self.shrink != FULL_RANDOMNESS && self.mode != Mode::Stratified {
            let bits = self.bits();
            let draws = self.window.0.iter_mut().take(needed * words);
            draws.for_each(|draw| *draw = shrunk(*draw, bits, self.shrink));
        }
    }

    /// Gives odd elements the complement of their even neighbour's draw.
    #[inline(always)]
    fn pair<I: Isa>(&mut self, isa: I, words: usize) {
        let ones = if self.paired { u32::MAX } else { u32::MAX >> (32 - self.bits()) };
        let odd = isa.load_i32(&array(|i| if i % 2 == 1 { ones } else { 0 }));
        let (vectors, _) = self.window.0.as_chunks_mut::<LANES>();
        for vector in vectors.iter_mut().take(words / LANES) {
            let draw = isa.load_i32(vector);
            isa.store_i32(vector, isa.xor(isa.repeat_even(draw), odd));
        }
    }

    /// Like [`Draws::tile`], with one draw in every eighth of each block of 8.
    ///
    /// `block` is the number of the first of the eight blocks.
    #[inline(always)]
    pub(super) fn stratified<I: Isa>(
        &self,
        isa: I,
        index: u64,
        blocks: &BlockDraws,
        block: u64,
    ) -> [I::I32; 4] {
        let bits = self.bits();
        let iid = self.tile(isa, index);
        let mut strata = [0u32; TILE];
        for (i, block_strata) in strata.chunks_exact_mut(STRATUM).enumerate() {
            let order = permutation(blocks.get(block + i as u64));
            for (to, stratum) in block_strata.iter_mut().zip(order) {
                *to = stratum << (bits - 3);
            }
        }
        let (vectors, _) = strata.as_chunks_mut::<LANES>();
        for (vector, draw) in vectors.iter_mut().zip(iid) {
            let draw = isa.or(isa.load_i32(vector), isa.shr::<3>(draw));
            isa.store_i32(vector, draw);
        }
        if self.shrink != FULL_RANDOMNESS {
            strata.iter_mut().for_each(|draw| *draw = shrunk(*draw, bits, self.shrink));
        }
        let (vectors, _) = strata.as_chunks::<LANES>();
        four!(j => isa.load_i32(&vectors[j]))
    }
}

/// Stores the words of a tile, or, if they are to be `split`, their low halves and then their high halves.
#[inline(always)]
fn keep<I: Isa>(isa: I, to: &mut [u32], words: [I::I32; 4], split: bool) {
    let (vectors, _) = to.as_chunks_mut::<LANES>();
    for j in 0..4 {
        if split {
            isa.store_i32(&mut vectors[j], isa.and(words[j], isa.splat_i32(0xffff)));
            isa.store_i32(&mut vectors[j + 4], isa.shr::<16>(words[j]));
        } else {
            isa.store_i32(&mut vectors[j], words[j]);
        }
    }
}

/// Moves the window to the tiles that hold the elements from `index` on.
struct Refill<'a> {
    draws: &'a mut Draws,
    index: u64,
    len: usize,
}

impl Kernel for Refill<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        self.draws.refill(isa, self.index, self.len);
    }
}

/// The permutation of 0…7 that a random word picks (Fisher and Yates, with the word as a fraction).
#[inline(always)]
fn permutation(word: u32) -> [u32; STRATUM] {
    let mut order: [u32; STRATUM] = array(|i| i as u32);
    let mut fraction = u64::from(word);
    for i in (1..STRATUM).rev() {
        let scaled = fraction * (i as u64 + 1);
        order.swap(i, (scaled >> 32) as usize);
        fraction = scaled & 0xffff_ffff;
    }
    order
}

/// One random word a block.
pub(super) struct BlockDraws {
    generator: Generator,
    shrink: u32,
    /// Number of the first block in `words`.
    begin: u64,
    /// Number behind the last block in `words`.
    end: u64,
    words: [u32; BLOCKS],
}

impl BlockDraws {
    pub(super) fn new(rounding: &Rounding) -> Self {
        let generator = Generator::new(rounding);
        Self { generator, shrink: rounding.shrink(), begin: 0, end: 0, words: [0; BLOCKS] }
    }

    /// Makes the words of the `count` blocks from `block` on ready, at most those of a batch.
    #[inline(always)]
    pub(super) fn cover<I: Isa>(&mut self, isa: I, block: u64, count: usize) {
        if block < self.begin || block + count as u64 > self.end {
            isa.vectorize(RefillBlocks { draws: self, block, count });
        }
    }

    /// The word of a covered block.
    ///
    /// A tile of strata may reach beyond the last block: what it draws there is of no element.
    #[inline(always)]
    fn get(&self, block: u64) -> u32 {
        self.words.get((block - self.begin) as usize).copied().unwrap_or(0)
    }

    /// The phase of a systematic block: 24 random bits, shrunk like a draw.
    #[inline(always)]
    pub(super) fn phase(&self, block: u64) -> u32 {
        shrunk(self.get(block) >> 8, 24, self.shrink)
    }
}

/// Moves the words to the tiles of 64 that hold the blocks from `block` on.
struct RefillBlocks<'a> {
    draws: &'a mut BlockDraws,
    block: u64,
    count: usize,
}

impl Kernel for RefillBlocks<'_> {
    type Output = ();

    /// Block `b` takes word `b mod 4` of counter `b div 4`.
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let BlockDraws { generator, begin, end, words, .. } = self.draws;
        let first = self.block / TILE as u64;
        *begin = first * TILE as u64;
        let needed = ((self.block - *begin) as usize + self.count).div_ceil(TILE);
        *end = *begin + (needed * TILE) as u64;
        for (i, to) in words.chunks_exact_mut(TILE).take(needed).enumerate() {
            let words = generator.tile(isa, Purpose::Block, first + i as u64);
            for w in 0..4 {
                let mut lanes = [0; LANES];
                isa.store_i32(&mut lanes, words[w]);
                for j in 0..LANES {
                    to[4 * j + w] = lanes[j];
                }
            }
        }
    }
}
