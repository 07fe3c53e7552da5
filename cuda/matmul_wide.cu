// Many rows of x on Hopper: W enters wgmma from registers, x from shared memory. A warp group copies STAGES stages
// of UNITS units ahead, GROUPS times SHARES warp groups multiply 64 rows of W each by 8·N_TILES rows of x: SHARES of
// them the same rows, whose stages they take in turns.
//
// SPLITS blocks, a cluster, share the columns. Codes are scaled on their way to the matrix unit, and rounded as
// `unpack` rounds them. ORDERED: x has its columns in the order in which W lies, as `matmul_order` leaves them; else
// it lies as ever, and four lanes exchange codes.
#include "choice.cuh"
#include "exchange.cuh"
#include "hopper.cuh"
#include "sums.cuh"

#if !defined(N_TILES) || !defined(GROUPS) || !defined(SHARES) || !defined(STAGES) || \
    !defined(UNITS) || !defined(ORDERED)
#error "N_TILES: rows of x by 8; GROUPS, SHARES: warp groups that multiply; STAGES of UNITS units; ORDERED"
#endif

constexpr int MULTIPLIERS = GROUPS * SHARES * GROUP_THREADS, THREADS = MULTIPLIERS + GROUP_THREADS;
constexpr int BLOCK_TILES = 4 * GROUPS, BLOCK_ROWS = ROWS * BLOCK_TILES, BLOCK_COLS = 8 * N_TILES;
constexpr int X_UNIT_BYTES = BLOCK_COLS * COLUMNS * 2, X_BYTES = UNITS * X_UNIT_BYTES;
constexpr int TILE_BYTES = UNITS * BITS * WARP * 4;
constexpr int STAGE_BYTES = X_BYTES + (BLOCK_TILES * TILE_BYTES + 1023) / 1024 * 1024;

// Registers: a block may have so many in all; those that copy leave theirs to those that multiply.
constexpr int REGISTERS = 65536 / THREADS / 8 * 8, OF_COPIES = MULTIPLIERS > 3 * GROUP_THREADS ? 24 : 40;
constexpr int LEFT = (REGISTERS * THREADS - OF_COPIES * GROUP_THREADS) / MULTIPLIERS / 8 * 8;
constexpr int OF_PRODUCTS = LEFT < 240 ? LEFT : 240;

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

// Padded so that the rows of eight results that one instruction writes lie in different banks.
constexpr int RESULT_ROWS = BLOCK_ROWS + 8;

