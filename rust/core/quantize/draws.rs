//! Random bits in the order the elements come in.

use crate::philox::{Generator, Purpose};
use crate::scheme::{FULL_RANDOMNESS, Mode, Rounding};
use crate::simd::{Isa, Kernel, LANES, TILE, array, four};

/// Elements drawn at once. Fits L1 beside the codes.
const WINDOW: usize = 1024;

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
    mode: Mode,
    wide: bool,
    shrink: u32,
    /// Logical index of the first draw in `window`.
    begin: u64,
    /// Logical index behind the last draw in `window`.
    end: u64,
    /// Nothing is needed from here on.
    limit: u64,
    window: [u32; WINDOW],
}

impl Draws {
    /// Draws for elements whose logical index is below `limit`.
    pub(super) fn new(rounding: &Rounding, limit: u64) -> Self {
        Self {
            generator: Generator::new(rounding),
            mode: rounding.mode(),
            wide: rounding.draw_bits() == 32,
            shrink: rounding.shrink(),
            begin: 0,
            end: 0,
            limit,
            window: [0; WINDOW],
        }
    }

    /// Random bits a draw.
    fn bits(&self) -> u32 {
        if self.wide { 32 } else { 16 }
    }

    /// The draws of 64 elements from `index` on; those at or above the limit are unspecified.
    #[inline(always)]
    pub(super) fn tile<I: Isa>(&mut self, isa: I, index: u64) -> [I::I32; 4] {
        if index < self.begin || index + TILE as u64 > self.end {
            isa.vectorize(Refill { draws: self, index });
        }
        let at = (index - self.begin) as usize;
        let (vectors, _) = self.window[at..at + TILE].as_chunks::<LANES>();
        four!(j => isa.load_i32(&vectors[j]))
    }

    #[inline(always)]
    fn refill<I: Isa>(&mut self, isa: I, index: u64) {
        let elements = if self.wide { TILE } else { 2 * TILE };
        let first = index / elements as u64;
        self.begin = first * elements as u64;
        self.end = self.begin + WINDOW as u64;
        let needed = self.limit.saturating_sub(self.begin).div_ceil(elements as u64) as usize;
        for (i, tile) in self.window.chunks_exact_mut(elements).take(needed).enumerate() {
            let words = self.generator.tile(isa, Purpose::Element, first + i as u64);
            let (vectors, _) = tile.as_chunks_mut::<LANES>();
            for (j, word) in words.into_iter().enumerate() {
                if self.wide {
                    isa.store_i32(&mut vectors[j], word);
                } else {
                    isa.store_i32(&mut vectors[j], isa.and(word, isa.splat_i32(0xffff)));
                    isa.store_i32(&mut vectors[j + 4], isa.shr::<16>(word));
                }
            }
        }
        if self.mode == Mode::Antithetic {
            self.pair(isa);
        }
        // Stratification replaces high bits of the draw: its shrinking comes after that.
        if self.shrink != FULL_RANDOMNESS && self.mode != Mode::Stratified {
            let bits = self.bits();
            self.window.iter_mut().for_each(|draw| *draw = shrunk(*draw, bits, self.shrink));
        }
    }

    /// Gives odd elements the complement of their even neighbour's draw.
    #[inline(always)]
    fn pair<I: Isa>(&mut self, isa: I) {
        let ones = u32::MAX >> (32 - self.bits());
        let odd = isa.load_i32(&array(|i| if i % 2 == 1 { ones } else { 0 }));
        let (vectors, _) = self.window.as_chunks_mut::<LANES>();
        for vector in vectors {
            let draw = isa.load_i32(vector);
            isa.store_i32(vector, isa.xor(isa.repeat_even(draw), odd));
        }
    }

    /// Like [`Draws::tile`], with one draw in every eighth of each block of 8.
    ///
    /// `block` is the number of the first of the eight blocks.
    #[inline(always)]
    pub(super) fn stratified<I: Isa>(
        &mut self,
        isa: I,
        index: u64,
        blocks: &mut BlockDraws,
        block: u64,
    ) -> [I::I32; 4] {
        let bits = self.bits();
        let iid = self.tile(isa, index);
        let mut strata = [0u32; TILE];
        for (i, block_strata) in strata.chunks_exact_mut(STRATUM).enumerate() {
            let order = permutation(blocks.get(isa, block + i as u64));
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

/// Moves the window to the tile of random bits that holds `index`.
struct Refill<'a> {
    draws: &'a mut Draws,
    index: u64,
}

impl Kernel for Refill<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        self.draws.refill(isa, self.index);
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
    /// Which 64 blocks `words` belongs to.
    tile: Option<u64>,
    words: [[u32; LANES]; 4],
}

impl BlockDraws {
    pub(super) fn new(rounding: &Rounding) -> Self {
        let generator = Generator::new(rounding);
        Self { generator, shrink: rounding.shrink(), tile: None, words: [[0; LANES]; 4] }
    }

    /// The word of a block: word `block mod 4` of counter `block div 4`.
    #[inline(always)]
    pub(super) fn get<I: Isa>(&mut self, isa: I, block: u64) -> u32 {
        let tile = block / TILE as u64;
        if self.tile != Some(tile) {
            isa.vectorize(RefillBlocks { draws: self, tile });
        }
        self.words[(block % 4) as usize][(block / 4) as usize % LANES]
    }

    /// The phase of a systematic block: 24 random bits, shrunk like a draw.
    #[inline(always)]
    pub(super) fn phase<I: Isa>(&mut self, isa: I, block: u64) -> u32 {
        shrunk(self.get(isa, block) >> 8, 24, self.shrink)
    }
}

/// Moves the words to a tile of 64 blocks.
struct RefillBlocks<'a> {
    draws: &'a mut BlockDraws,
    tile: u64,
}

impl Kernel for RefillBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let words = self.draws.generator.tile(isa, Purpose::Block, self.tile);
        for (to, word) in self.draws.words.iter_mut().zip(words) {
            isa.store_i32(to, word);
        }
        self.draws.tile = Some(self.tile);
    }
}
