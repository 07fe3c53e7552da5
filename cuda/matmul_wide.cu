// Many rows of x on Hopper: W enters wgmma from registers, x from shared memory. A warp group copies STAGES stages
// of UNITS units ahead, GROUPS times SHARES warp groups multiply 64 rows of W each by 8·N_TILES rows of x: SHARES of
// them the same rows, whose stages they take in turns. A block whose sums are whole goes on from tile to tile: the
// stages of the next one are copied while results leave.
//
// SPLITS blocks, a cluster, share the columns. Codes are scaled on their way to the matrix unit, and rounded as
// `unpack` rounds them. ORDERED: x has its columns in the order in which W lies, as `matmul_order` leaves them; else
// it lies as ever, and four lanes exchange codes.
#include "choice.cuh"
#include "exchange.cuh"
#include "hopper.cuh"
#include "sums.cuh"

#if !defined(N_TILES) || !defined(GROUPS) || !defined(SHARES) || !defined(STAGES) || \
    !defined(UNITS) || !defined(ORDERED) || !defined(HALVED)
#error "N_TILES: rows of x by 8; GROUPS, SHARES: warp groups that multiply; STAGES of UNITS units; ORDERED, HALVED"
#endif

constexpr bool STAYS = SPLITS * SHARES == 1;  // a block takes one tile after the other

constexpr int MULTIPLIERS = GROUPS * SHARES * GROUP_THREADS, THREADS = MULTIPLIERS + GROUP_THREADS;
constexpr int BLOCK_TILES = 4 * GROUPS, BLOCK_ROWS = ROWS * BLOCK_TILES, BLOCK_COLS = 8 * N_TILES;
constexpr int X_UNIT_BYTES = BLOCK_COLS * COLUMNS * 2, X_BYTES = UNITS * X_UNIT_BYTES;
constexpr int TILE_BYTES = UNITS * BITS * WARP * 4;
constexpr int STAGE_BYTES = X_BYTES + (BLOCK_TILES * TILE_BYTES + 1023) / 1024 * 1024;

// HALVED: tiles that are left when all blocks have had as many go to two blocks each, half of the rows of x to either.
static_assert(!HALVED || (STAYS && N_TILES % 8 == 0), "halves of tiles that one block multiplies");

// Rows of x that are copied at a time.
constexpr int BOX_ROWS = BLOCK_COLS / (HALVED ? 2 : 1), BOX_BYTES = BOX_ROWS * COLUMNS * 2;

// Registers: a block may have so many in all; those that copy leave theirs to those that multiply.
constexpr int REGISTERS = 65536 / THREADS / 8 * 8, OF_COPIES = MULTIPLIERS > 3 * GROUP_THREADS ? 24 : 40;
constexpr int LEFT = (REGISTERS * THREADS - OF_COPIES * GROUP_THREADS) / MULTIPLIERS / 8 * 8;
constexpr int OF_PRODUCTS = LEFT < 240 ? LEFT : 240;

static_assert(SHARES <= 2, "sums of two warps meet");
static_assert(STAGES > SHARES, "a stage is done with when the next one of its warp group is there");

// What is multiplied at a time, in two parts of steps of 16 columns: while the matrix unit has one, codes are decoded
// to the operands of the other. With few rows of x, parts are long, as the unit is soon done with them.
constexpr int BLOCK_HALVES = UNITS == 1 ? 2 : UNITS < 4 || N_TILES > 8 ? 4 : 8;
constexpr int STAGE_BLOCKS = 2 * UNITS / BLOCK_HALVES, BLOCK_UNITS = BLOCK_HALVES / 2;
constexpr int PART_STEPS = BLOCK_HALVES, BLOCK_STEPS = 2 * PART_STEPS;

// Halves side by side that are of one group wherever they lie, and how many such spans a block has.
constexpr int SPAN = BLOCK_HALVES >= 4 && HALVES % 4 == 0 ? 4 : HALVES % 2 == 0 ? 2 : 1;
constexpr int BLOCK_SPANS = BLOCK_HALVES / SPAN;

