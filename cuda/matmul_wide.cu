// Many rows of x on Hopper: W enters wgmma from registers, x from shared memory. A warp group copies STAGES stages
// of 128 columns ahead, GROUPS warp groups multiply 64 rows of W each by 8·N_TILES rows of x.
//
// SPLITS blocks, a cluster, share the columns.
// SCALED: codes are scaled on their way to the matrix unit, rounded as `unpack` does; else sums are, and a code less
// its zero point, with any fraction of that, has to be exact in 16 bits.
#include "choice.cuh"
#include "hopper.cuh"
#include "sums.cuh"

#if !defined(N_TILES) || !defined(GROUPS) || !defined(STAGES) || !defined(UNITS) || !defined(SCALED)
#error "N_TILES: rows of x by 8; GROUPS: warp groups that multiply; STAGES of UNITS units; SCALED"
#endif

constexpr int MULTIPLIERS = GROUPS * GROUP_THREADS, THREADS = MULTIPLIERS + GROUP_THREADS;
constexpr int BLOCK_TILES = 4 * GROUPS, BLOCK_ROWS = ROWS * BLOCK_TILES, BLOCK_COLS = 8 * N_TILES;
constexpr int X_UNIT_BYTES = BLOCK_COLS * COLUMNS * 2, X_BYTES = UNITS * X_UNIT_BYTES;
constexpr int TILE_BYTES = UNITS * BITS * WARP * 4;
constexpr int STAGE_BYTES = X_BYTES + (BLOCK_TILES * TILE_BYTES + 1023) / 1024 * 1024;

// Registers: a block may have so many in all; those that copy leave theirs to those that multiply.
constexpr int REGISTERS = 65536 / THREADS / 8 * 8, OF_COPIES = GROUPS > 3 ? 24 : 40;
constexpr int LEFT = (REGISTERS * THREADS - OF_COPIES * GROUP_THREADS) / MULTIPLIERS / 8 * 8;
constexpr int OF_PRODUCTS = LEFT < 240 ? LEFT : 240;

// Halves of a unit after which a group may end.
constexpr int FLUSH = HALVES == 0 || HALVES % 4 == 0 ? 4 : HALVES % 2 == 0 ? 2 : 1;

// What is multiplied at a time, in two halves of steps of 16 columns. Codes of the next block are decoded into the
// operands of a half that the matrix unit is done with; or BETWEEN products, one step after another: two warp groups
// that have many sums to scale are faster so.
constexpr int BLOCK_HALVES = SCALED ? 4 : FLUSH, BLOCK_STEPS = 2 * BLOCK_HALVES, HALF_STEPS = BLOCK_HALVES;
constexpr int STAGE_BLOCKS = 2 * UNITS / BLOCK_HALVES;
constexpr bool BETWEEN = !SCALED && N_TILES >= 16 && GROUPS > 1;
constexpr int BLOCK_UNITS = (BLOCK_HALVES + 1) / 2, BLOCK_GROUPS = BLOCK_HALVES / FLUSH;

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
#define WGMMA(shape, d_list, a0, a1, a2, a3, b, more)                                                      \
  "{\n.reg .pred more;\nsetp.ne.b32 more, %" #more ", 0;\nwgmma.mma_async.sync.aligned." shape HALF_TYPES d_list \
  "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", more, 1, 1, 0;\n}"

// d = a · b, `more`: + d. A warp's 16 rows of the 64 of its group by 16 columns; those columns of 8·N rows of x.
template <int N>
__device__ __forceinline__ void multiply(float (&d)[N][4], const u32 (&a)[4], u64 b, int more) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma is part of sm_90a alone"
#endif
  static_assert(N == 2 || N == 4 || N == 8 || N == 16 || N == 32, "16 to 256 rows of x");
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more)
  if constexpr (N == 2) {
    asm volatile(WGMMA("m64n16k16", EIGHT, 8, 9, 10, 11, 12, 13) : REGISTERS_8(0) : OPERANDS);
  } else if constexpr (N == 4) {
    asm volatile(WGMMA("m64n32k16", EIGHT ",%8,%9,%10,%11,%12,%13,%14,%15", 16, 17, 18, 19, 20, 21)
                 : REGISTERS_16(0) : OPERANDS);
  } else if constexpr (N == 8) {
    asm volatile(WGMMA("m64n64k16", EIGHT ",%8,%9" TEN(1) TEN(2) ",%30,%31", 32, 33, 34, 35, 36, 37)
                 : REGISTERS_32(0) : OPERANDS);
  } else if constexpr (N == 16) {
    asm volatile(WGMMA("m64n128k16", SIXTY ",%60,%61,%62,%63", 64, 65, 66, 67, 68, 69) : REGISTERS_64(0) : OPERANDS);
  } else {
    asm volatile(WGMMA("m64n256k16", SIXTY TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
                       ",%120,%121,%122,%123,%124,%125,%126,%127", 128, 129, 130, 131, 132, 133)
                 : REGISTERS_64(0), REGISTERS_64(64) : OPERANDS);
  }
