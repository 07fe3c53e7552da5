// More rows of x: a block of 16·R_TILES·WARPS_R rows of W shares them through shared memory. Codes and activations
// arrive in STAGES stages of 64·WARPS_K columns, each of WARPS_K warps takes 64 of them; the blocks of a cluster
// share the columns too.
#include "matmul/float_sums.cuh"

#if !defined(N_TILES) || !defined(R_TILES) || !defined(WARPS_R) || !defined(WARPS_K) || !defined(STAGES) || !defined(BLOCKS)
#error "N_TILES: rows of x by 8; R_TILES: tiles of W a warp; WARPS_R, WARPS_K; STAGES; BLOCKS: least on a multiprocessor"
#endif

constexpr int THREADS = WARPS_R * WARPS_K * WARP;
constexpr int BLOCK_TILES = R_TILES * WARPS_R, BLOCK_ROWS = ROWS * BLOCK_TILES, BLOCK_COLS = 8 * N_TILES;
constexpr int STAGE_COLUMNS = COLUMNS * WARPS_K;
constexpr int X_ROW = STAGE_COLUMNS * 2 + 64;  // bytes; two rows side by side use all banks
constexpr int X_BYTES = BLOCK_COLS * X_ROW;
constexpr int UNIT_BYTES = BITS * WARP * 4;
constexpr int STAGE_BYTES = X_BYTES + BLOCK_TILES * WARPS_K * UNIT_BYTES;

// Where plane `plane` of tile `tile` begins in a stage: plane ▸ tile ▸ unit ▸ lane ▸ words, as in memory.
constexpr int plane_in_stage(int plane) {
  return X_BYTES + bits_before(plane) * BLOCK_TILES * WARPS_K * WARP * 4;
}

__device__ __forceinline__ void fetch_stage(u32 stage, const u16* x, const Matrix& w, int m, int k, int m0,
                                            int tile0, int unit0) {
  constexpr int x_chunks = STAGE_COLUMNS / 8;  // 16 bytes each, of a row
  for (int i = threadIdx.x; i < BLOCK_COLS * x_chunks; i += THREADS) {
    const int row = i / x_chunks, chunk = i % x_chunks, column = unit0 * COLUMNS + chunk * 8;
    const bool valid = m0 + row < m && column < k;
    const u16* from = valid ? x + static_cast<u64>(m0 + row) * k + column : x;
    copy_async(stage + row * X_ROW + chunk * 16, from, valid);
  }
  for_planes([&](auto plane) {
    constexpr int p = decltype(plane)::value, width = WIDTHS[p];
    constexpr int unit_chunks = width * WARP / 4, chunks = unit_chunks * WARPS_K;  // of a tile
    for (int i = threadIdx.x; i < BLOCK_TILES * chunks; i += THREADS) {
      const int tile = tile0 + i / chunks, chunk = i % chunks;
      const bool valid = tile < w.tiles && unit0 + chunk / unit_chunks < w.units;
      const u8* from = valid ? w.tile(p, tile) + (unit0 * unit_chunks + chunk) * 16 : w.packed;
      copy_async(stage + plane_in_stage(p) + i * 16, from, valid);
    }
  });
}

__device__ __forceinline__ void read_shared(u32* to, u32 from) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

// A lane's words of a unit in a stage.
__device__ __forceinline__ void read_unit(Words<BITS>& to, u32 stage, int tile, int unit, int lane) {
  for_planes([&](auto plane) {
    constexpr int p = decltype(plane)::value, width = WIDTHS[p];
    const u32 from = stage + plane_in_stage(p) + (tile * WARPS_K + unit) * (width * WARP * 4);
    u32* words = to.word + bits_before(p);
    if constexpr (width == 8) {
      read_shared(words, from + 16 * lane);
      read_shared(words + 4, from + 16 * (WARP + lane));
    } else if constexpr (width == 4) {
      read_shared(words, from + 16 * lane);
    } else if constexpr (width == 2) {
      asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from + 8 * lane));
    } else {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(from + 4 * lane));
    }
  });
}

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: BLOCK_ROWS rows of W, SPLITS, blocks of BLOCK_COLS rows of x.
// k is a multiple of 8, rows of x begin at a multiple of 16 bytes.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, BLOCKS)
    matmul_block(const u16* x, const u8* packed, const void* scales, const u8* zero_points, const void* bias, int bias_f32, u16* y,
              int m, int n, int k) {
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  const Output out = {y, bias, bias_f32, m, n};
  extern __shared__ __align__(128) u8 memory[];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int warp_r = warp % WARPS_R, warp_k = warp / WARPS_R;
  const int tile0 = blockIdx.x * BLOCK_TILES, m0 = blockIdx.z * BLOCK_COLS;
  const int stages = (w.units + WARPS_K - 1) / WARPS_K;
  const int begin = stages * blockIdx.y / SPLITS, end = stages * (blockIdx.y + 1) / SPLITS;
  const u32 base = shared_address(memory);

#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (begin + stage < end) {
      fetch_stage(base + stage * STAGE_BYTES, x, w, out.m, k, m0, tile0, (begin + stage) * WARPS_K);
    }
    copies_commit();
  }

  Sums<N_TILES> acc[R_TILES];
