//! The machine's own limits: how fast memory streams when nothing is computed. Timing is the caller's.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::parallel;
use crate::simd::{Isa, Kernel, dispatch};

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

#[cfg(test)]
mod tests {
    use super::*;

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
