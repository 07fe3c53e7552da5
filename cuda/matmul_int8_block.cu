// int8 activations by a packed matrix through mma.sync: a block has M_TILE rows of x and N_TILE of W, which arrive in
// STAGES stages of 128·WARPS_K columns; each of WARPS_K warps takes 128 of them. Sums of integers are exact, so any
// order gives the same bits; brackets meet their scales in float32, one after another.
//
// NIBBLES: W has two codes a byte. FLUSH: brackets end every so many times 32 columns; 0: with the row.
#include "choice.cuh"
#include "matmul_int8.cuh"

#if !defined(M_TILE) || !defined(N_TILE) || !defined(WARPS_M) || !defined(WARPS_N) || !defined(WARPS_K) || !defined(STAGES)
#error "M_TILE, N_TILE; WARPS_M, WARPS_N, WARPS_K; STAGES"
#endif
#if !defined(NIBBLES) || !defined(FLUSH)
#error "NIBBLES; FLUSH"
#endif

constexpr int SLICE = 128, STEPS = SLICE / 32;  // columns of a warp in a stage; times that they are multiplied
constexpr int THREADS = WARP * WARPS_M * WARPS_N * WARPS_K;
constexpr int M_BLOCKS = M_TILE / (16 * WARPS_M), N_BLOCKS = N_TILE / (8 * WARPS_N);  // of a warp
constexpr bool GROUPED = FLUSH > 0;
constexpr int BRACKET = GROUPED ? FLUSH : 1;
constexpr int SLOTS = !GROUPED ? 0 : BRACKET < STEPS ? (STEPS + BRACKET - 1) / BRACKET : 1;  // brackets that end in a stage
static_assert(M_BLOCKS * 16 * WARPS_M == M_TILE && N_BLOCKS * 8 * WARPS_N == N_TILE, "whole blocks a warp");
static_assert(!GROUPED || WARPS_K == 1, "brackets are added in order");

// A stage: slice ▸ (x, W) ▸ row, then slot ▸ terms: scales and sums of rows of x, words with scales and with zero
// points of rows of W.
constexpr int X_ROW = SLICE, W_ROW = NIBBLES ? SLICE / 2 : SLICE;  // bytes
constexpr int X_BYTES = M_TILE * X_ROW, W_BYTES = N_TILE * W_ROW, SLICE_BYTES = X_BYTES + W_BYTES;
constexpr int TERMS = 2 * M_TILE + (ASYMMETRIC ? 2 : 1) * N_TILE;
constexpr int STAGE_BYTES = WARPS_K * SLICE_BYTES + (4 * SLOTS * TERMS + 127) / 128 * 128;

// Where 16 bytes of a row lie in its tile: those of eight rows at one column are in different banks.
template <int row_bytes>
__device__ __forceinline__ u32 place(int row, int chunk) {
  return row * row_bytes + (chunk ^ (row_bytes == 128 ? row % 8 : row / 2 % 4)) * 16;
}

// Copies stages of a matrix: a thread the same 16 bytes of some rows of each. Rows beyond the last are zeros.
template <int rows, int row_bytes>
struct Copier {
  static constexpr int SLICE_CHUNKS = row_bytes / 16, CHUNKS = SLICE_CHUNKS * WARPS_K;
  static constexpr int STEP = THREADS / CHUNKS, COPIES = (rows + STEP - 1) / STEP;
  static_assert(THREADS % CHUNKS == 0, "a thread copies the same columns of every row");

  const u8* from;
  u64 stride;
  int column, row, present;

  __device__ __forceinline__ Copier(const u8* matrix, u64 stride, int row0, int count)
      : stride(stride), column(threadIdx.x % CHUNKS * 16), row(threadIdx.x / CHUNKS), present(count - row0) {
    from = matrix + static_cast<u64>(min(row0 + row, count - 1)) * stride + column;
  }

  __device__ __forceinline__ void fetch(u32 stage, int number) const {
    const u64 begin = static_cast<u64>(number) * (CHUNKS * 16);
    const bool inside = begin + column < stride;
    const int chunk = column / 16;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      const int own = row + i * STEP;
      if (rows % STEP && own >= rows) break;
      const bool valid = inside && own < present;
      copy_async(stage + chunk / SLICE_CHUNKS * SLICE_BYTES + place<row_bytes>(own, chunk % SLICE_CHUNKS),
                 valid ? from + begin + i * STEP * stride : from, valid);
    }
  }
};

