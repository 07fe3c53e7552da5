// Few rows of x: memory is the limit. Every warp streams its part of 16·R_TILES rows of W through a ring of its own in
// shared memory, STAGES steps of UNITS units, and goes on to other rows without a pause; the warps of a block, and
// the blocks of a cluster, share the columns. Up to eight rows of x come straight to registers, a step ahead; more of
// them through the ring.
#include "choice.cuh"
#include "sums.cuh"

#if !defined(N_TILES) || !defined(R_TILES) || !defined(WARPS) || !defined(STAGES) || !defined(UNITS) || !defined(BLOCKS)
#error "N_TILES: rows of x by 8; R_TILES: tiles of W a warp; WARPS; STAGES of UNITS; BLOCKS: least on a multiprocessor"
#endif

constexpr int SLICE_ROWS = ROWS * R_TILES, SLICE_COLS = 8 * N_TILES, STEP_COLUMNS = UNITS * COLUMNS;

// Halves of a step side by side that are of one group whatever step it is, and how many such spans it has.
constexpr int SPAN = HALVES % 4 == 0 && UNITS > 1 ? 4 : HALVES % 2 == 0 ? 2 : 1, SPANS = 2 * UNITS / SPAN;

// A stage: codes, plane ▸ tile ▸ unit ▸ lane ▸ words as in memory; groups, tile ▸ span ▸ scales, zero points; where x
// comes through the ring, its rows, of which every other one has its halves of 32 columns swapped two by two, so that
// neighbours are read from different banks.
constexpr int UNIT_BYTES = WARP * 4, CODE_BYTES = R_TILES * UNITS * BITS * UNIT_BYTES;
constexpr int GROUP_CHUNKS = R_TILES * SPANS * GROUP_BYTES / 16;
constexpr bool X_IN_RING = N_TILES > 1;
constexpr int X_BEGINS = CODE_BYTES + R_TILES * SPANS * GROUP_BYTES, X_ROW = X_IN_RING ? STEP_COLUMNS * 2 : 0;
constexpr int HALF_BYTES = 64;  // of a row of x
constexpr int STAGE_BYTES = X_BEGINS + SLICE_COLS * X_ROW;

constexpr int plane_in_stage(int plane) { return R_TILES * UNITS * bits_before(plane) * UNIT_BYTES; }

// Chunks of 16 bytes that a step has of a tile in a plane; copies of a warp, a chunk a lane, that share a pointer.
constexpr int tile_chunks(int plane) { return UNITS * WIDTHS[plane] * UNIT_BYTES / 16; }
constexpr int copies_a_pointer(int plane) { return tile_chunks(plane) > WARP ? tile_chunks(plane) / WARP : 1; }
constexpr int copies(int plane) { return (R_TILES * tile_chunks(plane) + WARP - 1) / WARP; }

// Brings the steps of a warp to its ring, one after another. Tiles beyond the last are the last, groups too.
struct Copier {
  static constexpr int GROUP_COPIES = (GROUP_CHUNKS + WARP - 1) / WARP, STRIDE = WARPS * SPLITS;
  static constexpr int X_CHUNKS = STEP_COLUMNS / 8, X_ROWS = WARP / X_CHUNKS;  // rows of x a copy
  static_assert(!X_IN_RING || X_ROWS % 2 == 0, "what a lane copies is of even rows of x, or of odd ones");

  const Matrix& w;
  const int lane, first, steps;
  int slice, step;
  const u8* planes[COUNT][R_TILES];
  const u8* groups[GROUP_COPIES];

  const u16* x;  // this lane's chunk of the first columns
  int x_end, x_rows, k;

  // Of the `rows` rows of x (k columns) from `x` on.
  __device__ __forceinline__ Copier(const Matrix& w, const u16* x, int rows, int k, int lane, int first)
      : w(w), lane(lane), first(first), steps((w.units + UNITS - 1) / UNITS), slice(blockIdx.x),
        x(x + lane / X_CHUNKS * static_cast<u64>(k) + lane % X_CHUNKS * 8), x_end(k - lane % X_CHUNKS * 8),
        x_rows(rows - lane / X_CHUNKS), k(k) {
    begin();
  }

  __device__ __forceinline__ void begin() {
    step = first;
    for_planes([&](auto plane) {
      constexpr int p = decltype(plane)::value, chunks = tile_chunks(p), shared = copies_a_pointer(p);
#pragma unroll
      for (int i = 0; i < copies(p) / shared; ++i) {
        const int chunk = i * shared * WARP + lane;
        const u8* tile = w.tile(p, min(slice * R_TILES + chunk / chunks, w.tiles - 1));
        planes[p][i] = tile + first * (chunks * 16) + chunk % chunks * 16;
      }
    });
#pragma unroll
    for (int i = 0; i < GROUP_COPIES; ++i) {
      const int chunk = lane + i * WARP, part = chunk % (GROUP_BYTES / 16);
      const int tile = min(slice * R_TILES + min(chunk / (SPANS * GROUP_BYTES / 16), R_TILES - 1), w.tiles - 1);
      const u64 before = static_cast<u64>(tile) * w.groups;
      groups[i] = part < SCALE_BYTES / 16 ? static_cast<const u8*>(w.scales) + before * SCALE_BYTES + part * 16
                                          : w.zero_points + before * ROWS;
    }
  }