// The matrix unit -------------------------------------------------------------------------------------------

#define REGISTERS_8(i) "+f"(d[(i) / 4][0]), "+f"(d[(i) / 4][1]), "+f"(d[(i) / 4][2]), "+f"(d[(i) / 4][3]), \
                       "+f"(d[(i) / 4 + 1][0]), "+f"(d[(i) / 4 + 1][1]), "+f"(d[(i) / 4 + 1][2]), "+f"(d[(i) / 4 + 1][3])
#define REGISTERS_16(i) REGISTERS_8(i), REGISTERS_8(i + 8)
#define REGISTERS_32(i) REGISTERS_16(i), REGISTERS_16(i + 16)
#define REGISTERS_64(i) REGISTERS_32(i), REGISTERS_32(i + 32)
#define TEN(t) ",%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define EIGHT "%0,%1,%2,%3,%4,%5,%6,%7"
#define SIXTY EIGHT ",%8,%9" TEN(1) TEN(2) TEN(3) TEN(4) TEN(5)
#if BF16
#define HALF_TYPES ".f32.bf16.bf16 {"
#else
#define HALF_TYPES ".f32.f16.f16 {"
#endif
// The operands behind `d`, by their numbers.
#define WGMMA(shape, d_list, a0, a1, a2, a3, b) \
  "wgmma.mma_async.sync.aligned." shape HALF_TYPES d_list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1, 0;"

// d += a · b. A warp's 16 rows of the 64 of its group by 16 columns; those columns of 8·N rows of x.
template <int N>
__device__ __forceinline__ void multiply(float (&d)[N][4], const u32 (&a)[4], u64 b) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma is part of sm_90a alone"
#endif
  static_assert(N == 4 || N == 8 || N == 16 || N == 24 || N == 32, "32 to 256 rows of x");
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
  if constexpr (N == 4) {
    asm volatile(WGMMA("m64n32k16", EIGHT ",%8,%9,%10,%11,%12,%13,%14,%15", 16, 17, 18, 19, 20)
                 : REGISTERS_16(0) : OPERANDS);
  } else if constexpr (N == 8) {
    asm volatile(WGMMA("m64n64k16", EIGHT ",%8,%9" TEN(1) TEN(2) ",%30,%31", 32, 33, 34, 35, 36)
                 : REGISTERS_32(0) : OPERANDS);
  } else if constexpr (N == 16) {
    asm volatile(WGMMA("m64n128k16", SIXTY ",%60,%61,%62,%63", 64, 65, 66, 67, 68) : REGISTERS_64(0) : OPERANDS);
  } else if constexpr (N == 24) {
    asm volatile(WGMMA("m64n192k16", SIXTY TEN(6) TEN(7) TEN(8) ",%90,%91,%92,%93,%94,%95", 96, 97, 98, 99, 100)
                 : REGISTERS_64(0), REGISTERS_32(64) : OPERANDS);
  } else {
    asm volatile(WGMMA("m64n256k16", SIXTY TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
                       ",%120,%121,%122,%123,%124,%125,%126,%127", 128, 129, 130, 131, 132)
                 : REGISTERS_64(0), REGISTERS_64(64) : OPERANDS);
  }
#undef OPERANDS
}

// Keeps reads and writes of sums on their side of what the compiler does not see, and of operands.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

// Codes and maps --------------------------------------------------------------------------------------------

// Where plane `plane` begins in the codes of a stage: plane ▸ tile ▸ unit ▸ lane ▸ words.
constexpr int plane_in_stage(int plane) { return bits_before(plane) * BLOCK_TILES * UNITS * WARP * 4; }

