// int8 activations by a packed matrix through mma.sync: a block has M_TILE rows of x and N_TILE of W, which arrive in
// STAGES stages of 128·WARPS_K columns; each of WARPS_K warps takes 128 of them. Sums of integers are exact, so any
// order gives the same bits; brackets meet their scales in float32, one after another: where warps share the columns,
// they leave the sums of their groups in shared memory, and every thread adds those of its results in order.
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
// Brackets that end in a slice: the last one may be short, and end behind one that does not end with a stage.
constexpr int ENDS = BRACKET < STEPS ? (STEPS + BRACKET - 1) / BRACKET : BRACKET % STEPS ? 2 : 1;
constexpr int SLOTS = GROUPED ? WARPS_K * ENDS : 0;  // of a stage
constexpr bool SEGMENTED = BRACKET * 32 == 32768;  // whether a group may have more than one bracket
constexpr bool MEET = GROUPED && WARPS_K > 1;  // whether sums of brackets meet in shared memory
static_assert(M_BLOCKS * 16 * WARPS_M == M_TILE && N_BLOCKS * 8 * WARPS_N == N_TILE, "whole blocks a warp");
static_assert(!MEET || (STEPS % BRACKET == 0 && WARPS_K % 4 == 0), "brackets that meet are of one warp; read by fours");

// A stage: slice ▸ (x, W) ▸ row, then slot ▸ terms: scales and sums of rows of x, words with scales and with zero
// points of rows of W. Where sums meet, terms are lines: of a row all slots, in the same order.
constexpr int X_ROW = SLICE, W_ROW = NIBBLES ? SLICE / 2 : SLICE;  // bytes
constexpr int X_BYTES = M_TILE * X_ROW, W_BYTES = N_TILE * W_ROW, SLICE_BYTES = X_BYTES + W_BYTES;
constexpr int TERMS = 2 * M_TILE + (ASYMMETRIC ? 2 : 1) * N_TILE;

// SLOTS terms of `size` bytes, in the words that hold them. Those of less than a word may begin within one.
template <int size>
struct Line {
  static constexpr int BYTES = SLOTS * size, WORDS = (BYTES + 3) / 4 + (size < 4);
  static constexpr int PITCH = (BYTES + 15) / 16 * 16 + (size < 4 ? 16 : 0);
};

using Scales = Line<sizeof(Number<SCALE>::Bits)>;
constexpr int SUM_LINES = M_TILE * Line<4>::PITCH, SCALE_LINES = 2 * SUM_LINES, ZERO_LINES = SCALE_LINES + N_TILE * Scales::PITCH;
constexpr int LINES = ZERO_LINES + (ASYMMETRIC ? N_TILE * Line<1>::PITCH : 0);
constexpr int STAGE_BYTES = WARPS_K * SLICE_BYTES + ((MEET ? LINES : 4 * SLOTS * TERMS) + 127) / 128 * 128;

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

// The results of a thread: of rows ROW_STEP·i from its first, and columns 8·(i / 2) + i % 2. Those that meet are two
// columns side by side, the next ones of the next thread.
constexpr int PAIRS = N_TILE / 2;  // of columns
constexpr int ROW_STEP = MEET ? THREADS / PAIRS : 8, ROWS = MEET ? M_TILE / ROW_STEP : 2 * M_BLOCKS;
constexpr int COLUMNS = MEET ? 2 : 2 * N_BLOCKS;
static_assert(!MEET || (THREADS % PAIRS == 0 && ROWS * ROW_STEP == M_TILE), "whole rows a thread");

// Where sums meet: bracket ▸ row of x ▸ row of W, padded so that the lanes of a warp write to different banks.
constexpr int MEETING_ROW = N_TILE + 8, MEETING = M_TILE * MEETING_ROW;

// What the results of a thread need to know of a segment.
struct Terms {
  RowTerms rows[ROWS];
  ColumnTerms columns[COLUMNS];

