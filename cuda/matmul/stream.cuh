// Few rows of x: memory is the limit. Every warp streams its part of 16 rows of W through registers, DEPTH units
// ahead of the one it multiplies; the warps of a block, and the blocks of a cluster, share the columns.
#pragma once

#include "float_sums.cuh"
#include "output.cuh"

#if !defined(N_TILES) || !defined(WARPS) || !defined(DEPTH) || !defined(BLOCKS)
#error "N_TILES: rows of x by 8; WARPS; DEPTH: units in flight; BLOCKS: least on a multiprocessor"
#endif

__device__ __forceinline__ Activations load_activations(const u16* x, int k, int half, int row, bool valid,
                                                        int lane) {
  const int column = 32 * half + 8 * (lane % 4);
  uint4 words = make_uint4(0, 0, 0, 0);
  if (valid && column < k) words = __ldg(reinterpret_cast<const uint4*>(x + static_cast<u64>(row) * k + column));
  return {words.x, words.y, words.z, words.w};
}

// A unit on its way.
struct Flight {
  Words<BITS> codes;
  Group groups[FLUSHES];
};

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: tiles of 16 rows of W, SPLITS, blocks of 8·N_TILES rows of x.
// k is a multiple of 8, rows of x begin at a multiple of 16 bytes.
extern "C" __global__ void CLUSTER __launch_bounds__(WARPS* WARP, BLOCKS)
    matmul_stream(const u16* x, Matrix w, Output out, int k) {
  __shared__ float sums[WARPS * 8 * N_TILES * padded(ROWS)];
  const int lane = threadIdx.x % WARP, tile = blockIdx.x, m0 = blockIdx.z * 8 * N_TILES;
  // Warps side by side read units side by side.
  const int first = blockIdx.y * WARPS + threadIdx.x / WARP;
  constexpr int stride = WARPS * SPLITS;

  Flight flights[DEPTH];
  auto fetch = [&](Flight& flight, int unit) {
    if (unit >= w.units) return;
    load_unit(flight.codes, w, tile, unit, lane);
#pragma unroll
    for (int i = 0; i < FLUSHES; ++i) {
      load_group(flight.groups[i], w, tile, min(group_of(2 * unit + i), w.groups - 1), lane);
    }
  };
  Activations next[N_TILES][2];
  auto fetch_x = [&](int unit) {
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m0 + 8 * n + lane / 4;
        next[n][half] = load_activations(x, k, 2 * unit + half, row, row < out.m, lane);
      }
  };
#pragma unroll
  for (int slot = 0; slot < DEPTH; ++slot) fetch(flights[slot], first + slot * stride);
  fetch_x(first);

  Sums<N_TILES> acc;
  acc.clear();
  u32 finite[N_TILES] = {};
  for (int begin = first; begin < w.units; begin += DEPTH * stride) {
#pragma unroll
    for (int slot = 0; slot < DEPTH; ++slot) {
      const int unit = begin + slot * stride;
      if (unit >= w.units) break;
      Activations now[N_TILES][2];
#pragma unroll
      for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          now[n][half] = next[n][half];
        }
      fetch_x(unit + stride);
      const Flight flight = flights[slot];
      fetch(flights[slot], unit + DEPTH * stride);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Group& group = flight.groups[half * (FLUSHES - 1)];
        const Offsets offsets = offsets_of(group);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          u32 a[4];
          decode(a, flight.codes, 2 * half + odd, offsets);
#pragma unroll
          for (int n = 0; n < N_TILES; ++n) {
            const u32* b = now[n][half].word + 2 * odd;
            mma(acc.group[n], a, b[0], b[1]);
            if constexpr (FRACTION) {
              const u32 ones[4] = {ONES, ONES, ONES, ONES};
              mma(acc.rows_of_x[n], ones, b[0], b[1]);
            }
          }
        }
        if (half + 1 == 2 || FLUSHES == 2) acc.flush(group);
      }
#pragma unroll
      for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) watch(finite[n], now[n][half]);
    }
  }
  spoil<N_TILES>(acc.total, finite);
  float* slab = sums + threadIdx.x / WARP * 8 * N_TILES * padded(ROWS);
  put<N_TILES, ROWS>(slab, acc.total, 0, lane);
  __syncthreads();
  store<ROWS, 8 * N_TILES, WARPS, WARPS * WARP>(sums, out, tile * ROWS, m0);
}
