// More rows of x: a block of 16·R_TILES·WARPS_R rows of W shares them through shared memory. Codes and activations
// arrive in STAGES stages of 64·WARPS_K columns, each of WARPS_K warps takes 64 of them; the blocks of a cluster
// share the columns too.
#include "choice.cuh"
#include "sums.cuh"

#if !defined(N_TILES) || !defined(R_TILES) || !defined(WARPS_R) || !defined(WARPS_K) || !defined(STAGES) || !defined(BLOCKS)
#error "N_TILES: rows of x by 8; R_TILES: tiles of W a warp; WARPS_R, WARPS_K; STAGES; BLOCKS: least on a multiprocessor"
#endif

constexpr int THREADS = WARPS_R * WARPS_K * WARP;
constexpr int BLOCK_TILES = R_TILES * WARPS_R, BLOCK_ROWS = ROWS * BLOCK_TILES, BLOCK_COLS = 8 * N_TILES;
constexpr int STAGE_COLUMNS = COLUMNS * WARPS_K;

// A warp takes the RUN units of a group one after another, so that it scales its sums once for all of them.
constexpr int RUN = HALVES == 4 || HALVES == 8 ? HALVES / 2 : 1;

// The unit that warp `warp_k` finds in stage `stage`.
__device__ __forceinline__ int unit_of(int stage, int warp_k) {
  return (stage / RUN * WARPS_K + warp_k) * RUN + stage % RUN;
}

constexpr int X_ROW = STAGE_COLUMNS * 2 + 64;  // bytes; two rows side by side use all banks
constexpr int X_BYTES = BLOCK_COLS * X_ROW;
constexpr int UNIT_BYTES = BITS * WARP * 4;
constexpr int STAGE_BYTES = X_BYTES + BLOCK_TILES * WARPS_K * UNIT_BYTES;

// Where plane `plane` of tile `tile` begins in a stage: plane ▸ tile ▸ unit ▸ lane ▸ words, as in memory.
constexpr int plane_in_stage(int plane) {
  return X_BYTES + bits_before(plane) * BLOCK_TILES * WARPS_K * WARP * 4;
}

static_assert(THREADS % (STAGE_COLUMNS / 8) == 0, "a thread copies the same columns of every row");

// Copies stage after stage. A thread has the same part of each: what it needs to know is worked out once. Rows of
// x and tiles beyond the last are those of the last, their results go nowhere; columns beyond the last are 0 in x.
struct Copier {
  static constexpr int X_CHUNKS = STAGE_COLUMNS / 8, X_STEP = THREADS / X_CHUNKS;  // 16 bytes each, of a row
  static constexpr int X_COPIES = (BLOCK_COLS + X_STEP - 1) / X_STEP;

  const u8* rows[X_COPIES];
  int column, k, units;
  u32 x_to;
  const Matrix& w;
  int tile0;

  __device__ __forceinline__ Copier(const u16* x, const Matrix& w, int m, int k, int m0, int tile0)
      : k(k), units(w.units), w(w), tile0(tile0) {
    column = threadIdx.x % X_CHUNKS * 8;
    const int row = threadIdx.x / X_CHUNKS;
    x_to = row * X_ROW + column * 2;
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
      rows[i] = reinterpret_cast<const u8*>(x + static_cast<u64>(min(m0 + row + i * X_STEP, m - 1)) * k);
    }
  }

  __device__ __forceinline__ void fetch(u32 stage, int number) const {
    const int at = unit_of(number, column / COLUMNS) * COLUMNS + column % COLUMNS;
    const bool inside = at < k;
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
      if (BLOCK_COLS % X_STEP && threadIdx.x / X_CHUNKS + i * X_STEP >= BLOCK_COLS) break;
      copy_async(stage + x_to + i * X_STEP * X_ROW, rows[i] + static_cast<u32>(at * 2), inside);
    }
    for_planes([&](auto plane) {
      constexpr int p = decltype(plane)::value, width = WIDTHS[p];
      constexpr int unit_chunks = width * WARP / 4, chunks = unit_chunks * WARPS_K;  // of a tile
      static_assert(THREADS % chunks == 0, "a thread copies the same part of every tile");
      constexpr int step = THREADS / chunks, copies = (BLOCK_TILES + step - 1) / step;
      const int chunk = threadIdx.x % chunks, tile = threadIdx.x / chunks;
      const int unit = min(unit_of(number, chunk / unit_chunks), units - 1);
      const u32 offset = (unit * unit_chunks + chunk % unit_chunks) * 16;
#pragma unroll
      for (int i = 0; i < copies; ++i) {
        if (BLOCK_TILES % step && tile + i * step >= BLOCK_TILES) break;
        const u8* from = w.tile(p, min(tile0 + tile + i * step, w.tiles - 1)) + offset;
        copy_async(stage + plane_in_stage(p) + threadIdx.x * 16 + i * step * chunks * 16, from, true);
      }
    });
  }
};

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: BLOCK_ROWS rows of W, SPLITS, blocks of BLOCK_COLS rows of x.
// k is a multiple of 8, rows of x begin at a multiple of 16 bytes.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, BLOCKS)
    matmul_block(CHOICE const u16* x, const u8* packed, const void* scales, const u8* zero_points, const void* bias,
                 int bias_f32, u16* y, int m, int n, int k) {
  UNLESS_CHOSEN;
  extern __shared__ __align__(128) u8 memory[];
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int warp_r = warp % WARPS_R, warp_k = warp / WARPS_R;
  const int tile0 = blockIdx.x * BLOCK_TILES, m0 = blockIdx.z * BLOCK_COLS;
  const int runs = (w.units + WARPS_K * RUN - 1) / (WARPS_K * RUN);
  const int begin = runs * blockIdx.y / SPLITS * RUN, end = runs * (blockIdx.y + 1) / SPLITS * RUN;
  const u32 base = shared_address(memory);
  const Copier copier(x, w, m, k, m0, tile0);

#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (begin + stage < end) copier.fetch(base + stage * STAGE_BYTES, begin + stage);
    copies_commit();
  }
  // Tiles follow one another; those beyond the last are the last.
  const int last = w.tiles - 1, tile = tile0 + warp_r * R_TILES;
  const GroupReader groups_of_warp(w, min(tile, last), lane);
  Group next[R_TILES][FLUSHES];
  auto fetch_groups = [&](int stage) {
    const int half = 2 * min(unit_of(stage, warp_k), w.units - 1);
#pragma unroll
    for (int r = 0; r < R_TILES; ++r)
#pragma unroll
      for (int i = 0; i < FLUSHES; ++i) {
        groups_of_warp.load(next[r][i], (min(tile + r, last) - min(tile, last)) * w.groups + min(group_of(half + i), w.groups - 1));
      }
  };
  if (begin < end) fetch_groups(begin);

  const Masks mask = masks(n >> 31);
  float total[R_TILES][N_TILES][4] = {};
  GroupSums sums[R_TILES][N_TILES] = {};
  u32 here = base, ahead = base + (STAGES - 1) * STAGE_BYTES;
  for (int stage = begin; stage < end; ++stage) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    Words<BITS> codes[R_TILES];