__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// d += a · b: a is 16 rows of x by 32 columns, b those columns of 8 rows of W.
__device__ __forceinline__ void mma(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What the results of a thread need to know of a segment: of rows 8·i from its first, and columns 8·(i / 2) + i % 2.
struct Terms {
  RowTerms rows[2 * M_BLOCKS];
  ColumnTerms columns[2 * N_BLOCKS];

  __device__ __forceinline__ void load(const RowReader& x, const Weight& w, int row, int column) {
#pragma unroll
    for (int i = 0; i < 2 * M_BLOCKS; ++i) rows[i] = x.load(row + 8 * i, 0, 0);
#pragma unroll
    for (int i = 0; i < 2 * N_BLOCKS; ++i) {
      const int own = column + i / 2 * 8 + i % 2;
      columns[i] = {w.scale(own, 0), w.zero_point(own, 0)};
    }
  }
};

// Copies the terms of the brackets that end in a stage, as the words that hold them: a thread the same of each.
struct TermCopier {
  static constexpr int COPIES = GROUPED ? (SLOTS * TERMS + THREADS - 1) / THREADS : 1;

  u64 from[COPIES];
  int bytes[COPIES], slots[COPIES], per_group[COPIES];
  int last;

  __device__ __forceinline__ TermCopier(const RowReader& x, const Weight& w, int m0, int n0) : last(x.segments - 1) {
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      const int index = threadIdx.x + i * THREADS, term = index % TERMS;
      slots[i] = index < SLOTS * TERMS ? index / TERMS : -1;
      per_group[i] = x.segments / x.groups;
      if (term < 2 * M_TILE) {
        const u64 row = min(m0 + term % M_TILE, x.m - 1);
        bytes[i] = 4;
        if (term < M_TILE) {
          from[i] = reinterpret_cast<u64>(x.scales + row * x.groups);
        } else {
          from[i] = reinterpret_cast<u64>(x.sums + row * x.segments);
          per_group[i] = 1;
        }
      } else {
        const bool scale = term < 2 * M_TILE + N_TILE;
        bytes[i] = scale ? sizeof(Number<SCALE>::Bits) : 1;
        from[i] = reinterpret_cast<u64>(scale ? w.scales : w.zero_points) + w.at(n0 + (term - 2 * M_TILE) % N_TILE, 0) * bytes[i];
      }
    }
  }

  __device__ __forceinline__ void fetch(u32 to, int first) const {
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      if (slots[i] < 0) break;
      int at = min(first + slots[i], last);
      if (per_group[i] > 1) at /= per_group[i];
      const u64 word = (from[i] + static_cast<u64>(at) * bytes[i]) & ~3ull;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 4 * (threadIdx.x + i * THREADS)), "l"(word));
    }
  }
};

__device__ __forceinline__ u32 read_word(u32 from) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}

// Reads what has been copied, for a thread whose first row and column are `row` and `column` of the block.
struct TermReader {
  int row, column;
  u32 scales[2 * N_BLOCKS], zero_points[ASYMMETRIC ? 2 * N_BLOCKS : 1];  // which half, which byte of a word is its own

  __device__ __forceinline__ TermReader(const Weight& w, int row, int column, int n0) : row(row), column(column) {
#pragma unroll
    for (int i = 0; i < 2 * N_BLOCKS; ++i) {
      const u32 at = static_cast<u32>(w.at(n0 + column + i / 2 * 8 + i % 2, 0));
      scales[i] = static_cast<u32>(reinterpret_cast<u64>(w.scales)) / 2 + at;
      if constexpr (ASYMMETRIC) zero_points[i] = static_cast<u32>(reinterpret_cast<u64>(w.zero_points)) + at;
    }
  }

