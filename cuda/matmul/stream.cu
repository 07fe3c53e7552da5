// Few rows of x: memory is the limit. Every warp streams its part of 16 rows of W through registers, DEPTH units
// ahead of the one it multiplies; the warps of a block, and the blocks of a cluster, share the columns.
#include "matmul/float_sums.cuh"

#if !defined(N_TILES) || !defined(WARPS) || !defined(DEPTH) || DEPTH % 2 || !defined(BLOCKS)
#error "N_TILES: rows of x by 8; WARPS; DEPTH: units in flight, even; BLOCKS: least on a multiprocessor"
#endif

// A unit on its way.
struct Flight {
  Words<BITS> codes;
  Group groups[FLUSHES];
};

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: tiles of 16 rows of W, SPLITS, blocks of 8·N_TILES rows of x.
// k is a multiple of 8, rows of x begin at a multiple of 16 bytes.
extern "C" __global__ void CLUSTER __launch_bounds__(WARPS* WARP, BLOCKS)
    matmul_stream(const u16* x, const u8* packed, const void* scales, const u8* zero_points, const void* bias, int bias_f32, u16* y,
              int m, int n, int k) {
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  const Output out = {y, bias, bias_f32, m, n};
  __shared__ float sums[WARPS * 8 * N_TILES * padded(ROWS)];
  const int lane = threadIdx.x % WARP, tile = blockIdx.x, m0 = blockIdx.z * 8 * N_TILES;
  // Warps side by side read units side by side.
  const int first = blockIdx.y * WARPS + threadIdx.x / WARP;
  constexpr int stride = WARPS * SPLITS;

  const TileReader reader(w, tile, lane);
  Flight flights[DEPTH];
  auto fetch = [&](Flight& flight, int unit) {
    if (unit >= w.units) return;
    reader.load(flight.codes, unit);
#pragma unroll
    for (int i = 0; i < FLUSHES; ++i) {
      load_group(flight.groups[i], w, tile, min(group_of(2 * unit + i), w.groups - 1), lane);
    }
  };
  // Activations come from nearer by: one unit ahead.
  const u16* rows = x + static_cast<u64>(m0 + lane / 4) * k + lane % 4 * 8;
  Activations near[2][N_TILES][2];
  auto fetch_x = [&](Activations(&to)[N_TILES][2], int unit) {
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = unit * COLUMNS + 32 * half;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (m0 + 8 * n + lane / 4 < out.m && column + lane % 4 * 8 < k) {
          words = __ldg(reinterpret_cast<const uint4*>(rows + n * 8 * k + column));
        }
        to[n][half] = {words.x, words.y, words.z, words.w};
      }
  };
#pragma unroll
  for (int slot = 0; slot < DEPTH; ++slot) fetch(flights[slot], first + slot * stride);
  fetch_x(near[0], first);

  Sums<N_TILES> acc;
  acc.clear();
  u32 finite[N_TILES] = {};
  for (int begin = first; begin < w.units; begin += DEPTH * stride) {
#pragma unroll
    for (int slot = 0; slot < DEPTH; ++slot) {
      const int unit = begin + slot * stride;
      if (unit >= w.units) break;
      fetch_x(near[(slot + 1) % 2], unit + stride);
      const Activations(&b)[N_TILES][2] = near[slot % 2];
      Flight& flight = flights[slot];
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
            const u32* words = b[n][half].word + 2 * odd;
            mma(acc.group[n], a, words[0], words[1]);
            if constexpr (FRACTION) mma(acc.rows_of_x[n], ALL_ONES, words[0], words[1]);
          }
        }
        if (half == 1 || FLUSHES == 2) acc.flush(group);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) watch(finite[n], b[n][half]);
      }
      fetch(flight, unit + DEPTH * stride);
    }
  }
  spoil<N_TILES>(acc.total, finite);
  float* slab = sums + threadIdx.x / WARP * 8 * N_TILES * padded(ROWS);
  put<N_TILES, ROWS>(slab, acc.total, 0, lane);
  __syncthreads();
  store<ROWS, 8 * N_TILES, WARPS, WARPS * WARP>(sums, out, tile * ROWS, m0);
}