#undef OPERANDS
}

// Keeps reads and writes of sums on their side of what the compiler does not see.
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

// Of x, and of the planes of W: one argument, the last of the kernel.
struct TensorMaps {
  TensorMap x, planes[COUNT];
};

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: BLOCK_ROWS rows of W; SPLITS; blocks of BLOCK_COLS rows
// of x. Maps are of x as `matmul_order` leaves it, in tiles of BLOCK_COLS rows, and of planes whose rows are
// tiles of W, BLOCK_TILES of a stage at a time.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
    matmul_wide(CHOICE const u8* packed, const void* scales, const u8* zero_points, const void* bias, int bias_f32, u16* y,
                int m, int n, int k, const __grid_constant__ TensorMaps maps) {
  UNLESS_CHOSEN;
  extern __shared__ u8 memory[];
  __shared__ u64 full[STAGES], empty[STAGES];
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  const u32 base = (shared_address(memory) + 1023) & ~1023u, fulls = shared_address(full), empties = shared_address(empty);
  const int tile0 = blockIdx.x * BLOCK_TILES, m0 = blockIdx.z * BLOCK_COLS;
  const int stages = (w.units + UNITS - 1) / UNITS;
  const int begin = stages * blockIdx.y / SPLITS, end = stages * (blockIdx.y + 1) / SPLITS;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(fulls + 8 * stage, 2);
      barrier_init(empties + 8 * stage, MULTIPLIERS / WARP);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
  }
  __syncthreads();

  const int lane = threadIdx.x % WARP, last = w.tiles - 1;
  if (threadIdx.x >= MULTIPLIERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(OF_COPIES));
    // One warp copies W, another x, which is there when the kernel before has ended.
    const int warp = threadIdx.x / WARP - MULTIPLIERS / WARP;
    Slot slot;
    if (warp == 0) {
      for (int stage = begin; stage < end; ++stage, slot.advance()) {
        const u32 barrier = fulls + 8 * slot.stage, to = base + slot.stage * STAGE_BYTES + X_BYTES;
        barrier_wait(empties + 8 * slot.stage, slot.parity ^ 1);
        if (lane == 0) {
          barrier_expect(barrier, BLOCK_TILES * TILE_BYTES);
          for_planes([&](auto plane) {
            constexpr int p = decltype(plane)::value;
            copy_tile(to + plane_in_stage(p), maps.planes[p], stage * (UNITS * WIDTHS[p] * WARP / 2), tile0, barrier);
          });
        }
        __syncwarp();
        if (lane < BLOCK_TILES) {
          GroupReader(w, min(tile0 + lane, last), 0).prefetch(min(group_of(2 * UNITS * stage), w.groups - 1));
        }
      }
    } else if (warp == 1 && lane == 0) {
      wait_for_last();
      for (int stage = begin; stage < end; ++stage, slot.advance()) {
        const u32 barrier = fulls + 8 * slot.stage, to = base + slot.stage * STAGE_BYTES;
        barrier_wait(empties + 8 * slot.stage, slot.parity ^ 1);
        barrier_expect(barrier, X_BYTES);
#pragma unroll
        for (int part = 0; part < UNITS; ++part) {
          copy_tile(to + part * X_UNIT_BYTES, maps.x, (stage * UNITS + part) * (2 * COLUMNS), m0, barrier);
        }
      }
    }
    __syncwarp();
    if constexpr (SPLITS > 1) {
      cluster_sync();
      cluster_sync();
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OF_PRODUCTS));
  const int tile_of_warp = threadIdx.x / WARP;
  const GroupReader groups(w, min(tile0 + tile_of_warp, last), lane);
  const Masks mask = masks(n >> 31);
  float sums[N_TILES][4];
  float total[N_TILES][4] = {};
  Group now[BLOCK_GROUPS], next[BLOCK_GROUPS], after[BLOCK_GROUPS];
  auto fetch_groups = [&](Group(&to)[BLOCK_GROUPS], int half) {
#pragma unroll
    for (int i = 0; i < BLOCK_GROUPS; ++i) groups.load(to[i], min(group_of(half + i * FLUSH), w.groups - 1));
  };
  Words<BITS> codes[BLOCK_UNITS];
  auto read_codes = [&](u32 stage, int block) {
#pragma unroll
    for (int unit = 0; unit < BLOCK_UNITS; ++unit) {
      const int of_tile = block * BLOCK_HALVES / 2 + unit;
      read_unit<plane_in_stage, UNITS>(codes[unit], stage + X_BYTES, tile_of_warp, of_tile, lane);
    }
  };
  u32 a[BLOCK_STEPS][4];
  auto prepare_step = [&](int block, int step, const Group(&of)[BLOCK_GROUPS]) {
    const int at = block * BLOCK_STEPS + step;  // of the stage
    const Group& group = of[step / 2 / FLUSH];
    decode(a[step], codes[at / 4 % BLOCK_UNITS], at % 4, offsets_of(group), mask);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      u32& halves = a[step][pair];
      if constexpr (SCALED) halves = scaled(halves, group, pair % 2);
      else if constexpr (FRACTION) halves = add2(halves, twice(-fraction_of_zero(group, pair % 2)));
    }
  };
  auto prepare = [&](int block, int first, const Group(&of)[BLOCK_GROUPS]) {
#pragma unroll
    for (int step = first; step < first + HALF_STEPS; ++step) prepare_step(block, step, of);
  };

  Slot slot;
  int more = 0;
  if (begin < end) {
    fetch_groups(now, 2 * UNITS * begin);
    fetch_groups(next, 2 * UNITS * begin + BLOCK_HALVES);
    barrier_wait(fulls + 8 * slot.stage, slot.parity);
    read_codes(base + slot.stage * STAGE_BYTES, 0);
    prepare(0, 0, now);
    if (!BETWEEN) prepare(0, HALF_STEPS, now);
  }