  __device__ __forceinline__ void load(const RowReader& x, const Weight& w, int row, int column) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) rows[i] = x.load(row + ROW_STEP * i, 0, 0);
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
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
      if (SEGMENTED && per_group[i] > 1) at /= per_group[i];
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

// Copies lines of `rows` rows of a matrix of terms: threads from `first_thread` on, 16 bytes each where rows are `whole`
// multiples of that.
template <int rows, int size>
__device__ __forceinline__ void fetch_lines(u32 to, const void* matrix, int row0, int count, int groups, int first, bool whole,
                                            int first_thread) {
  using Own = Line<size>;
  const u64 begin = reinterpret_cast<u64>(matrix);
  const auto from = [&](int row) { return begin + (static_cast<u64>(min(row0 + row, count - 1)) * groups + first) * size; };
  const int thread = (threadIdx.x + THREADS - first_thread % THREADS) % THREADS;
  if (whole && Own::BYTES % 16 == 0) {
    constexpr int chunks = Own::BYTES / 16;
#pragma unroll
    for (int i = 0; i < (rows * chunks + THREADS - 1) / THREADS; ++i) {
      const int item = thread + i * THREADS, row = item / chunks, chunk = item % chunks;
      if (item < rows * chunks) {
        copy_async(to + row * Own::PITCH + chunk * 16, reinterpret_cast<const void*>(from(row) + chunk * 16), true);
      }
    }
    return;
  }
  const u64 last = (begin + static_cast<u64>(count) * groups * size - 1) & ~3ull;
#pragma unroll 1
  for (int item = thread; item < rows * Own::WORDS; item += THREADS) {
    const int row = item / Own::WORDS, word = item % Own::WORDS;
    const u64 address = min((from(row) & ~3ull) + 4 * word, last);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + row * Own::PITCH + 4 * word), "l"(address));
  }
}

// Four terms of a line from the `at`th on, a multiple of four; they begin `shift` bits into a word.
template <int size>
__device__ __forceinline__ void read_line(u32 (&to)[4], u32 line, int at, u32 shift) {
  if constexpr (size == 4) {
    read_shared(to, line + 4 * at);
  } else {
    u32 words[size + 1];
#pragma unroll
    for (int i = 0; i <= size; ++i) words[i] = read_word(line + at * size + 4 * i);
#pragma unroll
    for (int i = 0; i < size; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], shift);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = words[i * size / 4] >> i * size % 4 * 8 & (1u << 8 * size % 32) - 1;
  }
}

// Reads what has been copied, for a thread whose first row and column are `row` and `column` of the block.
struct TermReader {
  int row, column;
  u32 scales[COLUMNS], zero_points[ASYMMETRIC ? COLUMNS : 1];  // which half, which byte of a word is its own

