//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random bits as a
//! function of a key and a counter. No state, so a code depends on the seed, the stream, the step and the
//! element's index, and on nothing else.

use crate::scheme::Rounding;
use crate::simd::{Isa, LANES, array};

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

/// Product in halves: (high, low).
#[inline(always)]
fn mul_wide(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

/// One round.
#[inline(always)]
fn round(c: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (high0, low0) = mul_wide(MULTIPLIERS[0], c[0]);
    let (high1, low1) = mul_wide(MULTIPLIERS[1], c[2]);
    [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
}

/// The key of round `i`.
#[inline(always)]
fn round_key(key: [u32; 2], i: u32) -> [u32; 2] {
    [key[0].wrapping_add(WEYL[0].wrapping_mul(i)), key[1].wrapping_add(WEYL[1].wrapping_mul(i))]
}

/// The four random words of a counter under a key.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    (0..ROUNDS).fold(counter, |c, i| round(c, round_key(key, i)))
}

/// What a random word is for: part of its counter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    /// Rounding draws of single elements.
    Element = 0,
    /// One draw a block.
    Block = 1,
    /// Noise, one draw an element.
    Noise = 2,
}

/// The generator of one tensor: key, stream and step fixed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Generator {
    /// The keys of all rounds.
    keys: [[u32; 2]; ROUNDS as usize],
    stream: u32,
    step: u32,
}

impl Generator {
    pub(crate) fn new(rounding: &Rounding) -> Self {
        let seed = rounding.seed();
        let key = [seed as u32, (seed >> 32) as u32];
        let keys = array(|i| round_key(key, i as u32));
        Self { keys, stream: rounding.stream(), step: rounding.step() }
    }

    /// Counter number `n` of a purpose.
    pub(crate) fn counter(&self, purpose: Purpose, n: u64) -> [u32; 4] {
        [n as u32, (n >> 32) as u32 | (purpose as u32) << 24, self.stream, self.step]
    }

    /// Words 0 to 3 of the 16 counters from `16 · tile` on: lane `j` of word `w` is word `w` of counter `j`.
    #[inline(always)]
    pub(crate) fn tile<I: Isa>(&self, isa: I, purpose: Purpose, tile: u64) -> [I::I32; 4] {
        let [words] = self.tiles(isa, purpose, [tile]);
        words
    }

    /// Several tiles at once: their rounds fill each other's waiting times.
    ///
    /// The lanes differ in the first counter word alone, and not in the product of the third one in round 1
    /// nor in that of the first one in round 2: those two are computed once for all lanes.
    #[inline(always)]
    pub(crate) fn tiles<I: Isa, const N: usize>(
        &self,
        isa: I,
        purpose: Purpose,
        tiles: [u64; N],
    ) -> [[I::I32; 4]; N] {
        let lanes = isa.load_i32(&array(|j| j as u32));
        let mut c = [[isa.wide_splat(0); 4]; N];
        for t in 0..N {
            let [n, c1, c2, c3] = self.counter(purpose, tiles[t] * LANES as u64);
            let counter = isa.wide(isa.add_i32(isa.splat_i32(n as i32), lanes));

            let [k0, k1] = self.keys[0];
            let (high1, low1) = mul_wide(MULTIPLIERS[1], c2);
            let product = isa.wide_mul(counter, MULTIPLIERS[0]);
            let a2 = isa.wide_xor3(isa.wide_high(product), isa.wide_splat(c3), isa.wide_splat(k1));
            let (a0, a1, a3) = (high1 ^ c1 ^ k0, low1, product);

            let [k0, k1] = self.keys[1];
            let (high0, low0) = mul_wide(MULTIPLIERS[0], a0);
            let product = isa.wide_mul(a2, MULTIPLIERS[1]);
            c[t] = [
                isa.wide_xor3(isa.wide_high(product), isa.wide_splat(a1), isa.wide_splat(k0)),
                product,
                isa.wide_xor3(isa.wide_splat(high0), a3, isa.wide_splat(k1)),
                isa.wide_splat(low0),
            ];
        }
        let [rounds @ .., [k0, k1]] = &self.keys;
        let last = (isa.splat_i32(*k0 as i32), isa.splat_i32(*k1 as i32));
        for [k0, k1] in &rounds[2..] {
            let (k0, k1) = (isa.wide_splat(*k0), isa.wide_splat(*k1));
            for t in 0..N {
                let low0 = isa.wide_mul(c[t][0], MULTIPLIERS[0]);
                let low1 = isa.wide_mul(c[t][2], MULTIPLIERS[1]);
                c[t] = [
                    isa.wide_xor3(isa.wide_high(low1), c[t][1], k0),
                    low1,
                    isa.wide_xor3(isa.wide_high(low0), c[t][3], k1),
                    low0,
                ];
            }
        }
        // The words of the last round are narrow before they are combined.
        let mut words = [[lanes; 4]; N];
        for t in 0..N {
            let low0 = isa.wide_mul(c[t][0], MULTIPLIERS[0]);
            let low1 = isa.wide_mul(c[t][2], MULTIPLIERS[1]);
            let (c1, c3) = (isa.narrow_wide(c[t][1]), isa.narrow_wide(c[t][3]));
            words[t] = [
                isa.xor(isa.xor(isa.narrow_wide_high(low1), c1), last.0),
                isa.narrow_wide(low1),
                isa.xor(isa.xor(isa.narrow_wide_high(low0), c3), last.1),
                isa.narrow_wide(low0),
            ];
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::Mode;
    use crate::simd::{Kernel, Token};

    #[test]
    fn known_answers_of_random123() {
        let all = u32::MAX;
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, answer) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([all; 4], [all; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox(counter, key), answer);
        }
    }

    struct Tile {
        generator: Generator,
        tile: u64,
    }

    impl Kernel for Tile {
        type Output = [[u32; 16]; 4];

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> Self::Output {
            self.generator.tile(isa, Purpose::Block, self.tile).map(|word| {
                let mut lanes = [0; 16];
                isa.store_i32(&mut lanes, word);
                lanes
            })
        }
    }

    #[test]
    fn a_tile_is_sixteen_counters_on_every_isa() {
        let rounding =
            Rounding::new(Mode::Iid, 0x299f_31d0_a409_3822, 77, 0xdead_beef, 16, 1.0, false, 0).unwrap();
        let generator = Generator::new(&rounding);
        for isa in Token::available() {
            for tile in [0, 1, (1 << 28) - 1, 1 << 28, (1 << 52) - 1] {
                let words = isa.run(Tile { generator, tile });
                for lane in 0..16 {
                    let counter = generator.counter(Purpose::Block, 16 * tile + lane as u64);
                    let expected = philox(counter, generator.keys[0]);
                    assert_eq!(words.map(|word| word[lane]), expected, "{} {tile} {lane}", isa.name());
                }
            }
        }
    }
}
