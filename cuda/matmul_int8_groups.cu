// int8 activations by a packed matrix whose brackets end with groups, through wgmma on Hopper: yᵀ = W · xᵀ, so that codes
// of W pass through registers, where nibbles become bytes and lose their zero points. Blocks that stay, a warp group
// that copies M_TILE × 128 bytes of x and those columns of 128 rows of W a stage, and two that multiply 64 rows of W each.
// While the matrix unit works for one of these, the other adds its brackets in float32. What rows of x and of W bring to
// the groups of a stage arrives with it.
//
// NIBBLES: W has two codes a byte. CLUSTER blocks side by side in n share the rows of x: each copies a part, to all of
// them. FLUSH: brackets end every so many times 32 columns, a divisor or a multiple of 4. SUBTRACTED: where SIGNED, the
// constant zero point that codes lose on the way; with ASYMMETRIC they lose their own.
#include "choice.cuh"
#include "matmul_int8_hopper.cuh"

#if !defined(M_TILE) || !defined(CLUSTER) || !defined(FLUSH) || !defined(NIBBLES) || !defined(SUBTRACTED)
#error "M_TILE: 32, 64 or 128; CLUSTER; FLUSH; NIBBLES; SUBTRACTED"
#endif

constexpr int K_TILE = 128, STEPS = K_TILE / 32, GROUP_ROWS = 64, MULTIPLIERS = 2, W_TILE = MULTIPLIERS * GROUP_ROWS;
constexpr int RESULTS = M_TILE / 2;  // of a thread
constexpr int W_ROW = NIBBLES ? K_TILE / 2 : K_TILE;  // bytes
constexpr int X_BYTES = M_TILE * K_TILE, W_BYTES = W_TILE * W_ROW, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int RUN = FLUSH < STEPS ? FLUSH : STEPS;           // steps of one group in a stage
constexpr int SLOTS = STEPS / RUN;                           // groups of a stage
constexpr int LENGTH = FLUSH / STEPS > 1 ? FLUSH / STEPS : 1;  // stages of a group
constexpr int BATCH = 8;  // groups whose terms are read together
constexpr int BAND = 8;   // tiles of x that go through the rows of W together, so that L2 serves them
static_assert(RUN * SLOTS == STEPS && (FLUSH < STEPS || LENGTH * STEPS == FLUSH), "groups end with steps and stages");

// The matrix unit -------------------------------------------------------------------------------------------

#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more)
#if SIGNED
#define MULTIPLY(n) "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 "
#else
#define MULTIPLY(n) "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.u8.s8 "
#endif

// d = a · b, `more`: + d. 64 rows of W by 32 columns, those columns of M_TILE rows of x.
__device__ __forceinline__ void multiply(int (&d)[RESULTS], const u32 (&a)[4], u64 b, int more) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma is part of sm_90a alone"
#elif M_TILE == 128
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %69, 0;\n" MULTIPLY(128) "{" FIRST_TEN TEN(1) TEN(2) TEN(3) TEN(4)
               TEN(5) "%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, more;\n}"
               : REGISTERS_32(0), REGISTERS_32(32)
               : OPERANDS);
#elif M_TILE == 64
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %37, 0;\n" MULTIPLY(64) "{" FIRST_TEN TEN(1) TEN(2)
               "%30,%31}, {%32,%33,%34,%35}, %36, more;\n}"
               : REGISTERS_32(0)
               : OPERANDS);
#else
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %21, 0;\n" MULTIPLY(32) "{" FIRST_TEN
               "%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, more;\n}"
               : REGISTERS_8(0), REGISTERS_8(8)
               : OPERANDS);
#endif
}

// Codes of W ------------------------------------------------------------------------------------------------

// Which of its warp's 16 rows of W is row `i + 8·half` of its operand, i < 8: four that lie side by side end up in one
// thread, and eight of one half lie in different banks.
__device__ __forceinline__ int row_of(int i, int half) { return i / 2 * 4 + (half ^ i / 4) * 2 + i % 2; }

