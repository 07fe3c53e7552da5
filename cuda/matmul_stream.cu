// Few rows of x: memory is the limit. Every warp streams its part of 16·R_TILES rows of W through a ring of its own in
// shared memory, STAGES steps of two units, and goes on to other rows without a pause; the warps of a block, and
// the blocks of a cluster, share the columns.
#include "choice.cuh"
#include "sums.cuh"

#if !defined(N_TILES) || !defined(R_TILES) || !defined(WARPS) || !defined(STAGES) || !defined(BLOCKS)
#error "N_TILES: rows of x by 8; R_TILES: tiles of W a warp; WARPS; STAGES of a ring; BLOCKS: least on a multiprocessor"
#endif

constexpr int STEP = 2, SLICE_ROWS = ROWS * R_TILES, SLICE_COLS = 8 * N_TILES;

// Halves of a step side by side that are of one group whatever step it is, and how many such spans it has.
constexpr int SPAN = HALVES % 4 == 0 ? 4 : HALVES % 2 == 0 ? 2 : 1, SPANS = 2 * STEP / SPAN;

// A stage: codes, plane ▸ tile ▸ unit ▸ lane ▸ words as in memory; groups, tile ▸ span ▸ scales, zero points.
constexpr int UNIT_BYTES = WARP * 4, CODE_BYTES = R_TILES * STEP * BITS * UNIT_BYTES;
constexpr int GROUP_CHUNKS = R_TILES * SPANS * GROUP_BYTES / 16;
constexpr int STAGE_BYTES = CODE_BYTES + R_TILES * SPANS * GROUP_BYTES;

constexpr int plane_in_stage(int plane) { return R_TILES * STEP * bits_before(plane) * UNIT_BYTES; }

// Brings the steps of a warp to its ring, one after another. Tiles beyond the last are the last, groups too.
struct Copier {
  static constexpr int GROUP_COPIES = (GROUP_CHUNKS + WARP - 1) / WARP, STRIDE = WARPS * SPLITS;

  const Matrix& w;
  const int lane, first;
  int slice, step;
  const u8* planes[R_TILES][COUNT];
  const u8* groups[GROUP_COPIES];

  __device__ __forceinline__ Copier(const Matrix& w, int lane, int first)
      : w(w), lane(lane), first(first), slice(blockIdx.x), step(first) {
    begin();
  }

  __device__ __forceinline__ void begin() {
    step = first;
#pragma unroll
    for (int r = 0; r < R_TILES; ++r) {
      for_planes([&](auto plane) {
        constexpr int p = decltype(plane)::value;
        const u8* tile = w.tile(p, min(slice * R_TILES + r, w.tiles - 1));
        planes[r][p] = tile + first * (STEP * WIDTHS[p] * UNIT_BYTES) + lane * 16;
      });
    }
#pragma unroll
    for (int i = 0; i < GROUP_COPIES; ++i) {
      const int chunk = lane + i * WARP, part = chunk % (GROUP_BYTES / 16);
      const int tile = min(slice * R_TILES + min(chunk / (SPANS * GROUP_BYTES / 16), R_TILES - 1), w.tiles - 1);
      const u64 before = static_cast<u64>(tile) * w.groups;
      groups[i] = part < SCALE_BYTES / 16 ? static_cast<const u8*>(w.scales) + before * SCALE_BYTES + part * 16
                                          : w.zero_points + before * ROWS;
    }
  }

  __device__ __forceinline__ void fetch(u32 stage) {
    if (step < (w.units + STEP - 1) / STEP && slice * R_TILES < w.tiles) {
      const int left = w.units - step * STEP;
#pragma unroll
      for (int r = 0; r < R_TILES; ++r) {
        for_planes([&](auto plane) {
          constexpr int p = decltype(plane)::value, chunks = WIDTHS[p] * UNIT_BYTES / 16;  // of a unit
#pragma unroll
          for (int i = 0; i < STEP * chunks; i += WARP) {
            if ((i + lane) / chunks < min(left, STEP)) {
              copy_async(stage + plane_in_stage(p) + (r * STEP * chunks + i + lane) * 16, planes[r][p] + i * 16, true);
            }
          }
          planes[r][p] += STRIDE * STEP * chunks * 16;
        });
      }
#pragma unroll
      for (int i = 0; i < GROUP_COPIES; ++i) {
        const int chunk = lane + i * WARP;
        const int span = chunk / (GROUP_BYTES / 16) % SPANS, part = chunk % (GROUP_BYTES / 16);
        const int group = min(group_of(2 * STEP * step + span * SPAN), w.groups - 1);
        const u32 offset = group * (part < SCALE_BYTES / 16 ? SCALE_BYTES : ROWS);
        if (chunk < GROUP_CHUNKS) copy_async(stage + CODE_BYTES + chunk * 16, groups[i] + offset, true);
      }
      step += STRIDE;
      if (step >= (w.units + STEP - 1) / STEP) {
        slice += gridDim.x;
        begin();
      }
    }
    copies_commit();
  }
};

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: any number of blocks, which share the slices of SLICE_ROWS rows of W;
// SPLITS; blocks of SLICE_COLS rows of x. k is a multiple of 8, rows of x begin at a multiple of 16 bytes.
extern "C" __global__ void CLUSTER __launch_bounds__(WARPS* WARP, BLOCKS)
    matmul_stream(CHOICE const u16* x, const u8* packed, const void* scales, const u8* zero_points, const void* bias,
                  int bias_f32, u16* y, int m, int n, int k) {
  UNLESS_CHOSEN;
  let_next_begin();
  extern __shared__ __align__(128) u8 memory[];
  constexpr int slab = SLICE_COLS * padded(SLICE_ROWS);
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, m0 = blockIdx.z * SLICE_COLS;
  const int first = blockIdx.y * WARPS + warp, steps = (w.units + STEP - 1) / STEP;
  float* sums = reinterpret_cast<float*>(memory + WARPS * STAGES * STAGE_BYTES);

  const u32 ring = shared_address(memory) + warp * (STAGES * STAGE_BYTES);
  Copier copier(w, lane, first);
  // While what is in front may still run: it writes no weight, or this launch would not have been early.
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) copier.fetch(ring + stage * STAGE_BYTES);
  wait_for_last();

  // Activations beyond the last row and column are 0: lanes that have none load nothing.
  const u16* rows[N_TILES];
  bool has_row[N_TILES];
  Activations near[2 * STEP][N_TILES] = {};