// The results of a warp in shared memory: rows of x ▸ RESULT_ROWS of W, halves.
__device__ __forceinline__ void put_results(u32 to, const float (&total)[N_TILES][4], const Output& out,
                                            int tile_of_warp, int lane, int tile0) {
  const int row = (tile0 + tile_of_warp) * ROWS + lane / 4;
  const float bias[] = {bias_of(out, row), bias_of(out, row + 8)};
  // Four blocks of 8 by 8 at a time: both halves of the rows of W, by 16 rows of x.
  const u32 at = to + 2 * ((lane / 16 * 8 + lane % 8) * RESULT_ROWS + tile_of_warp * ROWS + lane / 8 % 2 * 8);
#pragma unroll
  for (int i = 0; i < N_TILES; i += 2) {
    u32 words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* sums = total[i + j / 2] + j % 2 * 2;
      words[j] = round_halves(finish(sums[0] * (1 / UNIT), bias[j % 2]), finish(sums[1] * (1 / UNIT), bias[j % 2]));
    }
    const u32 block = at + i * (16 * RESULT_ROWS);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(block), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

// Of x, and of the planes of W: one argument, the last of the kernel.
struct TensorMaps {
  TensorMap x, planes[COUNT];
};

// y (m, n) = x (m, k) · Wᵀ (+ bias). Grid: BLOCK_ROWS rows of W; SPLITS; blocks of BLOCK_COLS rows of x. Maps are of
// x, in tiles of BLOCK_COLS rows, and of planes whose rows are tiles of W, BLOCK_TILES of a stage at a time.
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
  const int tile0 = blockIdx.x * BLOCK_TILES, m0 = blockIdx.z * BLOCK_COLS;
  const int stages = (w.units + UNITS - 1) / UNITS;
  const int begin = stages * blockIdx.y / SPLITS, end = stages * (blockIdx.y + 1) / SPLITS;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(fulls + 8 * stage, 2);
      barrier_init(empties + 8 * stage, BLOCK_TILES);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
  }
  __syncthreads();

  const int lane = threadIdx.x % WARP, last = w.tiles - 1;
  if (threadIdx.x >= MULTIPLIERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(OF_COPIES));
    // One warp copies W, which nothing writes while the kernel in front may still run, or this launch would not have
    // been early; another x, when that has ended.
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
  const int tile_of_warp = threadIdx.x / WARP % BLOCK_TILES, share = threadIdx.x / WARP / BLOCK_TILES;
  const GroupReader groups(w, min(tile0 + tile_of_warp, last), lane);
  const Masks mask = masks(n >> 31);
  const Exchange exchange(lane);
  float sums[N_TILES][4] = {};
  Group now[BLOCK_SPANS], next[BLOCK_SPANS], after[BLOCK_SPANS];
  auto fetch_groups = [&](Group(&to)[BLOCK_SPANS], int half) {
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
  if (first_stage < end) {
    fetch_groups(now, half_of(first_stage, 0));
    fetch_groups(next, half_of(first_stage, 1));
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
#pragma unroll
    for (int block = 0; block < STAGE_BLOCKS; ++block) {
      const bool ends = block + 1 == STAGE_BLOCKS, last_of_all = ends && !goes_on;
      const int following = ends ? 0 : block + 1;
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
      fetch_groups(after, half_of(stage, block + 2));
      multiply_wait<1>();
      if (block == 0 && stage != first_stage && lane == 0) barrier_arrive(empty_before);
      prepare(PART_STEPS, now);
      multiply_part(PART_STEPS);
      if (ends && goes_on) {
        slot.advance(SHARES);
        barrier_wait(fulls + 8 * slot.stage, slot.parity);
      }
      if (!last_of_all) read_codes(ends ? base + slot.stage * STAGE_BYTES : here, following);
      multiply_wait<1>();
      if (!last_of_all) prepare(0, next);
#pragma unroll
      for (int i = 0; i < BLOCK_SPANS; ++i) now[i] = next[i], next[i] = after[i];
    }
    empty_before = empty_here;
  }
  multiply_wait<0>();
  settle(sums);

  const Output out = {y, bias, bias_f32, m, n};
  constexpr auto all_here = [] { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); };
  wait_for_last();  // of which a warp that had no stage may know nothing
  all_here();       // no stage is read any more
  if constexpr (SPLITS * SHARES == 1) {
    put_results(base, sums, out, tile_of_warp, lane, tile0);
    all_here();
    for (int chunk = threadIdx.x; chunk < BLOCK_COLS * BLOCK_ROWS / 8; chunk += MULTIPLIERS) {
      const int row = chunk % (BLOCK_ROWS / 8) * 8, col = chunk / (BLOCK_ROWS / 8);
      if (m0 + col >= m) break;
      u32 words[4];
      read_shared(words, base + 2 * (col * RESULT_ROWS + row));
      store_halves<8>(out, m0 + col, tile0 * ROWS + row, words);
    }
  } else {
    float* slabs = reinterpret_cast<float*>(memory + (base - shared_address(memory)));
    put<N_TILES, BLOCK_ROWS>(slabs + share * (BLOCK_COLS * padded(BLOCK_ROWS)), sums, tile_of_warp * ROWS, lane);
    all_here();
    store<BLOCK_ROWS, BLOCK_COLS, SHARES, MULTIPLIERS>(slabs, out, tile0 * ROWS, m0);
  }
}