__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Nibbles as bytes, less a zero point in each byte. With its top bit no byte borrows from the next. `low`: 15 in each.
__device__ __forceinline__ u32 nibbles(u32 codes, u32 zero_points, u32 low) {
  constexpr u32 tops = 0x80808080u;
  if constexpr (!SIGNED) return codes & low;
  return ((codes & low | tops) - zero_points) ^ tops;
}

// What a stage's columns of a warp's rows are to the matrix unit; `from`: this lane's 16 bytes of the first ones.
__device__ __forceinline__ void load_codes(u32 (&to)[STEPS][4], u32 from, u32 swap, const u32 (&zero_points)[SLOTS][2]) {
  if constexpr (NIBBLES) {
    u32 low;
    asm volatile("mov.b32 %0, 0x0f0f0f0f;" : "=r"(low));  // once, not for each word
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
      u32 words[4];
      load_matrices(words, from + (16 * step ^ swap));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int own = step + i / 2, half = i % 2;
        to[own][half] = nibbles(words[i], zero_points[own / RUN][half], low);
        to[own][half + 2] = nibbles(words[i] >> 4, zero_points[own / RUN][half], low);
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      load_matrices(to[step], from + (32 * step ^ swap));
      if constexpr (SIGNED && SUBTRACTED != 0) {
        static_assert(SUBTRACTED == 0 || SUBTRACTED == 128 || NIBBLES, "that of 8 bits");
#pragma unroll
        for (int i = 0; i < 4; ++i) to[step][i] ^= 0x80808080u;
      }
    }
  }
}

// Terms -----------------------------------------------------------------------------------------------------

constexpr bool OWN_ZEROS = ASYMMETRIC;                    // zero points come with groups
constexpr bool WITH_SUMS = !SIGNED;                       // so do sums of x

// What the rows of W and of x of a tile bring to a group. Those of the groups of a stage lie behind all stages.
struct alignas(16) GroupTerms {
  float scales[W_TILE];
  int zero_points[OWN_ZEROS ? W_TILE : 4];  // where SIGNED, in each byte
  float x_scales[M_TILE];                   // by `place`
  u32 x_sums[WITH_SUMS ? M_TILE : 4];
};

// Where a row of x lies among terms: the four of 16 that a thread wants side by side.
__device__ __forceinline__ int place(int row) { return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2; }