#pragma unroll
    for (int r = 0; r < R_TILES; ++r) {
      read_unit<plane_in_stage, WARPS_K>(codes[r], here, warp_r * R_TILES + r, warp_k, lane);
    }
    if (stage + STAGES - 1 < end) copier.fetch(ahead, stage + STAGES - 1);
    copies_commit();
    Group groups[R_TILES][FLUSHES];
#pragma unroll
    for (int r = 0; r < R_TILES; ++r)
#pragma unroll
      for (int i = 0; i < FLUSHES; ++i) groups[r][i] = next[r][i];
    if (stage + 1 < end) fetch_groups(stage + 1);

    // Sums go on through the units of a group, and end with it.
    const int unit = unit_of(stage, warp_k), following = unit_of(stage + 1, warp_k);
    const bool group_ends = stage + 1 == end || group_of(2 * unit + 1) != group_of(2 * following);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 a[R_TILES][2][4];
#pragma unroll
      for (int r = 0; r < R_TILES; ++r) {
        const Line line = line_of(groups[r][half * (FLUSHES - 1)]);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) decode(a[r][odd], codes[r], 2 * half + odd, line, mask);
      }
      const u32 x_here = here + lane / 4 * X_ROW + warp_k * COLUMNS * 2 + half * 64 + lane % 4 * 16;
#pragma unroll
      for (int i = 0; i < N_TILES; ++i) {
        Activations b;
        read_shared(b.word, x_here + i * 8 * X_ROW);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
#pragma unroll
          for (int r = 0; r < R_TILES; ++r) sums[r][i].add(a[r][odd], b.word[2 * odd], b.word[2 * odd + 1]);
      }
      if (FLUSHES == 2 || (half == 1 && group_ends)) {
#pragma unroll
        for (int r = 0; r < R_TILES; ++r)
#pragma unroll
          for (int i = 0; i < N_TILES; ++i) {
            sums[r][i].scale(total[r][i], groups[r][half * (FLUSHES - 1)]);
            sums[r][i] = {};
          }
      }
    }
    here = here + STAGE_BYTES == base + STAGES * STAGE_BYTES ? base : here + STAGE_BYTES;
    ahead = ahead + STAGE_BYTES == base + STAGES * STAGE_BYTES ? base : ahead + STAGE_BYTES;
  }
  copies_wait<0>();
  __syncthreads();

  float* slabs = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int r = 0; r < R_TILES; ++r) {
    put<N_TILES, BLOCK_ROWS>(slabs + warp_k * BLOCK_COLS * padded(BLOCK_ROWS), total[r], (warp_r * R_TILES + r) * ROWS,
                             lane);
  }
  __syncthreads();
  store<BLOCK_ROWS, BLOCK_COLS, WARPS_K, THREADS>(slabs, {y, bias, bias_f32, m, n}, tile0 * ROWS, m0);
}
