// Few rows of x: memory is the limit. Every warp streams its part of 16 rows of W through registers, DEPTH units
// ahead of the one it multiplies, and goes on to other rows without a pause; the warps of a block, and the blocks
// of a cluster, share the columns.
#include "choice.cuh"
#include "sums.cuh"

#if !defined(N_TILES) || !defined(WARPS) || !defined(DEPTH) || DEPTH % 2 || !defined(BLOCKS)
#error "N_TILES: rows of x by 8; WARPS; DEPTH: units in flight, even; BLOCKS: least on a multiprocessor"
#endif

// A unit on its way.
struct Flight {
  Words<BITS> codes;
  Group groups[FLUSHES];
};

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: any number of blocks, which share the tiles of 16 rows of W; SPLITS;
// blocks of 8·N_TILES rows of x. k is a multiple of 8, rows of x begin at a multiple of 16 bytes.
extern "C" __global__ void CLUSTER __launch_bounds__(WARPS* WARP, BLOCKS)
    matmul_stream(CHOICE const u16* x, const u8* packed, const void* scales, const u8* zero_points, const void* bias,
                  int bias_f32, u16* y, int m, int n, int k) {
  UNLESS_CHOSEN;
  __shared__ float sums[2][WARPS * 8 * N_TILES * padded(ROWS)];
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  const int lane = threadIdx.x % WARP, m0 = blockIdx.z * 8 * N_TILES;
  // Warps side by side read units side by side, DEPTH of them a turn.
  const int first = blockIdx.y * WARPS + threadIdx.x / WARP;
  constexpr int stride = WARPS * SPLITS, turn = DEPTH * stride;
  // Where a stride is a whole number of groups, they too lie at constant distances.
  constexpr int span = FLUSHES == 1 && HALVES && 2 * stride % (HALVES ? HALVES : 1) == 0
                           ? 2 * stride / (HALVES ? HALVES : 1)
                           : 0;

  // Codes on their way: those of the next turn, which may be that of the next tile.
  Flight flights[DEPTH] = {};
  const u8* planes[COUNT];
  GroupReader groups(w, 0, lane);
  int fetch_tile = blockIdx.x, fetch_begin = first;
  auto begin_tile = [&] {
    for_planes([&](auto plane) {
      constexpr int p = decltype(plane)::value, width = WIDTHS[p];
      planes[p] = w.tile(p, fetch_tile) + first * (width * 4 * WARP) + lane * 4 * (width < 4 ? width : 4);
    });
    groups = GroupReader(w, fetch_tile, lane);
    if (span) groups.advance(group_of(2 * first));
  };
  auto next_turn = [&] {
    fetch_begin += turn;
    if (fetch_begin < w.units) {
      for_planes([&](auto plane) {
        constexpr int p = decltype(plane)::value;
        planes[p] += turn * WIDTHS[p] * 4 * WARP;
      });
      if (span) groups.advance(DEPTH * span);
    } else {
      fetch_begin = first;
      fetch_tile += gridDim.x;
      begin_tile();
    }
  };
  auto fetch = [&](Flight& flight, int slot) {
    const int unit = fetch_begin + slot * stride;
    if (unit >= w.units || fetch_tile >= w.tiles) return;  // what is there is multiplied by 0
    for_planes([&](auto plane) {
      constexpr int p = decltype(plane)::value, width = WIDTHS[p];
      const u8* from = planes[p] + slot * (stride * width * 4 * WARP);
      u32* words = flight.codes.word + bits_before(p);
      load_once<width < 4 ? width : 4>(words, from);
      if constexpr (width == 8) load_once<4>(words + 4, from + 16 * WARP);
    });
#pragma unroll
    for (int i = 0; i < FLUSHES; ++i) {
      const int group = span ? slot * span : group_of(2 * unit + i);
      groups.load(flight.groups[i], FLUSHES > 1 ? min(group, w.groups - 1) : group);
    }
  };

  // Activations come from nearer by: one unit ahead. Beyond the last row they are those of the last, and their
  // results go nowhere; beyond the last column they are 0.
  const u16* rows[N_TILES];
#pragma unroll
  for (int i = 0; i < N_TILES; ++i) {
    rows[i] = x + static_cast<u64>(min(m0 + 8 * i + lane / 4, m - 1)) * k + first * COLUMNS + lane % 4 * 8;
  }
  Activations near[2][N_TILES][2];
  auto fetch_x = [&](Activations(&to)[N_TILES][2], int begin, int slot, bool inside) {
#pragma unroll
    for (int i = 0; i < N_TILES; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = slot * stride * COLUMNS + 32 * half;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (inside || begin * COLUMNS + column + lane % 4 * 8 < k) {
          words = __ldg(reinterpret_cast<const uint4*>(rows[i] + column));
        }
        to[i][half] = {words.x, words.y, words.z, words.w};
      }
  };

  const Masks mask = masks(n >> 31);
  float total[N_TILES][4];
  auto multiply = [&](const Flight& flight, const Activations(&b)[N_TILES][2]) {
    GroupSums group[N_TILES] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const Group& values = flight.groups[step / 2 * (FLUSHES - 1)];
      u32 a[4];
      decode(a, flight.codes, step, offsets_of(values), mask);
#pragma unroll
      for (int i = 0; i < N_TILES; ++i) {
        const u32* words = b[i][step / 2].word + step % 2 * 2;
        group[i].add(a, words[0], words[1]);
        if (step == 3 || (step == 1 && FLUSHES == 2)) {
          group[i].scale(total[i], values);
          group[i] = {};
        }
      }
    }
  };
  auto take = [&](int begin, bool inside) {
    next_turn();
    const bool last = begin + turn >= w.units;
#pragma unroll
    for (int slot = 0; slot < DEPTH; ++slot) {
      if (slot + 1 < DEPTH) {
        fetch_x(near[(slot + 1) % 2], begin, slot + 1, inside);
      } else {
#pragma unroll
        for (int i = 0; i < N_TILES; ++i) rows[i] += (last ? first - begin : turn) * COLUMNS;
        fetch_x(near[0], last ? first : begin + turn, 0, false);
      }
      multiply(flights[slot], near[slot % 2]);
      fetch(flights[slot], slot);
    }
  };

  begin_tile();
#pragma unroll
  for (int slot = 0; slot < DEPTH; ++slot) fetch(flights[slot], slot);
  fetch_x(near[0], first, 0, false);
  int buffer = 0;
  for (int tile = blockIdx.x; tile < w.tiles; tile += gridDim.x) {
#pragma unroll
    for (int i = 0; i < N_TILES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) total[i][j] = 0.0f;
    int begin = first;
    for (; (begin + turn - stride + 1) * COLUMNS <= k; begin += turn) take(begin, true);
    if (begin < w.units) take(begin, false);

    put<N_TILES, ROWS>(sums[buffer] + threadIdx.x / WARP * 8 * N_TILES * padded(ROWS), total, 0, lane);
    __syncthreads();  // the other buffer may still be read
    store<ROWS, 8 * N_TILES, WARPS, WARPS * WARP>(sums[buffer], {y, bias, bias_f32, m, n}, tile * ROWS, m0);
    buffer ^= 1;
  }
}