  // Whether there is another step.
  __device__ __forceinline__ bool more() const { return slice * R_TILES < w.tiles && step < steps; }

  template <bool WHOLE>
  __device__ __forceinline__ void fetch_codes(u32 stage) {
    const int left = w.units - step * UNITS;
    for_planes([&](auto plane) {
      constexpr int p = decltype(plane)::value, chunks = tile_chunks(p), shared = copies_a_pointer(p);
#pragma unroll
      for (int i = 0; i < copies(p); ++i) {
        const int chunk = i * WARP + lane;
        const bool fits = R_TILES * chunks % WARP == 0 || chunk < R_TILES * chunks;
        if (fits && (WHOLE || chunk % chunks / (WIDTHS[p] * UNIT_BYTES / 16) < left)) {
          const u8* from = planes[p][i / shared] + i % shared * WARP * 16;
          copy_async(stage + lane * 16 + (plane_in_stage(p) + i * WARP * 16), from, true);
        }
      }
    });
  }

  // The next step of W.
  __device__ __forceinline__ void fetch(u32 stage) {
    if ((step + 1) * UNITS <= w.units) fetch_codes<true>(stage);
    else fetch_codes<false>(stage);
    for_planes([&](auto plane) {
      constexpr int p = decltype(plane)::value;
#pragma unroll
      for (int i = 0; i < copies(p) / copies_a_pointer(p); ++i) planes[p][i] += STRIDE * tile_chunks(p) * 16;
    });
#pragma unroll
    for (int i = 0; i < GROUP_COPIES; ++i) {
      const int chunk = lane + i * WARP;
      const int span = chunk / (GROUP_BYTES / 16) % SPANS, part = chunk % (GROUP_BYTES / 16);
      const int group = min(group_of(2 * UNITS * step + span * SPAN), w.groups - 1);
      const u32 offset = group * (part < SCALE_BYTES / 16 ? SCALE_BYTES : ROWS);
      if (chunk < GROUP_CHUNKS) copy_async(stage + lane * 16 + (CODE_BYTES + i * WARP * 16), groups[i] + offset, true);
    }
    step += STRIDE;
    if (step >= steps) {
      slice += gridDim.x;
      begin();
    }
  }

  // Columns of x for a step; zeros beyond the last column.
  __device__ __forceinline__ void fetch_x(u32 stage, int step) const {
    const u16* from = x + static_cast<u64>(step) * STEP_COLUMNS;
    const bool inside = step * STEP_COLUMNS < x_end;
    const int row = lane / X_CHUNKS;
    const u32 to = stage + row * X_ROW + (lane % X_CHUNKS * 16 ^ row % 2 * HALF_BYTES);
#pragma unroll
    for (int i = 0; i < SLICE_COLS; i += X_ROWS) {
      if (i >= x_rows) break;
      copy_async(to + (X_BEGINS + i * X_ROW), from, inside);
      from += X_ROWS * static_cast<u64>(k);
    }
  }
};

// The activations of a step as operands.
struct Near {
  Activations halves[2 * UNITS][N_TILES] = {};
  const u16* rows[N_TILES];  // of this lane, from its first column on
  bool has_row[N_TILES];
  int k, column;

  __device__ __forceinline__ Near(const u16* x, int count, int k, int lane) : k(k), column(lane % 4 * 8) {
#pragma unroll
    for (int i = 0; i < N_TILES; ++i) {
      const int row = 8 * i + lane / 4;
      has_row[i] = row < count;
      rows[i] = x + static_cast<u64>(row) * k + column;
    }
  }

  __device__ __forceinline__ bool whole(int step) const { return (step + 1) * STEP_COLUMNS <= k; }

  // Half `half` of a step, where it is `wanted`, from memory.
  __device__ __forceinline__ void load(int step, int half, bool wanted) {
#pragma unroll
    for (int i = 0; i < N_TILES; ++i) {
      const u16* from = rows[i] + static_cast<long long>(step) * STEP_COLUMNS + 32 * half;
      load_near(halves[half][i].word, from, has_row[i] && wanted);
    }
  }

  // A step with columns that are not there: zeros.
  __device__ __forceinline__ void load_broken(int step) {
#pragma unroll
    for (int half = 0; half < 2 * UNITS; ++half) {
#pragma unroll
      for (int i = 0; i < N_TILES; ++i) halves[half][i] = {};
      load(step, half, step * STEP_COLUMNS + 32 * half + column < k);
    }
  }