  __device__ __forceinline__ void read(Terms& to, u32 from, int group) const {
#pragma unroll
    for (int i = 0; i < 2 * M_BLOCKS; ++i) {
      const float scale = __uint_as_float(read_word(from + 4 * (row + 8 * i)));
      to.rows[i] = RowTerms::of(scale, static_cast<int>(read_word(from + 4 * (M_TILE + row + 8 * i))));
    }
#pragma unroll
    for (int i = 0; i < 2 * N_BLOCKS; ++i) {
      const int own = 2 * M_TILE + column + i / 2 * 8 + i % 2;
      const u32 word = read_word(from + 4 * own);
      float scale;
      if constexpr (SCALE == F32) scale = __uint_as_float(word);
      else scale = Number<SCALE>::widen(static_cast<u16>(word >> 16 * ((scales[i] + group) % 2)));
      to.columns[i] = {__fmul_rn(scale, 1 << REST), scaled_zero_point(ZERO)};
      if constexpr (ASYMMETRIC) {
        const u32 code = read_word(from + 4 * (N_TILE + own)) >> 8 * ((zero_points[i] + group) % 4) & 0xff;
        to.columns[i].zero_point = zero_term(scaled_zero_point(2 * code));
      }
    }
  }
};

// y (m, n) = x · Wᵀ (+ bias). Grid: blocks of N_TILE rows of W, of M_TILE rows of x.
extern "C" __global__ void __launch_bounds__(THREADS)
    matmul_int8_block(CHOICE const u8* codes, const float* x_scales, const int* x_sums, const u8* packed, const void* scales,
                      const u8* zero_points, const void* bias, int bias_f32, Number<Y>::Bits* y, int m, int n, int stride,
                      u64 w_stride, int groups, int segments) {
  UNLESS_CHOSEN;
  extern __shared__ __align__(128) u8 memory[];
  const u32 base = shared_address(memory);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int warp_n = warp % WARPS_N, warp_m = warp / WARPS_N % WARPS_M, warp_k = warp / (WARPS_N * WARPS_M);
  const int m0 = blockIdx.y * M_TILE, n0 = blockIdx.x * N_TILE;
  const int stages = (stride + SLICE * WARPS_K - 1) / (SLICE * WARPS_K);
  const Weight w = {scales, zero_points, n, groups};
  const RowReader x = {x_scales, x_sums, m, groups, segments};
  const Output out = {y, bias, bias_f32, m, n};
  const int per_group = segments / groups;
  const Copier<M_TILE, X_ROW> x_copier(codes, stride, m0, m);
  const Copier<N_TILE, W_ROW> w_copier(packed, w_stride, n0, n);
  const TermCopier term_copier(x, w, m0, n0);
  const auto fetch_stage = [&](int number) {
    const u32 stage = base + number % STAGES * STAGE_BYTES;
    x_copier.fetch(stage, number);
    w_copier.fetch(stage + X_BYTES, number);
    if constexpr (GROUPED) {
      term_copier.fetch(stage + WARPS_K * SLICE_BYTES, number * STEPS / BRACKET);
    }
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage < stages) fetch_stage(stage);
    copies_commit();
  }

  const int x_row = warp_m * M_BLOCKS * 16, w_row = warp_n * N_BLOCKS * 8;
  const int row = x_row + lane / 4, column = w_row + lane % 4 * 2;  // of the first result of a thread
  const TermReader term_reader(w, row, column, n0);
  Terms terms;
  int products[M_BLOCKS][N_BLOCKS][4] = {};
  float total[GROUPED ? M_BLOCKS : 1][GROUPED ? N_BLOCKS : 1][4] = {};
  int segment = 0;
  const auto end_segment = [&](u32 stage, int first) {
    if constexpr (GROUPED) {
      const int group = per_group == 1 ? segment : segment / per_group;
      term_reader.read(terms, stage + WARPS_K * SLICE_BYTES + 4 * TERMS * (segment - first), group);
#pragma unroll
      for (int i = 0; i < M_BLOCKS; ++i)
#pragma unroll
        for (int j = 0; j < N_BLOCKS; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            total[i][j][e] =
                add_bracket(total[i][j][e], products[i][j][e], terms.rows[2 * i + e / 2], terms.columns[2 * j + e % 2]);
            products[i][j][e] = 0;
          }
      ++segment;
    }
  };

  // As many steps' operands at a time as registers hold.
  constexpr int part = M_BLOCKS * N_BLOCKS <= 16 ? STEPS : 2;
  for (int number = 0; number < stages; ++number) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    if (number + STAGES - 1 < stages) fetch_stage(number + STAGES - 1);
    copies_commit();
    const u32 stage = base + number % STAGES * STAGE_BYTES, slice = stage + warp_k * SLICE_BYTES;
    u32 b[NIBBLES ? 1 : part / 2][N_BLOCKS][4];