#pragma unroll 1
  for (int stage = begin; stage < end; ++stage) {
    const bool goes_on = stage + 1 < end;
    const u32 here = base + slot.stage * STAGE_BYTES, empty_here = empties + 8 * slot.stage;
    const u64 b = descriptor(here);
#pragma unroll
    for (int block = 0; block < STAGE_BLOCKS; ++block) {
      const int half = 2 * UNITS * stage + block * BLOCK_HALVES;
      const bool ends = block + 1 == STAGE_BLOCKS;
      fetch_groups(after, half + 2 * BLOCK_HALVES);
      const bool last_of_all = ends && !goes_on;
      const int following = ends ? 0 : block + 1;
      auto multiply_step = [&](int step) {
        const int at = block * BLOCK_STEPS + step;
        multiply(sums, a[step], b + at / 4 * (X_UNIT_BYTES >> 4) + at % 4 * 2, more | step);
      };
      auto read_following = [&] {
        if (ends && goes_on) {
          slot.advance();
          barrier_wait(fulls + 8 * slot.stage, slot.parity);
        }
        if (!last_of_all && (BLOCK_HALVES > 1 || following % 2 == 0)) {
          read_codes(ends ? base + slot.stage * STAGE_BYTES : here, following);
        }
      };
      if constexpr (BETWEEN) {
#pragma unroll
        for (int first = 0; first < BLOCK_STEPS; first += HALF_STEPS) {
          if (first) read_following();
          settle(sums);
#pragma unroll
          for (int step = first; step < first + HALF_STEPS; ++step) {
            multiply_begin();
            multiply_step(step);
            multiply_commit();
            const int other = (step + HALF_STEPS) % BLOCK_STEPS;
            if (first == 0) prepare_step(block, other, now);
            else prepare_step(following, other, next);
            settle_operand(a[other]);
          }
          settle(sums);
          multiply_wait<0>();
        }
      } else {
        settle(sums);
        multiply_begin();
#pragma unroll
        for (int first = 0; first < BLOCK_STEPS; first += HALF_STEPS) {
#pragma unroll
          for (int step = first; step < first + HALF_STEPS; ++step) multiply_step(step);
          multiply_commit();
        }
        settle(sums);
        read_following();
        multiply_wait<1>();
#pragma unroll
        for (int step = 0; step < HALF_STEPS; ++step) settle_operand(a[step]);
        if (!last_of_all) prepare(following, 0, next);
        multiply_wait<0>();
#pragma unroll
        for (int step = HALF_STEPS; step < BLOCK_STEPS; ++step) settle_operand(a[step]);
      }
      settle(sums);
      more = 1;
      if (ends && lane == 0) barrier_arrive(empty_here);
      if constexpr (!SCALED) {
        const int behind = half + BLOCK_HALVES;
        if (HALVES == FLUSH || FLUSH < 4 || last_of_all || group_of(behind - 1) != group_of(behind)) {
#pragma unroll
          for (int i = 0; i < N_TILES; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) total[i][e] = fmaf(scale_of(now[0], e / 2), sums[i][e], total[i][e]);
          more = 0;
        }
      }
      if (!BETWEEN && !last_of_all) prepare(following, HALF_STEPS, next);
#pragma unroll
      for (int i = 0; i < BLOCK_GROUPS; ++i) now[i] = next[i], next[i] = after[i];
    }
  }
  if (SCALED && begin < end) {
#pragma unroll
    for (int i = 0; i < N_TILES; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) total[i][e] = sums[i][e];
  }

  float* slab = reinterpret_cast<float*>(memory + (base - shared_address(memory)));
  asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory");
  put<N_TILES, BLOCK_ROWS>(slab, total, tile_of_warp * ROWS, lane);
  asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory");
  store<BLOCK_ROWS, BLOCK_COLS, 1, MULTIPLIERS>(slab, {y, bias, bias_f32, m, n}, tile0 * ROWS, m0);
}