// N elements of 1, 2 or 4 bytes, of which some are `present`; if `whole`, all, at a multiple of their size. By ordinary
// loads, which stay behind `wait_for_last`.
template <int N, typename T>
__device__ __forceinline__ void load_batch(T (&to)[N], const T* from, int present, bool whole) {
  if (whole) {
    constexpr int words = N * sizeof(T) / 4;
    u32 all[words];
#pragma unroll
    for (int i = 0; i < words; i += words < 4 ? words : 4) {
      if constexpr (words == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        all[0] = two.x, all[1] = two.y;
      } else {
        const uint4 four = reinterpret_cast<const uint4*>(from)[i / 4];
        all[i] = four.x, all[i + 1] = four.y, all[i + 2] = four.z, all[i + 3] = four.w;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (sizeof(T) == 4) to[i] = reinterpret_cast<const T&>(all[i]);
      else to[i] = static_cast<T>(all[i * sizeof(T) / 4] >> i * sizeof(T) % 4 * 8);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = from[min(i, present - 1)];
}

// Of a row of W and one of x, for BATCH groups.
struct Batch {
  Number<SCALE>::Bits scales[BATCH];
  u8 zero_points[OWN_ZEROS ? BATCH : 1];
  float x_scales[BATCH];
  int x_sums[WITH_SUMS ? BATCH : 1];

  __device__ __forceinline__ void load(const Weight& w, const RowReader& x, int column, int row, int group, bool whole) {
    const int present = w.groups - group;
    const u64 at = w.at(column, group), x_at = static_cast<u64>(min(row, x.m - 1)) * x.groups + group;
    load_batch(scales, static_cast<const Number<SCALE>::Bits*>(w.scales) + at, present, whole);
    if constexpr (OWN_ZEROS) load_batch(zero_points, w.zero_points + at, present, whole);
    load_batch(x_scales, x.scales + x_at, present, whole);
    if constexpr (WITH_SUMS) load_batch(x_sums, x.sums + x_at, present, whole);
  }

  __device__ __forceinline__ void store(GroupTerms& to, int i, int thread) const {
    to.scales[thread] = __fmul_rn(Number<SCALE>::widen(scales[i]), 1 << REST);
    if constexpr (OWN_ZEROS) {
      to.zero_points[thread] = SIGNED ? zero_points[i] * 0x01010101 : zero_term(scaled_zero_point(2 * zero_points[i]));
    }
    if (M_TILE < GROUP_THREADS && thread >= M_TILE) return;
    const RowTerms terms = RowTerms::of(x_scales[i], WITH_SUMS ? x_sums[i] : 0);
    to.x_scales[place(thread)] = terms.scale;
    if constexpr (WITH_SUMS) to.x_sums[place(thread)] = terms.sum;
  }
};

// Tiles -----------------------------------------------------------------------------------------------------

struct Tile {
  int m0, n0;  // the first row of x and of W, of the cluster
};

struct Tiles {
  int rows, columns;  // of clusters

  __device__ __forceinline__ Tiles(int m, int n)
      : rows((m + M_TILE - 1) / M_TILE), columns((n + W_TILE * CLUSTER - 1) / (W_TILE * CLUSTER)) {}

  __device__ __forceinline__ int count() const { return rows * columns; }

  __device__ __forceinline__ Tile operator[](int number) const {
    const int first = number / (BAND * columns) * BAND, within = number % (BAND * columns), height = min(BAND, rows - first);
    return {(first + within % height) * M_TILE, within / height * W_TILE * CLUSTER};
  }
};

// The columns of a matrix of 8 × 8 numbers of 16 bits in the place of its rows.
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 other;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
  return other;
}

// y (m, n) = x · Wᵀ (+ bias), by as many clusters as there is room for. Rows of codes of x are `stride` bytes.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP_THREADS*(1 + MULTIPLIERS), 1)
    matmul_int8_groups(CHOICE const float* x_scales, const int* x_sums, const void* scales, const u8* zero_points,
                       const void* bias, int bias_f32, Number<Y>::Bits* y, int m, int n, int stride, int groups,
                       const __grid_constant__ TensorMaps maps) {
  UNLESS_CHOSEN;
  extern __shared__ u8 memory[];
  __shared__ u64 full[STAGES], empty[STAGES];
  // By a shuffle, or they would be worked out anew wherever they are used.
  const u32 base = __shfl_sync(~0u, (shared_address(memory) + 1023) & ~1023u, 0);
  const u32 fulls = __shfl_sync(~0u, shared_address(full), 0), empties = __shfl_sync(~0u, shared_address(empty), 0);
  auto* const stage_terms = reinterpret_cast<GroupTerms*>(memory + (base - shared_address(memory)) + STAGES * STAGE_BYTES);
  const int rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0, stages = (stride + K_TILE - 1) / K_TILE;
  const Tiles tiles(m, n);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(fulls + 8 * stage, 1 + GROUP_THREADS);
      barrier_init(empties + 8 * stage, CLUSTER * MULTIPLIERS * GROUP_THREADS / WARP);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
  }
  cluster_sync();
  wait_for_last();

  if (threadIdx.x < GROUP_THREADS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(72));
    const int thread = threadIdx.x;
    const Weight w = {scales, zero_points, n, groups};
    const RowReader x = {x_scales, x_sums, m, groups, groups};
    const u64 addresses = reinterpret_cast<u64>(scales) | reinterpret_cast<u64>(x_scales) | reinterpret_cast<u64>(x_sums) |
                          (OWN_ZEROS ? reinterpret_cast<u64>(zero_points) : 0);
    const bool whole = groups % BATCH == 0 && addresses % 16 == 0;
    Slot slot;
    Batch next;
    const auto load_next = [&](int number, int group) {
      if (number >= tiles.count()) return;
      const Tile tile = tiles[number];
      next.load(w, x, tile.n0 + rank * W_TILE + thread, tile.m0 + thread, group, whole);
    };
    int number = blockIdx.x / CLUSTER;
    load_next(number, 0);
    for (; number < tiles.count(); number += gridDim.x / CLUSTER) {
      const Tile tile = tiles[number];
      int done = 0;
      for (int group = 0; group < groups; group += BATCH) {
        const Batch batch = next;
        if (group + BATCH < groups) load_next(number, group + BATCH);
        else load_next(number + gridDim.x / CLUSTER, 0);
#pragma unroll
        for (int first = 0; first < BATCH; first += SLOTS) {
          for (int part = 0; part < LENGTH && done < stages; ++part, ++done) {
            barrier_wait(empties + 8 * slot.stage, slot.parity ^ 1);
            if (thread == 0) {
              const u32 barrier = fulls + 8 * slot.stage, stage = base + slot.stage * STAGE_BYTES;
              barrier_expect(barrier, STAGE_BYTES);
              if constexpr (CLUSTER > 1) {
                const int part = rank * (M_TILE / CLUSTER);
                copy_tile_to_all(stage + part * K_TILE, maps.x, done * K_TILE, tile.m0 + part, barrier);
              } else {
                copy_tile(stage, maps.x, done * K_TILE, tile.m0, barrier);
              }
              copy_tile(stage + X_BYTES, maps.w, done * W_ROW, tile.n0 + rank * W_TILE, barrier);
            }
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) batch.store(stage_terms[slot.stage * SLOTS + i], first + i, thread);
            barrier_arrive(fulls + 8 * slot.stage);
            slot.advance();
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(216));
    const int group = threadIdx.x / GROUP_THREADS - 1, thread = threadIdx.x % GROUP_THREADS;
    const int lane = thread % WARP, warp = thread / WARP, first_row = group * GROUP_ROWS + warp * 16;
    const int own_rows[2] = {first_row + row_of(lane / 4, 0), first_row + row_of(lane / 4, 1)};
    const Output out = {y, bias, bias_f32, m, n};
    const bool vectors = sizeof(Number<Y>::Bits) == 2 && n % 4 == 0 && reinterpret_cast<u64>(y) % 8 == 0;
    // Its lane's row of matrices of codes, whose 16 bytes have changed places by the number of the row.
    const int copied = first_row + row_of(lane % 8, lane / 8 % 2);
    const u32 codes = base + X_BYTES + copied * W_ROW;
    const u32 swap = (lane / 16 ^ (NIBBLES ? copied / 2 % 4 : copied % 8)) * 16;
    Slot slot;
    u32 a[2][STEPS][4];
    int products[RESULTS];
    float total[RESULTS];

    const auto load = [&](u32(&to)[STEPS][4]) {
      barrier_wait(fulls + 8 * slot.stage, slot.parity);
      u32 zeros[SLOTS][2];
#pragma unroll
      for (int i = 0; i < SLOTS; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          zeros[i][half] = SUBTRACTED * 0x01010101u;
          if constexpr (OWN_ZEROS && SIGNED) zeros[i][half] = stage_terms[slot.stage * SLOTS + i].zero_points[own_rows[half]];
        }
      load_codes(to, codes + slot.stage * STAGE_BYTES, swap, zeros);
    };
    // Adds the brackets of a group.
    const auto add = [&](const GroupTerms& terms) {
      ColumnTerms own[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        own[i] = {terms.scales[own_rows[i]], scaled_zero_point(ZERO)};
        if constexpr (OWN_ZEROS && !SIGNED) own[i].zero_point = terms.zero_points[own_rows[i]];
      }
#pragma unroll
      for (int j = 0; j < M_TILE; j += 16) {
        const int at = j + lane % 4 * 4;
        const float4 four = *reinterpret_cast<const float4*>(terms.x_scales + at);
        const float x_scale[4] = {four.x, four.y, four.z, four.w};
        u32 sums[4] = {};
        if constexpr (WITH_SUMS) {
          const uint4 words = *reinterpret_cast<const uint4*>(terms.x_sums + at);
          sums[0] = words.x, sums[1] = words.y, sums[2] = words.z, sums[3] = words.w;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int of_x = i / 4 * 2 + i % 2;
          float& to = total[j / 2 + i];
          to = add_bracket(to, products[j / 2 + i], {x_scale[of_x], sums[of_x]}, own[i / 2 % 2]);
        }
      }
    };
    const auto release = [&](int stage) {
      __syncwarp();
      if (lane < CLUSTER) barrier_arrive(empties + 8 * stage, lane);
    };

    for (int number = blockIdx.x / CLUSTER; number < tiles.count(); number += gridDim.x / CLUSTER) {
      const Tile tile = tiles[number];
#pragma unroll
      for (int i = 0; i < RESULTS; ++i) total[i] = 0.0f;
      // Multiplies a stage by its codes and gets those of the next one.
      const auto multiply_stage = [&](const u32(&own)[STEPS][4], u32(&next)[STEPS][4], int number) {
        const int stage = slot.stage;
        const u64 b = descriptor(base + stage * STAGE_BYTES);
        const int more = LENGTH > 1 ? number % LENGTH : 0;
        slot.advance();
#pragma unroll
        for (int run = 0; run < SLOTS; ++run) {
          bool ends = true;
          if constexpr (SLOTS > 1) ends = number * SLOTS + run < groups;
          if constexpr (LENGTH > 1) ends = more + 1 == LENGTH || number + 1 == stages;
          multiply_begin();
#pragma unroll
          for (int i = 0; i < RUN; ++i) multiply(products, own[run * RUN + i], b + 2 * (run * RUN + i), more | i);
          multiply_commit();
          if (run + 1 == SLOTS && number + 1 < stages) load(next);
          multiply_wait<0>();
          settle(products);
          if (ends) add(stage_terms[stage * SLOTS + run]);
        }
        release(stage);
      };
      load(a[0]);
      for (int done = 0; done < stages; done += 2) {
        multiply_stage(a[0], a[1], done);
        if (done + 1 < stages) multiply_stage(a[1], a[0], done + 1);
      }

      const int column = tile.n0 + rank * W_TILE;
      const float own_bias[2] = {out.bias_of(column + own_rows[0]), out.bias_of(column + own_rows[1])};
#pragma unroll
      for (int j = 0; j < M_TILE / 8; ++j) {
        const int row = tile.m0 + 8 * j;
        float results[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) results[i] = out.with_bias(total[4 * j + i], own_bias[i / 2]);
        if constexpr (sizeof(Number<Y>::Bits) == 2) {
          if (vectors) {
            const u32 first = transposed(narrow2<Y>(results[0], results[1]));
            const u32 second = transposed(narrow2<Y>(results[2], results[3]));
            const int own = row + lane / 4, from = column + first_row + lane % 4 * 4;
            if (own < m && from < n) {
              const uint2 four = lane % 4 < 2 ? make_uint2(first, second) : make_uint2(second, first);
              *reinterpret_cast<uint2*>(y + static_cast<u64>(own) * n + from) = four;
            }
            continue;
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int own = row + lane % 4 * 2 + i % 2, from = column + own_rows[i / 2];
          if (own < m && from < n) y[static_cast<u64>(own) * n + from] = Number<Y>::narrow(results[i]);
        }
      }
    }
  }
  cluster_sync();  // no block leaves while another writes to its memory
}