#pragma unroll
    for (int step0 = 0; step0 < STEPS; step0 += part) {
      u32 a[part][M_BLOCKS][4];
#pragma unroll
      for (int step = step0; step < step0 + part; ++step) {
        if (step % (NIBBLES ? 4 : 2) == 0) {
#pragma unroll
          for (int j = 0; j < N_BLOCKS; ++j) {
            load_matrices(b[NIBBLES ? 0 : (step - step0) / 2][j],
                          slice + X_BYTES + place<W_ROW>(w_row + 8 * j + lane % 8, 2 * (NIBBLES ? 0 : step) + lane / 8));
          }
        }
#pragma unroll
        for (int i = 0; i < M_BLOCKS; ++i) {
          load_matrices(a[step - step0][i], slice + place<X_ROW>(x_row + 16 * i + lane % 16, 2 * step + lane / 16));
        }
      }
#pragma unroll
      for (int step = step0; step < step0 + part; ++step) {
#pragma unroll
        for (int i = 0; i < M_BLOCKS; ++i)
#pragma unroll
          for (int j = 0; j < N_BLOCKS; ++j) {
            if constexpr (NIBBLES) {
              mma(products[i][j], a[step - step0][i], b[0][j][step] & 0x0f0f0f0fu, b[0][j][step] >> 4 & 0x0f0f0f0fu);
            } else {
              const u32(&own)[4] = b[(step - step0) / 2][j];
              mma(products[i][j], a[step - step0][i], own[step % 2 * 2], own[step % 2 * 2 + 1]);
            }
          }
        if constexpr (GROUPED) {
          // The last bracket may be short; steps behind it add nothing.
          const bool ends = (number * STEPS + step + 1) % BRACKET == 0 || (step + 1 == STEPS && number + 1 == stages);
          if (ends && segment < segments) end_segment(stage, number * STEPS / BRACKET);
        }
      }
    }
  }

  if constexpr (WARPS_K > 1) {
    constexpr int results = M_BLOCKS * N_BLOCKS * 4;
    int* slabs = reinterpret_cast<int*>(memory) + threadIdx.x % (THREADS / WARPS_K);
    copies_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < results; ++i) {
      if (warp_k) slabs[((warp_k - 1) * results + i) * (THREADS / WARPS_K)] = products[i / 4 / N_BLOCKS][i / 4 % N_BLOCKS][i % 4];
    }
    __syncthreads();
    if (warp_k) return;
    for (int other = 0; other < WARPS_K - 1; ++other) {
#pragma unroll
      for (int i = 0; i < results; ++i) {
        products[i / 4 / N_BLOCKS][i / 4 % N_BLOCKS][i % 4] += slabs[(other * results + i) * (THREADS / WARPS_K)];
      }
    }
  }
  if constexpr (!GROUPED) terms.load(x, w, m0 + row, n0 + column);
#pragma unroll
  for (int j = 0; j < N_BLOCKS; ++j) {
    const int at = n0 + column + 8 * j;
    const float own[2] = {out.bias_of(at), out.bias_of(at + 1)};
#pragma unroll
    for (int i = 0; i < 2 * M_BLOCKS; ++i) {
      float results[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float value;
        if constexpr (GROUPED) {
          value = total[i / 2][j][i % 2 * 2 + e];
        } else {
          value = add_bracket(0.0f, products[i / 2][j][i % 2 * 2 + e], terms.rows[i], terms.columns[2 * j + e]);
        }
        results[e] = out.with_bias(value, own[e]);
      }
      out.store(m0 + row + 8 * i, at, results[0], results[1]);
    }
  }
}
