// int8 activations by bytes of W whose brackets end with the row, through wgmma, for many rows of x on Hopper: blocks
// that stay, a warp group that copies 128 × 128 bytes of x and N_TILE × 128 of W a stage by tensor maps, and two that
// multiply 64 rows each.
//
// CLUSTER blocks side by side in m share the rows of W: each copies a part, to all of them.
#include "choice.cuh"
#include "matmul_int8_hopper.cuh"

#if !defined(N_TILE) || !defined(STAGES) || !defined(CLUSTER)
#error "N_TILE: 128 or 256; STAGES; CLUSTER"
#endif

constexpr int M_TILE = 128, GROUP_ROWS = 64, K_TILE = 128, STEPS = 4;
constexpr int MULTIPLIERS = M_TILE / GROUP_ROWS;
constexpr int X_BYTES = M_TILE * K_TILE, W_BYTES = N_TILE * K_TILE, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int BAND = 8;  // clusters in m that go through the rows of W together, so that L2 serves them
constexpr int RESULTS = N_TILE / 2;  // of a thread

template <bool V>
struct Constant {
  static constexpr bool value = V;
};

// Barriers --------------------------------------------------------------------------------------------------

// The threads of one warp group.
__device__ __forceinline__ void group_sync(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GROUP_THREADS) : "memory");
}

// The matrix unit -------------------------------------------------------------------------------------------

#define SIXTY FIRST_TEN TEN(1) TEN(2) TEN(3) TEN(4) TEN(5)
#define REGISTERS_64(i) REGISTERS_32(i), REGISTERS_32(i + 32)

// d = a · b, `more`: + d. 64 rows of x by 32 columns, those columns of N_TILE rows of W.
__device__ __forceinline__ void multiply(int (&d)[RESULTS], u64 a, u64 b, int more) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma is part of sm_90a alone"
#elif N_TILE == 256
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %130, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.u8 {" SIXTY TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
               "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, more;\n}"
               : REGISTERS_64(0), REGISTERS_64(64)
               : "l"(a), "l"(b), "r"(more));
#else
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.u8 {" SIXTY "%60,%61,%62,%63}, %64, %65, more;\n}"
               : REGISTERS_64(0)
               : "l"(a), "l"(b), "r"(more));
#endif
}

// Tiles -----------------------------------------------------------------------------------------------------

struct Tile {
  int m0, n0;  // the first row of x of the cluster, and of W
};

struct Tiles {
  int rows, columns;  // of clusters

  __device__ __forceinline__ Tiles(int m, int n)
      : rows((m + M_TILE * CLUSTER - 1) / (M_TILE * CLUSTER)), columns((n + N_TILE - 1) / N_TILE) {}

  __device__ __forceinline__ int count() const { return rows * columns; }

  __device__ __forceinline__ Tile operator[](int number) const {
    const int first = number / (BAND * columns) * BAND, within = number % (BAND * columns), height = min(BAND, rows - first);
    return {(first + within % height) * M_TILE * CLUSTER, within / height * N_TILE};
  }
};

// What the columns of a tile bring, for each warp group; twice, as one is read while the next is written.
struct alignas(16) Columns {
  float scales[2][N_TILE];
  int zero_points[2][ASYMMETRIC ? N_TILE : 4];
  float bias[2][N_TILE];
};

// Four words of each of four lanes to the lanes by the number of the word: lane i gets the i-th of all four.
__device__ __forceinline__ uint4 gather_words(const u32 (&words)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const u32 first = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1);
  const u32 second = __shfl_xor_sync(~0u, odd ? words[2] : words[3], 1);
  const u32 low[2] = {odd ? first : words[0], odd ? words[1] : first};
  const u32 upper[2] = {odd ? second : words[2], odd ? words[3] : second};
  const u32 got0 = __shfl_xor_sync(~0u, high ? low[0] : upper[0], 2);
  const u32 got1 = __shfl_xor_sync(~0u, high ? low[1] : upper[1], 2);
  return high ? make_uint4(got0, got1, upper[0], upper[1]) : make_uint4(low[0], low[1], got0, got1);
}