  __device__ __forceinline__ TermReader(const Weight& w, int row, int column, int n0) : row(row), column(column) {
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
      const u32 at = static_cast<u32>(w.at(n0 + column + i / 2 * 8 + i % 2, 0));
      scales[i] = static_cast<u32>(reinterpret_cast<u64>(w.scales)) / 2 + at;
      if constexpr (ASYMMETRIC) zero_points[i] = static_cast<u32>(reinterpret_cast<u64>(w.zero_points)) + at;
    }
  }

  __device__ __forceinline__ void read(Terms& to, u32 from, int group) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int own = row + ROW_STEP * i;
      to.rows[i] = RowTerms::of(__uint_as_float(read_word(from + 4 * own)), static_cast<int>(read_word(from + 4 * (M_TILE + own))));
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
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
  const u64 addresses = reinterpret_cast<u64>(x_scales) | reinterpret_cast<u64>(x_sums) | reinterpret_cast<u64>(scales) |
                        (ASYMMETRIC ? reinterpret_cast<u64>(zero_points) : 0);
  const bool whole = MEET && groups % SLOTS == 0 && addresses % 16 == 0;
  const auto fetch_w = [&](int number) { w_copier.fetch(base + number % STAGES * STAGE_BYTES + X_BYTES, number); };
  const auto fetch_x = [&](int number) {
    const u32 stage = base + number % STAGES * STAGE_BYTES;
    x_copier.fetch(stage, number);
    const u32 to = stage + WARPS_K * SLICE_BYTES;
    if constexpr (MEET) {
      constexpr int each = M_TILE * Line<4>::BYTES / 16, size = sizeof(Number<SCALE>::Bits);
      const int first = number * SLOTS;
      fetch_lines<M_TILE, 4>(to, x_scales, m0, m, groups, first, whole, 0);
      fetch_lines<M_TILE, 4>(to + SUM_LINES, x_sums, m0, m, groups, first, whole, each);
      fetch_lines<N_TILE, size>(to + SCALE_LINES, scales, n0, n, groups, first, whole, 2 * each);
      if constexpr (ASYMMETRIC) fetch_lines<N_TILE, 1>(to + ZERO_LINES, zero_points, n0, n, groups, first, whole, 3 * each);
    } else if constexpr (GROUPED) {
      term_copier.fetch(to, number * STEPS / BRACKET);
    }
  };
  fetch_w(0);
  wait_for_last();  // which quantizes x
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage > 0 && stage < stages) fetch_w(stage);
    if (stage < stages) fetch_x(stage);
    copies_commit();
  }

  const int x_row = warp_m * M_BLOCKS * 16, w_row = warp_n * N_BLOCKS * 8;
  const int multiplied_row = x_row + lane / 4, multiplied_column = w_row + lane % 4 * 2;
  const int row = MEET ? threadIdx.x / PAIRS : multiplied_row, column = MEET ? threadIdx.x % PAIRS * 2 : multiplied_column;
  const TermReader term_reader(w, row, column, n0);  // of a thread's first result
  int* const meeting = reinterpret_cast<int*>(memory + STAGES * STAGE_BYTES);
  Terms terms;
  int products[M_BLOCKS][N_BLOCKS][4] = {};
  float total[GROUPED ? ROWS : 1][GROUPED ? COLUMNS : 1] = {};
  int segment = 0;
  const auto end_segment = [&](u32 stage, int first) {
    if constexpr (GROUPED && !MEET) {
      const int group = SEGMENTED ? segment / per_group : segment;
      term_reader.read(terms, stage + SLICE_BYTES + 4 * TERMS * (segment - first), group);
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          int& sum = products[i / 2][j / 2][i % 2 * 2 + j % 2];
          total[i][j] = add_bracket(total[i][j], sum, terms.rows[i], terms.columns[j]);
          sum = 0;
        }
      ++segment;
    }
  };
  // Leaves the sums of a bracket of this warp where they meet.
  const auto put = [&](int bracket) {
#pragma unroll
    for (int i = 0; i < 2 * M_BLOCKS; ++i)
#pragma unroll
      for (int j = 0; j < N_BLOCKS; ++j) {
        int(&pair)[4] = products[i / 2][j];
        int* to = meeting + bracket * MEETING + (multiplied_row + 8 * i) * MEETING_ROW + multiplied_column + 8 * j;
        *reinterpret_cast<int2*>(to) = make_int2(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        pair[i % 2 * 2] = pair[i % 2 * 2 + 1] = 0;
      }
  };
  // Adds the brackets of a stage, of which the last one may have fewer.
  u32 shifts[2], zero_shifts[2];  // of its columns' terms within words
  if constexpr (MEET) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u64 at = w.at(n0 + column + i, 0);
      shifts[i] = static_cast<u32>(reinterpret_cast<u64>(scales) + at * sizeof(Number<SCALE>::Bits)) % 4 * 8;
      zero_shifts[i] = static_cast<u32>(reinterpret_cast<u64>(zero_points) + at) % 4 * 8;
    }
  }
  const auto add_stage = [&](u32 lines, int first) {
    if constexpr (MEET) {
      constexpr int size = sizeof(Number<SCALE>::Bits);
#pragma unroll
      for (int four = 0; four < SLOTS; four += 4) {
        u32 scale_bits[2][4], zeros[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          read_line<size>(scale_bits[i], lines + SCALE_LINES + (column + i) * Scales::PITCH, four, shifts[i]);
          if constexpr (ASYMMETRIC) read_line<1>(zeros[i], lines + ZERO_LINES + (column + i) * Line<1>::PITCH, four, zero_shifts[i]);
        }
        ColumnTerms of_columns[4][2];
#pragma unroll
        for (int slot = 0; slot < 4; ++slot)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float scale;
            if constexpr (SCALE == F32) scale = __uint_as_float(scale_bits[i][slot]);
            else scale = Number<SCALE>::widen(static_cast<u16>(scale_bits[i][slot]));
            of_columns[slot][i] = {__fmul_rn(scale, 1 << REST), scaled_zero_point(ZERO)};
            if constexpr (ASYMMETRIC) of_columns[slot][i].zero_point = zero_term(scaled_zero_point(2 * zeros[i][slot]));
          }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const int own = row + ROW_STEP * i;
          u32 x_scale_bits[4], sums[4];
          read_line<4>(x_scale_bits, lines + own * Line<4>::PITCH, four, 0);
          read_line<4>(sums, lines + SUM_LINES + own * Line<4>::PITCH, four, 0);
#pragma unroll
          for (int slot = 0; slot < 4; ++slot) {
            const RowTerms of_row = RowTerms::of(__uint_as_float(x_scale_bits[slot]), static_cast<int>(sums[slot]));
            const int2 met = *reinterpret_cast<const int2*>(meeting + (four + slot) * MEETING + own * MEETING_ROW + column);
            const float added[2] = {add_bracket(total[i][0], met.x, of_row, of_columns[slot][0]),
                                    add_bracket(total[i][1], met.y, of_row, of_columns[slot][1])};
            const bool present = first + four + slot < segments;
            total[i][0] = present ? added[0] : total[i][0];
            total[i][1] = present ? added[1] : total[i][1];
          }
        }
      }
    }
  };

  // As many steps' operands at a time as registers hold.
  constexpr int part = M_BLOCKS * N_BLOCKS <= 16 ? STEPS : 2;
  for (int number = 0; number < stages; ++number) {
    copies_wait<STAGES - 2>();
    __syncthreads();
    if (number + STAGES - 1 < stages) {
      fetch_w(number + STAGES - 1);
      fetch_x(number + STAGES - 1);
    }
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
        if constexpr (MEET) {
          if ((step + 1) % BRACKET == 0) put((warp_k * STEPS + step) / BRACKET);
        } else if constexpr (GROUPED) {
          // The last bracket may be short; steps behind it add nothing.
          const bool ends = (number * STEPS + step + 1) % BRACKET == 0 || (step + 1 == STEPS && number + 1 == stages);
          if (ends && segment < segments) end_segment(stage, number * STEPS / BRACKET);
        }
      }
    }
    if constexpr (MEET) {
      __syncthreads();
      add_stage(stage + WARPS_K * SLICE_BYTES, number * SLOTS);
    }
  }

  if constexpr (WARPS_K > 1 && !GROUPED) {
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
  for (int j = 0; j < COLUMNS; j += 2) {
    const int at = n0 + column + 4 * j;
    const float own[2] = {out.bias_of(at), out.bias_of(at + 1)};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float results[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float value;
        if constexpr (GROUPED) {
          value = total[i][j + e];
        } else {
          value = add_bracket(0.0f, products[i / 2][j / 2][i % 2 * 2 + e], terms.rows[i], terms.columns[j + e]);
        }
        results[e] = out.with_bias(value, own[e]);
      }
      out.store(m0 + row + ROW_STEP * i, at, results[0], results[1]);
    }
  }
}