  // Half `half` of a step in a stage. Sums of rows that are not there go nowhere.
  __device__ __forceinline__ void read(u32 stage, int half, int lane) {
    const int row = lane / 4, swapped = (row + half) % 2;
    const u32 from = stage + row * X_ROW + lane % 4 * 16 + swapped * HALF_BYTES;
#pragma unroll
    for (int i = 0; i < N_TILES; ++i) {
      read_shared(halves[half][i].word, from + (X_BEGINS + 8 * i * X_ROW + half / 2 * (2 * HALF_BYTES)));
    }
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
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = blockIdx.y * WARPS + warp;
  const int m0 = blockIdx.z * SLICE_COLS, rows = min(m - m0, SLICE_COLS), steps = (w.units + UNITS - 1) / UNITS;
  const u16* x_rows = x + static_cast<u64>(m0) * k;
  float* sums = reinterpret_cast<float*>(memory + WARPS * STAGES * STAGE_BYTES);

  const u32 ring = shared_address(memory) + warp * (STAGES * STAGE_BYTES), end = ring + STAGES * STAGE_BYTES;
  Copier copier(w, x_rows, rows, k, lane, first);
  // While what is in front may still run: it writes no weight, or this launch would not have been early.
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (copier.more()) copier.fetch(ring + stage * STAGE_BYTES);
    copies_commit();
  }
  wait_for_last();
  Near near(x_rows, rows, k, lane);
  if constexpr (X_IN_RING) {
    for (int stage = 0, step = first; stage < STAGES - 1; ++stage) {
      if (first < steps) copier.fetch_x(ring + stage * STAGE_BYTES, step);
      copies_commit();
      step = step + Copier::STRIDE < steps ? step + Copier::STRIDE : first;
    }
  } else {
    near.load_broken(first);
  }

  const Masks mask = masks(n >> 31);
  float total[R_TILES][N_TILES][4];
  u32 here = ring, ahead = ring + (STAGES - 1) * STAGE_BYTES;
  auto take = [&](int next) {
    copies_wait<STAGES - 2>();
    __syncwarp();
    if (copier.more()) {
      if (X_IN_RING) copier.fetch_x(ahead, copier.step);
      copier.fetch(ahead);
    }
    copies_commit();
    GroupSums products[R_TILES][N_TILES] = {};
    Group groups[R_TILES];
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) {
      Words<BITS> codes[R_TILES];
#pragma unroll
      for (int r = 0; r < R_TILES; ++r) read_unit<plane_in_stage, UNITS>(codes[r], here, r, unit, lane);
#pragma unroll
      for (int half = 2 * unit; half < 2 * unit + 2; ++half) {
        if (X_IN_RING) near.read(here, half, lane);
#pragma unroll
        for (int r = 0; r < R_TILES; ++r) {
          if (half % SPAN == 0) {
            read_group(groups[r], here + CODE_BYTES + (r * SPANS + half / SPAN) * GROUP_BYTES, lane);
          }
          const Line line = line_of(groups[r]);
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            u32 a[4];
            decode(a, codes[r], half % 2 * 2 + odd, line, mask);
#pragma unroll
            for (int i = 0; i < N_TILES; ++i) {
              const u32* words = near.halves[half][i].word + 2 * odd;
              products[r][i].add(a, words[0], words[1]);
            }
          }
          if ((half + 1) % SPAN == 0) {
#pragma unroll
            for (int i = 0; i < N_TILES; ++i) {
              products[r][i].scale(total[r][i], groups[r]);
              products[r][i] = {};
            }
          }
        }
        // Those of the next step take the place of those that have been used.
        if (!X_IN_RING) near.load(next, half, near.whole(next));
      }
    }
    if (!X_IN_RING && !near.whole(next)) near.load_broken(next);
    ahead = here;
    here = here + STAGE_BYTES == end ? ring : here + STAGE_BYTES;
  };

  for (int slice = blockIdx.x; slice * R_TILES < w.tiles; slice += gridDim.x) {
#pragma unroll
    for (int r = 0; r < R_TILES; ++r)
#pragma unroll
      for (int i = 0; i < N_TILES; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) total[r][i][j] = 0.0f;
#pragma unroll 1
    for (int step = first; step < steps; step += Copier::STRIDE) {
      take(step + Copier::STRIDE < steps ? step + Copier::STRIDE : first);
    }

    float* slab = sums + warp * (rows * padded(SLICE_ROWS));
#pragma unroll
    for (int r = 0; r < R_TILES; ++r) put<N_TILES, SLICE_ROWS>(slab, total[r], r * ROWS, lane, rows);
    __syncthreads();
    store<SLICE_ROWS, SLICE_COLS, WARPS, WARPS * WARP>(sums, {y, bias, bias_f32, m, n}, slice * SLICE_ROWS, m0, rows);
    // Until all have read the sums.
    if (SPLITS == 1 && (slice + gridDim.x) * R_TILES < w.tiles) __syncthreads();
  }
  copies_wait<0>();
}