#pragma unroll
  for (int i = 0; i < N_TILES; ++i) {
    const int row = m0 + 8 * i + lane / 4;
    has_row[i] = row < m;
    rows[i] = x + static_cast<u64>(row) * k + lane % 4 * 8;
  }
  const Masks mask = masks(n >> 31);
  float total[R_TILES][N_TILES][4];
  u32 here = ring, ahead = ring + (STAGES - 1) * STAGE_BYTES;
  auto take = [&](int step, bool inside) {
#pragma unroll
    for (int half = 0; half < 2 * STEP; ++half)
#pragma unroll
      for (int i = 0; i < N_TILES; ++i) {
        const int column = step * (STEP * COLUMNS) + 32 * half;
        if (!inside) near[half][i] = {};
        load_near(near[half][i].word, rows[i] + column, has_row[i] && (inside || column + lane % 4 * 8 < k));
      }
    copies_wait<STAGES - 2>();
    __syncwarp();
    copier.fetch(ahead);
    GroupSums products[R_TILES][N_TILES] = {};
    Group groups[R_TILES];
#pragma unroll
    for (int unit = 0; unit < STEP; ++unit) {
      Words<BITS> codes[R_TILES];
#pragma unroll
      for (int r = 0; r < R_TILES; ++r) read_unit<plane_in_stage, STEP>(codes[r], here, r, unit, lane);
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int half = 2 * unit + quarter / 2;
#pragma unroll
        for (int r = 0; r < R_TILES; ++r) {
          if (quarter % 2 == 0 && half % SPAN == 0) {
            read_group(groups[r], here + CODE_BYTES + (r * SPANS + half / SPAN) * GROUP_BYTES, lane);
          }
          u32 a[4];
          decode(a, codes[r], quarter, offsets_of(groups[r]), mask);
#pragma unroll
          for (int i = 0; i < N_TILES; ++i) {
            const u32* words = near[half][i].word + quarter % 2 * 2;
            products[r][i].add(a, words[0], words[1]);
            if (quarter % 2 && (half + 1) % SPAN == 0) {
              products[r][i].scale(total[r][i], groups[r]);
              products[r][i] = {};
            }
          }
        }
      }
    }
    here = here + STAGE_BYTES == ring + STAGES * STAGE_BYTES ? ring : here + STAGE_BYTES;
    ahead = ahead + STAGE_BYTES == ring + STAGES * STAGE_BYTES ? ring : ahead + STAGE_BYTES;
  };

  int buffer = 0;
  for (int slice = blockIdx.x; slice * R_TILES < w.tiles; slice += gridDim.x) {
#pragma unroll
    for (int r = 0; r < R_TILES; ++r)
#pragma unroll
      for (int i = 0; i < N_TILES; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) total[r][i][j] = 0.0f;
    int step = first;
    for (; (step + 1) * (STEP * COLUMNS) <= k; step += Copier::STRIDE) take(step, true);
    if (step < steps) take(step, false);

    float* slabs = sums + buffer * WARPS * slab;  // the other buffer may still be read
#pragma unroll
    for (int r = 0; r < R_TILES; ++r) put<N_TILES, SLICE_ROWS>(slabs + warp * slab, total[r], r * ROWS, lane);
    __syncthreads();
    store<SLICE_ROWS, SLICE_COLS, WARPS, WARPS * WARP>(slabs, {y, bias, bias_f32, m, n}, slice * SLICE_ROWS, m0);
    buffer ^= 1;
  }
}