// y (m, n) = x · Wᵀ (+ bias), by as many clusters as there is room for. Rows of codes are `stride` bytes.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP_THREADS*(1 + MULTIPLIERS), 1)
    matmul_int8_wide(CHOICE const float* x_scales, const int* x_sums, const void* scales, const u8* zero_points,
                     const void* bias, int bias_f32, Number<Y>::Bits* y, int m, int n, int stride, int groups,
                     const __grid_constant__ TensorMaps maps) {
  UNLESS_CHOSEN;
  extern __shared__ u8 memory[];
  __shared__ u64 full[STAGES], empty[STAGES];
  __shared__ Columns shared_columns[MULTIPLIERS];
  const u32 base = (shared_address(memory) + 1023) & ~1023u;
  const u32 fulls = shared_address(full), empties = shared_address(empty);
  const int rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0, k_tiles = (stride + K_TILE - 1) / K_TILE;
  const Tiles tiles(m, n);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(fulls + 8 * stage, 1);
      barrier_init(empties + 8 * stage, CLUSTER * MULTIPLIERS * GROUP_THREADS / WARP);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
  }
  cluster_sync();

  if (threadIdx.x < GROUP_THREADS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(40));
    Slot slot;
    const auto copy_stage = [&](const Tile& tile, int k) {
      const u32 barrier = fulls + 8 * slot.stage, stage = base + slot.stage * STAGE_BYTES;
      barrier_expect(barrier, STAGE_BYTES);
      copy_tile(stage, maps.x, k * K_TILE, tile.m0 + rank * M_TILE, barrier);
      if constexpr (CLUSTER > 1) {
        const int part = rank * (N_TILE / CLUSTER);
        copy_tile_to_all(stage + X_BYTES + part * K_TILE, maps.w, k * K_TILE, tile.n0 + part, barrier);
      } else {
        copy_tile(stage + X_BYTES, maps.w, k * K_TILE, tile.n0, barrier);
      }
    };
    if (threadIdx.x == 0) {
      for (int number = blockIdx.x / CLUSTER; number < tiles.count(); number += gridDim.x / CLUSTER) {
        const Tile tile = tiles[number];
        for (int k = 0; k < k_tiles; ++k) {
          barrier_wait(empties + 8 * slot.stage, slot.parity ^ 1);
          copy_stage(tile, k);
          slot.advance();
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(232));
    const int group = threadIdx.x / GROUP_THREADS - 1, thread = threadIdx.x % GROUP_THREADS;
    const int lane = thread % WARP, warp = thread / WARP;
    Columns& columns = shared_columns[group];
    const Weight w = {scales, zero_points, n, groups};
    const RowReader x = {x_scales, x_sums, m, groups, groups};
    const Output out = {y, bias, bias_f32, m, n};
    const bool vectors = sizeof(Number<Y>::Bits) == 2 && n % 8 == 0 && reinterpret_cast<u64>(y) % 16 == 0;
    Slot slot;
    int odd_tile = 0;
    int products[RESULTS];
    for (int number = blockIdx.x / CLUSTER; number < tiles.count(); number += gridDim.x / CLUSTER, odd_tile ^= 1) {
      const Tile tile = tiles[number];
      const int row = tile.m0 + rank * M_TILE + group * GROUP_ROWS + warp * 16 + lane / 4;
      const RowTerms rows[2] = {x.load(row, 0, 0), x.load(row + 8, 0, 0)};
#pragma unroll
      for (int own = thread; own < N_TILE; own += GROUP_THREADS) {
        const int column = tile.n0 + own;
        columns.bias[odd_tile][own] = out.bias_of(column);
        columns.scales[odd_tile][own] = w.scale(column, 0);
        if constexpr (ASYMMETRIC) columns.zero_points[odd_tile][own] = w.zero_point(column, 0);
      }
      // Of two columns, the first an even one.
      const auto terms_of = [&](const float* scales, const int* zero_points, ColumnTerms(&to)[2]) {
        const float2 scale = *reinterpret_cast<const float2*>(scales);
        to[0] = {scale.x, scaled_zero_point(ZERO)}, to[1] = {scale.y, scaled_zero_point(ZERO)};
        if constexpr (ASYMMETRIC) {
          const int2 zero_point = *reinterpret_cast<const int2*>(zero_points);
          to[0].zero_point = zero_point.x, to[1].zero_point = zero_point.y;
        }
      };

      const auto release = [&](int stage) {
        if (lane < CLUSTER) barrier_arrive(empties + 8 * stage, lane);
      };
      const u32 x_offset = group * GROUP_ROWS * K_TILE;
      int before = 0;
      for (int k = 0; k < k_tiles; ++k) {
        const u32 stage = base + slot.stage * STAGE_BYTES;
        const u64 a = descriptor(stage + x_offset), b = descriptor(stage + X_BYTES);
        barrier_wait(fulls + 8 * slot.stage, slot.parity);
        settle(products);
        multiply_begin();
#pragma unroll
        for (int step = 0; step < STEPS; ++step) multiply(products, a + 2 * step, b + 2 * step, k | step);
        multiply_commit();
        settle(products);
        if (k > 0) {
          multiply_wait<1>();
          release(before);
        }
        before = slot.stage;
        slot.advance();
      }
      multiply_wait<0>();
      settle(products);
      release(before);
      group_sync(group);

      // The results of a row and two columns: 8·i and the next, from the thread's first.
      const auto results_of = [&](int i, int half, const ColumnTerms(&terms)[2], float2 bias_of) {
        const float first = add_bracket(0.0f, products[4 * i + 2 * half], rows[half], terms[0]);
        const float second = add_bracket(0.0f, products[4 * i + 2 * half + 1], rows[half], terms[1]);
        return make_float2(out.with_bias(first, bias_of.x), out.with_bias(second, bias_of.y));
      };
      const auto store = [&](auto gathered) {
#pragma unroll
        for (int block = 0; block < N_TILE / 32; ++block) {
          u32 words[2][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = (4 * block + i) * 8 + lane % 4 * 2;
            ColumnTerms terms[2];
            terms_of(columns.scales[odd_tile] + column, columns.zero_points[odd_tile] + (ASYMMETRIC ? column : 0), terms);
            const float2 own = reinterpret_cast<const float2&>(columns.bias[odd_tile][column]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float2 result = results_of(4 * block + i, half, terms, own);
              if constexpr (decltype(gathered)::value) words[half][i] = narrow2<Y>(result.x, result.y);
              else out.store(row + 8 * half, tile.n0 + column, result.x, result.y);
            }
          }
          if constexpr (decltype(gathered)::value) {
            const int column = tile.n0 + (4 * block + lane % 4) * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint4 eight = gather_words(words[half], lane);
              if (row + 8 * half < m && column < n) {
                *reinterpret_cast<uint4*>(y + static_cast<u64>(row + 8 * half) * n + column) = eight;
              }
            }
          }
        }
      };
      if (vectors) store(Constant<sizeof(*y) == 2>{});
      else store(Constant<false>{});
    }
  }
  cluster_sync();  // no block leaves while another writes to its memory
}