// Keeps what is decoded next behind the products that read what was before.
__device__ __forceinline__ void settle_operand(u32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// Results ---------------------------------------------------------------------------------------------------

constexpr int RESULT_BYTES = 2 * ROWS * WARP;  // of a warp at a time: ROWS rows of W, WARP of x

// The results of a warp to y, from row `row0` of W and `m0` of x on, by way of shared memory of its own.
template <int N>
__device__ __forceinline__ void store_results(u32 own, const float (&sums)[N][4], const Output& out, int row0, int m0,
                                              int lane) {
  const float bias[] = {bias_of(out, row0 + lane / 4), bias_of(out, row0 + lane / 4 + 8)};
  // A row of x, two times eight rows of W; these change places every four rows, so that eight lanes meet all banks.
  const auto place = [&](int col, int part) { return own + 2 * ROWS * col + 16 * (part ^ col / 4 % 2); };
  const u32 to = place(lane / 16 * 8 + lane % 8, lane / 8 % 2), from = place(lane / 2, lane % 2);
  const int row = row0 + lane % 2 * 8;
  const bool aligned = out.n % 8 == 0 && reinterpret_cast<u64>(out.y) % 16 == 0;
  u16* y = out.y + static_cast<u64>(m0 + lane / 2) * out.n + row;
  int left = row < out.n ? out.m - m0 - lane / 2 : 0;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2 && i + 2 * half < N; ++half) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = sums[i + 2 * half + j / 2] + j % 2 * 2;
        words[j] = round_halves(finish(pair[0] * (1 / UNIT), bias[j % 2]), finish(pair[1] * (1 / UNIT), bias[j % 2]));
      }
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                       to + half * (RESULT_BYTES / 2)),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2 && i + 2 * half < N; ++half) {
      u32 words[4];
      read_shared(words, from + half * (RESULT_BYTES / 2));
      if (left > 0) {
        if (aligned) *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
        else store_halves<8>(out, m0 + 8 * i + 16 * half + lane / 2, row, words);
      }
      y += 16 * static_cast<u64>(out.n), left -= 16;
    }
  }
}

// Tiles -----------------------------------------------------------------------------------------------------

struct Tile {
  int first, m0;  // of W in tiles of 16 rows; row of x
  bool half;      // of the rows of x
};

// Quotients by a number that is known long before: a division takes as long as a step of products.
struct Divisor {
  u32 by, inverse;

  __device__ __forceinline__ void set(u32 divisor) { by = divisor, inverse = ~0u / divisor; }

  __device__ __forceinline__ u32 quotient(u32 x) const {
    const u32 near = __umulhi(x, inverse);  // one too small at most
    return near + (x - near * by >= by);
  }
};

constexpr int BAND = 4;

// What blocks have to do, in the order in which they take it: BAND tiles side by side in x go through the rows of W
// together, so that few bytes of both serve what is done at a time. In shared memory: registers are short.
struct Tiles {
  int columns, whole, count;
  Divisor band, last;  // tiles of a band; columns of the last one

  __device__ __forceinline__ void set(int m, int n) {
    const int rows = (n + BLOCK_ROWS - 1) / BLOCK_ROWS;
    columns = (m + BLOCK_COLS - 1) / BLOCK_COLS;
    if (columns > 1) band.set(BAND * rows), last.set((columns - 1) % BAND + 1);
    const int tiles = rows * columns, halves = HALVED ? tiles % gridDim.x : 0;
    whole = tiles - halves, count = tiles + halves;
  }

  // Calls `f` with each tile of this block, of which the first is `tile`, and its number.
  template <typename F>
  __device__ __forceinline__ void each(Tile tile, F f) const {
    int number = blockIdx.x;
#pragma unroll 1
    while (true) {
      f(tile, number);
      number += gridDim.x;
      if (!STAYS || number >= count) break;
      tile = (*this)[number];
    }
  }

  __device__ __forceinline__ Tile operator[](int number) const {
    const bool half = HALVED && number >= whole;
    const int tile = half ? (whole + number) / 2 : number, second = half && (number - whole) % 2 ? BLOCK_COLS / 2 : 0;
    if (columns == 1) return {tile * BLOCK_TILES, second, half};
    const int bands = band.quotient(tile), within = tile - bands * band.by, height = min(BAND, columns - bands * BAND);
    const int row = height == BAND ? within / BAND : last.quotient(within);
    return {row * BLOCK_TILES, (bands * BAND + within - row * height) * BLOCK_COLS + second, half};
  }
};