#pragma unroll
  for (int r = 0; r < R_TILES; ++r) acc[r].clear();
  u32 finite[N_TILES] = {};
  Group next[R_TILES][FLUSHES];
  auto fetch_groups = [&](int stage) {
    const int half = 2 * min(stage * WARPS_K + warp_k, w.units - 1);
#pragma unroll
    for (int r = 0; r < R_TILES; ++r)
#pragma unroll
      for (int i = 0; i < FLUSHES; ++i) {
        const int tile = min(tile0 + warp_r * R_TILES + r, w.tiles - 1);
        load_group(next[r][i], w, tile, min(group_of(half + i), w.groups - 1), lane);
      }
  };
  if (begin < end) fetch_groups(begin);

  for (int stage = begin; stage < end; ++stage) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    const int ahead = stage + STAGES - 1;
    if (ahead < end) {
      fetch_stage(base + (ahead - begin) % STAGES * STAGE_BYTES, x, w, out.m, k, m0, tile0, ahead * WARPS_K);
    }
    copies_commit();
    Group groups[R_TILES][FLUSHES];
#pragma unroll
    for (int r = 0; r < R_TILES; ++r)
#pragma unroll
      for (int i = 0; i < FLUSHES; ++i) groups[r][i] = next[r][i];
    if (stage + 1 < end) fetch_groups(stage + 1);

    const u32 here = base + (stage - begin) % STAGES * STAGE_BYTES;
    const int unit = stage * WARPS_K + warp_k;
    Words<BITS> codes[R_TILES];
#pragma unroll
    for (int r = 0; r < R_TILES; ++r) read_unit(codes[r], here, warp_r * R_TILES + r, warp_k, lane);
    // Sums go on through the units of a group, and end with it.
    const bool group_ends = stage + 1 == end || group_of(2 * unit + 1) != group_of(2 * (unit + WARPS_K));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 a[R_TILES][2][4];
#pragma unroll
      for (int r = 0; r < R_TILES; ++r) {
        const Offsets offsets = offsets_of(groups[r][half * (FLUSHES - 1)]);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) decode(a[r][odd], codes[r], 2 * half + odd, offsets);
      }
      const u32 x_here = here + lane / 4 * X_ROW + warp_k * COLUMNS * 2 + half * 64 + lane % 4 * 16;
#pragma unroll
      for (int n = 0; n < N_TILES; ++n) {
        Activations b;
        read_shared(b.word, x_here + n * 8 * X_ROW);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
          for (int r = 0; r < R_TILES; ++r) mma(acc[r].group[n], a[r][odd], b.word[2 * odd], b.word[2 * odd + 1]);
          if constexpr (FRACTION) mma(acc[0].rows_of_x[n], ALL_ONES, b.word[2 * odd], b.word[2 * odd + 1]);
        }
        watch(finite[n], b);
      }
      if ((FLUSHES == 2) || (half == 1 && group_ends)) {
        if constexpr (FRACTION) {
#pragma unroll
          for (int r = 1; r < R_TILES; ++r)
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) acc[r].rows_of_x[n][i] = acc[0].rows_of_x[n][i];
        }
#pragma unroll
        for (int r = 0; r < R_TILES; ++r) acc[r].flush(groups[r][half * (FLUSHES - 1)]);
      }
    }
  }
  copies_wait<0>();
  __syncthreads();

  float* sums = reinterpret_cast<float*>(memory);
  float* slab = sums + warp_k * BLOCK_COLS * padded(BLOCK_ROWS);
#pragma unroll
  for (int r = 0; r < R_TILES; ++r) {
    spoil<N_TILES>(acc[r].total, finite);
    put<N_TILES, BLOCK_ROWS>(slab, acc[r].total, (warp_r * R_TILES + r) * ROWS, lane);
  }
  __syncthreads();
  store<BLOCK_ROWS, BLOCK_COLS, WARPS_K, THREADS>(sums, out, tile0 * ROWS, m0);
}
