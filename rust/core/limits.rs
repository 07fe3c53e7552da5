//! The machine's own limits: how fast memory streams when nothing is computed, and how fast it multiplies when
//! nothing is loaded. Timing is the caller's.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::matmul::Activations;
use crate::parallel;
use crate::simd::amx::{Order, ROWS};
use crate::simd::floats::{Products, ProductsKernel, dispatch_products, prefers_bf16};
use crate::simd::multiply::{Multiply, MultiplyKernel, dispatch_bytes};
use crate::simd::{Isa, Kernel, LANES, Token, dispatch};

/// Bytes a task.
const CHUNK: usize = 1 << 20;

struct Read<'a> {
    from: &'a [u8],
}

impl Kernel for Read<'_> {
    type Output = u64;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> u64 {
        let zero = isa.splat_u8(0);
        let mut sums = [zero; 4];
        let (blocks, rest) = self.from.as_chunks::<256>();
        for block in blocks {
            let (tiles, _) = block.as_chunks::<64>();
            for j in 0..4 {
                sums[j] = isa.add_u8(sums[j], isa.load_u8(&tiles[j]));
            }
        }
        let mut bytes = [0; 64];
        isa.store_u8(&mut bytes, isa.add_u8(isa.add_u8(sums[0], sums[1]), isa.add_u8(sums[2], sums[3])));
        bytes.iter().chain(rest).map(|byte| u64::from(*byte)).sum()
    }
}

/// Reads `buffer` once; returns a checksum so that the reads cannot be optimised away.
pub fn read_bandwidth(buffer: &[u8], threads: usize) -> u64 {
    let sum = AtomicU64::new(0);
    parallel::for_each(threads, buffer.chunks(CHUNK).collect(), |from| {
        sum.fetch_add(dispatch(Read { from }), Ordering::Relaxed);
    });
    sum.into_inner()
}

/// Copies `from` to `to` once, the shorter of the two lengths.
pub fn copy_bandwidth(from: &[u8], to: &mut [u8], threads: usize) {
    let tasks = from.chunks(CHUNK).zip(to.chunks_mut(CHUNK)).collect();
    parallel::for_each(threads, tasks, |(from, to)| {
        let len = from.len().min(to.len());
        to[..len].copy_from_slice(&from[..len]);
    });
}

/// Multiply-adds of codes of eight bits and activations whose operands and sums stay in registers, in the nearest
/// cache, or in the tiles of a unit for blocks: `rounds` rounds a thread, some thousands each.
///
/// Returns how many multiply-adds those were.
pub fn multiply_peak(activations: Activations, rounds: usize, threads: usize) -> u64 {
    let token = Token::active();
    let done = AtomicU64::new(0);
    parallel::for_each(threads, vec![(); threads], |()| {
        let kernel = Multiplications { rounds };
        let products = match activations {
            Activations::Int8 => dispatch_bytes(token, u8::MAX, kernel),
            Activations::Float => dispatch_products(token, prefers_bf16(token), u8::MAX, kernel),
        };
        done.fetch_add(products, Ordering::Relaxed);
    });
    done.into_inner()
}

/// Words that each sum is added in a round: a unit of the products.
const WORDS: usize = 8;

struct Multiplications {
    rounds: usize,
}

impl MultiplyKernel for Multiplications {
    type Output = u64;

    #[inline(always)]
    fn run<M: Multiply>(self, by: M) -> u64 {
        if let Some(unit) = by.blocks() {
            return unit.tiles(ROWS, Order::Together { words: 16 }).spin(self.rounds) as u64;
        }
        // Sums in flight: enough to hide what an instruction takes, where the registers hold that many.
        match M::TILE_ROWS * M::TILE_VECTORS {
            12.. => multiplications::<M, 12>(by, self.rounds),
            6.. => multiplications::<M, 6>(by, self.rounds),
            _ => multiplications::<M, 4>(by, self.rounds),
        }
    }
}

#[inline(always)]
fn multiplications<M: Multiply, const SUMS: usize>(by: M, rounds: usize) -> u64 {
    // Other codes for each sum and other words, of which the compiler knows nothing: no product is there twice.
    let (codes, words) = ([[1; 64]; SUMS], [[1; 4]; WORDS]);
    let mut sums = [by.splat(0); SUMS];
    for _ in 0..rounds {
        let (codes, words) = (black_box(&codes), black_box(&words));
        let mut partials = [by.begin(sums[0]); SUMS];
        for i in 1..SUMS {
            partials[i] = by.begin(sums[i]);
        }
        for word in words {
            for i in 0..SUMS {
                partials[i] = by.multiply(partials[i], by.codes(by.isa().load_u8(&codes[i])), *word);
            }
        }
        for i in 0..SUMS {
            sums[i] = by.end(sums[i], partials[i]);
        }
    }
    for sum in sums {
        by.store(black_box(&mut [0; LANES]), sum);
    }
    (rounds * SUMS * WORDS * LANES * 4) as u64
}

impl ProductsKernel for Multiplications {
    type Output = u64;

    #[inline(always)]
    fn run<P: Products>(self, by: P) -> u64 {
        match P::Isa::TILE_ROWS * P::Isa::TILE_VECTORS {
            12.. => products::<P, 12>(by, self.rounds),
            6.. => products::<P, 6>(by, self.rounds),
            _ => products::<P, 4>(by, self.rounds),
        }
    }
}

/// [`multiplications`] in floats.
#[inline(always)]
fn products<P: Products, const SUMS: usize>(by: P, rounds: usize) -> u64 {
    let isa = by.isa();
    let codes = by.codes(isa.splat_u8(black_box(1)), 0);
    let x = by.splat(black_box([1; 4]));
    let mut sums = [isa.splat(0.0); SUMS];
    for _ in 0..rounds * WORDS * P::STEPS {
        for i in 0..SUMS {
            sums[i] = by.multiply(sums[i], codes, x);
        }
    }
    for sum in sums {
        isa.store_i32(black_box(&mut [0; LANES]), isa.to_bits(sum));
    }
    (rounds * SUMS * WORDS * LANES * 4) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiplications_are_counted_per_thread() {
        for activations in [Activations::Int8, Activations::Float] {
            let once = multiply_peak(activations, 1, 1);
            assert!(once > 0);
            assert_eq!(multiply_peak(activations, 3, 2), 6 * once);
        }
    }

    #[test]
    fn read_sees_every_byte_modulo_256_a_lane_and_copy_moves_them() {
        let from = vec![1u8; 3_000_001];
        let tail = 3_000_001 - 2 * CHUNK;
        let lanes = |len: usize| (len / 256 * 4 % 256 * 64 + len % 256) as u64;
        assert_eq!(read_bandwidth(&from, 2), 2 * lanes(CHUNK) + lanes(tail));
        let mut to = vec![0u8; from.len()];
        copy_bandwidth(&from, &mut to, 2);
        assert_eq!(from, to);
    }
}