// Of x, and of the planes of W: one argument, the last of the kernel.
struct TensorMaps {
  TensorMap x, planes[COUNT];
};

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: a block a tile, or fewer that take several; SPLITS. Maps are of x, in boxes
// of BOX_ROWS rows, and of planes whose rows are tiles of W, BLOCK_TILES of a stage at a time.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
    matmul_wide(CHOICE const u8* packed, const void* scales, const u8* zero_points, const void* bias, int bias_f32, u16* y,
                int m, int n, int k, const __grid_constant__ TensorMaps maps) {
  UNLESS_CHOSEN;
  let_next_begin();
  extern __shared__ u8 memory[];
  __shared__ u64 full[STAGES], empty[STAGES];
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  u32 base = (shared_address(memory) + 1023) & ~1023u, fulls = shared_address(full), empties = shared_address(empty);
  asm("" : "+r"(base), "+r"(fulls), "+r"(empties));  // or each use works them out again
  __shared__ Tiles tiles;
  const int stages = (w.units + UNITS - 1) / UNITS;
  const int begin = stages * blockIdx.y / SPLITS, end = stages * (blockIdx.y + 1) / SPLITS;
  if (threadIdx.x < STAGES) {
    barrier_init(fulls + 8 * threadIdx.x, 2);
    barrier_init(empties + 8 * threadIdx.x, BLOCK_TILES);
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
  }
  if (threadIdx.x == WARP) tiles.set(m, n);
  __syncthreads();

  const Tile begins = tiles[blockIdx.x];
  const int lane = threadIdx.x % WARP, last = w.tiles - 1;
  if (threadIdx.x >= MULTIPLIERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(OF_COPIES));
    // One warp copies W, which nothing writes while the kernel in front may still run, or this launch would not have
    // been early; another x, when that has ended.
    const int warp = threadIdx.x / WARP - MULTIPLIERS / WARP;
    Slot slot;
    if (warp == 0) {
      tiles.each(begins, [&](const Tile& tile, int) {
        for (int stage = begin; stage < end; ++stage, slot.advance()) {
          const u32 barrier = fulls + 8 * slot.stage, to = base + slot.stage * STAGE_BYTES + X_BYTES;
          barrier_wait(empties + 8 * slot.stage, slot.parity ^ 1);
          if (lane == 0) {
            barrier_expect(barrier, BLOCK_TILES * TILE_BYTES);
            for_planes([&](auto plane) {
              constexpr int p = decltype(plane)::value;
              copy_tile(to + plane_in_stage(p), maps.planes[p], stage * (UNITS * WIDTHS[p] * WARP / 2), tile.first,
                        barrier);
            });
          }
          __syncwarp();
          if (lane < BLOCK_TILES) {
            GroupReader(w, min(tile.first + lane, last), 0).prefetch(min(group_of(2 * UNITS * stage), w.groups - 1));
          }
        }
      });
    } else if (warp == 1 && lane == 0) {
      wait_for_last();
      tiles.each(begins, [&](const Tile& tile, int) {
        for (int stage = begin; stage < end; ++stage, slot.advance()) {
          const u32 barrier = fulls + 8 * slot.stage, to = base + slot.stage * STAGE_BYTES;
          barrier_wait(empties + 8 * slot.stage, slot.parity ^ 1);
          barrier_expect(barrier, X_BYTES >> tile.half);
#pragma unroll
          for (int part = 0; part < UNITS; ++part) {
            for (int box = 0; box < BLOCK_COLS / BOX_ROWS >> tile.half; ++box) {
              copy_tile(to + part * X_UNIT_BYTES + box * BOX_BYTES, maps.x, (stage * UNITS + part) * (2 * COLUMNS),
                        tile.m0 + box * BOX_ROWS, barrier);
            }
          }
        }
      });
    }
    __syncwarp();
    if constexpr (SPLITS > 1) {
      cluster_sync();
      cluster_sync();
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OF_PRODUCTS));
  const int tile_of_warp = threadIdx.x / WARP % BLOCK_TILES, share = threadIdx.x / WARP / BLOCK_TILES;
  const Masks mask = masks(n >> 31);
  const Exchange exchange(lane);
  const Output out = {y, bias, bias_f32, m, n};
  Group now[BLOCK_SPANS], next[BLOCK_SPANS], after[BLOCK_SPANS];
  auto fetch_groups = [&](const GroupReader& groups, Group(&to)[BLOCK_SPANS], int half) {
#pragma unroll
    for (int i = 0; i < BLOCK_SPANS; ++i) groups.load(to[i], min(group_of(half + i * SPAN), w.groups - 1));
  };
  // Where block `block` of stage `stage` begins, or a later one of the stages that this warp takes.
  auto half_of = [&](int stage, int block) {
    return 2 * UNITS * (stage + block / STAGE_BLOCKS * SHARES) + block % STAGE_BLOCKS * BLOCK_HALVES;
  };
  Words<BITS> codes[BLOCK_UNITS];
  auto read_codes = [&](u32 stage, int block) {
#pragma unroll
    for (int unit = 0; unit < BLOCK_UNITS; ++unit) {
      read_unit<plane_in_stage, UNITS>(codes[unit], stage + X_BYTES, tile_of_warp, block * BLOCK_UNITS + unit, lane);
      if constexpr (!ORDERED) exchange(codes[unit]);
    }
  };
  u32 a[BLOCK_STEPS][4];
  auto prepare = [&](int first, const Group(&of)[BLOCK_SPANS]) {
    const int last = first + PART_STEPS;
    auto group = [&](int step) -> const Group& { return of[step / 2 / SPAN]; };
#pragma unroll
    for (int step = first; step < last; ++step) settle_operand(a[step]);
    if constexpr (ONE_LINE) {
      bool one_line = true;
#pragma unroll
      for (int step = first; step < last; ++step) one_line &= has_line(group(step));
      if (one_line) {
#pragma unroll
        for (int step = first; step < last; ++step) {
          decode(a[step], codes[step / 4], step % 4, scaled_line_of(group(step)), mask);
        }
        return;
      }
    }
#pragma unroll
    for (int step = first; step < last; ++step) {
      decode(a[step], codes[step / 4], step % 4, line_of(group(step)), mask);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) a[step][pair] = scaled(a[step][pair], group(step), pair % 2);
    }
  };

  Slot slot;
  const int first_stage = begin + share;
  slot.advance(share);
  GroupReader groups(w, 0, lane);
  // Fetches what a tile begins with.
  const auto take = [&](const Tile& tile) {
    groups = GroupReader(w, min(tile.first + tile_of_warp, last), lane);
    fetch_groups(groups, now, half_of(first_stage, 0));
    fetch_groups(groups, next, half_of(first_stage, 1));
  };

  // A tile of 8·N rows of x. Where it lies is worked out again in the end: registers are short meanwhile.
  const auto multiply_tile = [&](auto n_tiles, int number) {
    constexpr int N = decltype(n_tiles)::value;
    float sums[N][4] = {};
    if (first_stage < end) {
      barrier_wait(fulls + 8 * slot.stage, slot.parity);
      read_codes(base + slot.stage * STAGE_BYTES, 0);
      prepare(0, now);
    }
    u32 empty_before = 0;
#pragma unroll 1
    for (int stage = first_stage; stage < end; stage += SHARES) {
      const bool goes_on = stage + SHARES < end;
      const u32 here = base + slot.stage * STAGE_BYTES, empty_here = empties + 8 * slot.stage;
      const u64 b = descriptor(__shfl_sync(~0u, here, 0));
      slot.advance(SHARES);
#pragma unroll
      for (int block = 0; block < STAGE_BLOCKS; ++block) {
        const bool ends = block + 1 == STAGE_BLOCKS, last_of_all = ends && !goes_on;
        auto multiply_part = [&](int first) {
          settle(sums);
          multiply_begin();
#pragma unroll
          for (int step = first; step < first + PART_STEPS; ++step) {
            const int at = block * BLOCK_STEPS + step;
            multiply(sums, a[step], b + at / 4 * (X_UNIT_BYTES >> 4) + at % 4 * 2);
          }
          multiply_commit();
          settle(sums);
        };
        multiply_part(0);
        fetch_groups(groups, after, half_of(stage, block + 2));
        multiply_wait<1>();
        if (block == 0 && stage != first_stage && lane == 0) barrier_arrive(empty_before);
        prepare(PART_STEPS, now);
        multiply_part(PART_STEPS);
        if (ends && goes_on) barrier_wait(fulls + 8 * slot.stage, slot.parity);
        if (!last_of_all) read_codes(ends ? base + slot.stage * STAGE_BYTES : here, ends ? 0 : block + 1);
        multiply_wait<1>();
        if (!last_of_all) prepare(0, next);
#pragma unroll
        for (int i = 0; i < BLOCK_SPANS; ++i) now[i] = next[i], next[i] = after[i];
      }
      empty_before = empty_here;
    }
    multiply_wait<0>();
    settle(sums);
    wait_for_last();  // of which a warp that copies nothing may know nothing
    const Tile tile = tiles[number];
    const int row0 = (tile.first + tile_of_warp) * ROWS;
    constexpr auto all_here = [] { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); };
    float* slab = reinterpret_cast<float*>(memory + (base - shared_address(memory)));
    if constexpr (STAYS) {
      if (lane == 0) barrier_arrive(empty_before);
      if (number + gridDim.x < tiles.count) take(tiles[number + gridDim.x]);
      store_results(base + STAGES * STAGE_BYTES + tile_of_warp * RESULT_BYTES, sums, out, row0, tile.m0, lane);
    } else if constexpr (SPLITS > 1) {
      all_here();  // no stage is read any more
      put<N, BLOCK_ROWS>(slab + share * (BLOCK_COLS * padded(BLOCK_ROWS)), sums, tile_of_warp * ROWS, lane);
      all_here();
      store<BLOCK_ROWS, BLOCK_COLS, SHARES, MULTIPLIERS>(slab, out, tile.first * ROWS, tile.m0);
    } else {
      // Of two warps that have multiplied the same rows each finishes half of the rows of x.
      constexpr int HALF = N / 2, SLAB_BYTES = HALF * MULTIPLIERS * 16;
      all_here();  // no stage is read any more
      auto meet = [&](auto half) {
        constexpr int own = decltype(half)::value * HALF, other = HALF - own;
        float4* met = reinterpret_cast<float4*>(slab);
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
          const float(&from)[4] = sums[other + i];
          met[i * MULTIPLIERS + threadIdx.x] = make_float4(from[0], from[1], from[2], from[3]);
        }
        all_here();
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
          const float4 from = met[i * MULTIPLIERS + (threadIdx.x ^ MULTIPLIERS / 2)];
          float(&to)[4] = sums[own + i];
          to[0] += from.x, to[1] += from.y, to[2] += from.z, to[3] += from.w;
        }
        const auto& finished = reinterpret_cast<const float(&)[HALF][4]>(sums[own]);
        const u32 way = base + SLAB_BYTES + threadIdx.x / WARP * RESULT_BYTES;
        store_results(way, finished, out, row0, tile.m0 + 8 * own, lane);
      };
      if (share == 0) meet(Constant<0>{});
      else meet(Constant<1>{});
    }
  };
  take(begins);
  tiles.each(begins, [&](const Tile&, int number) {
    if (HALVED && number >= tiles.whole) multiply_tile(Constant<HALVED ? N_TILES / 2 : N_TILES>{}, number);
    else multiply_tile(Constant<N_TILES>{}, number);
  });
}
