// Products of int8 activations: sums of integers, and what becomes of them (docs/format.md, section 7).
//
//   codes of x    m rows of `stride` bytes; groups begin at multiples of 32 columns, zeros fill the gaps
//   scales of x   row ▸ group
//   sums of x     row ▸ segment: Σ q, a group or 32768 columns of one at a time
//   weight        n rows of bytes, or of nibbles, in the same columns; what lies in the gaps does not matter
#include "floats.cuh"
#include "words.cuh"

#if !defined(Y) || !defined(SCALE) || !defined(ASYMMETRIC) || !defined(ZERO) || !defined(REST) || !defined(SMALL) || !defined(SIGNED)
#error "Y, SCALE: dtypes of results and of scales; ASYMMETRIC; ZERO: twice the constant zero point; REST: bits not read"
#error "SMALL: brackets, times 2^SHIFT, are at most 2^22; SIGNED: W is there as k − z, so sums of products are brackets"
#endif

// A bracket Σ k·q − z·Σ q times 2^SHIFT is an integer, of less than 2^31 for any codes of a segment.
constexpr bool IN_HALVES = REST > 0 || (!ASYMMETRIC && ZERO % 2 != 0);
constexpr int SHIFT = IN_HALVES ? REST + 1 : 0;

// The zero point of the codes read, times 2^SHIFT.
constexpr __device__ __forceinline__ int scaled_zero_point(int twice) {
  const int own = twice - (1 << REST) + 1;
  return IN_HALVES ? own : own / 2;
}

// Whether zero points and sums of x are kept as the bits of floats: in those, brackets are exact.
constexpr bool IN_FLOATS = ASYMMETRIC && SMALL;

// The zero point as `add_bracket` takes it, of one times 2^SHIFT.
__device__ __forceinline__ int zero_term(int scaled) {
  return IN_FLOATS ? __float_as_int(__int2float_rn(scaled) * (1.0f / (1 << SHIFT))) : scaled;
}

struct Weight {
  const void* scales;     // (n, groups)
  const u8* zero_points;  // (n, groups) where ASYMMETRIC
  int n, groups;

  __device__ __forceinline__ u64 at(int row, int group) const {
    return static_cast<u64>(min(row, n - 1)) * groups + min(group, groups - 1);
  }

  // s·2^REST.
  __device__ __forceinline__ float scale(int row, int group) const {
    const auto* all = static_cast<const Number<SCALE>::Bits*>(scales);
    return __fmul_rn(Number<SCALE>::widen(__ldg(all + at(row, group))), 1 << REST);
  }

  __device__ __forceinline__ int zero_point(int row, int group) const {
    return zero_term(scaled_zero_point(ASYMMETRIC ? 2 * __ldg(zero_points + at(row, group)) : ZERO));
  }
};

// Added to an integer of less than 2^22, these are the bits of 1.5·2^23 and the integer: a conversion at full rate.
constexpr u32 FLOAT_BITS = SMALL ? 0x4b400000u : 0;

// What a row of x brings to a segment.
struct RowTerms {
  float scale;  // NaN where an element of the group is not finite, which makes the result NaN
  u32 sum;      // Σ q; with a constant zero point, what is to be added to Σ k·q: FLOAT_BITS − z·Σ q; or nothing

  static __device__ __forceinline__ RowTerms of(float scale, int sum) {
    if constexpr (SIGNED) return {scale, 0};
    if constexpr (IN_FLOATS) return {scale, __float_as_uint(__int2float_rn(sum))};
    RowTerms terms = {scale, ASYMMETRIC ? sum : FLOAT_BITS - static_cast<u32>(scaled_zero_point(ZERO)) * sum};
    asm("" : "+r"(terms.sum));  // worked out once for all columns
    return terms;
  }
};

struct RowReader {
  const float* scales;
  const int* sums;
  int m, groups, segments;

  __device__ __forceinline__ RowTerms load(int row, int group, int segment) const {
    const u64 own = min(row, m - 1);
    // By ordinary loads, which stay behind `wait_for_last`.
    return RowTerms::of(scales[own * groups + group], sums[own * segments + segment]);
  }
};

// What a column of the result, a row of W, brings to it.
struct ColumnTerms {
  float scale;
  int zero_point;
};

// acc + s_w·s_x·bracket, where `products` is Σ k·q of the segment.
__device__ __forceinline__ float add_bracket(float acc, int products, RowTerms row, ColumnTerms column) {
  if constexpr (IN_FLOATS) {
    const float value = __fmaf_rn(-__int_as_float(column.zero_point), __uint_as_float(row.sum), __int2float_rn(products));
    return __fmaf_rn(__fmul_rn(column.scale, row.scale), value, acc);
  }
  const u32 base = SIGNED ? 0 : ASYMMETRIC ? FLOAT_BITS - static_cast<u32>(column.zero_point) * row.sum : row.sum;
  const u32 bracket = (static_cast<u32>(products) << SHIFT) + base;
  float value;
  if constexpr (SMALL) {
    value = __fsub_rn(__uint_as_float(bracket), 12582912.0f);
  } else {
    value = __int2float_rn(static_cast<int>(bracket));
  }
  return __fmaf_rn(__fmul_rn(column.scale, row.scale), value * (1.0f / (1 << SHIFT)), acc);
}

struct Output {
  Number<Y>::Bits* y;  // (m, n)
  const void* bias;    // (n,) in float32 or the dtype of y, or null
  int bias_f32;
  int m, n;

  __device__ __forceinline__ float bias_of(int column) const {
    if (bias == nullptr || column >= n) return 0.0f;
    if (bias_f32) return static_cast<const float*>(bias)[column];
    return Number<Y>::widen(static_cast<const Number<Y>::Bits*>(bias)[column]);
  }

  __device__ __forceinline__ float with_bias(float value, float own) const {
    return bias == nullptr ? value : __fadd_rn(value, own);  // −0 + 0 would be 0
  }

  // Two results side by side.
  __device__ __forceinline__ void store(int row, int column, float first, float second) const {
    using Bits = Number<Y>::Bits;
    struct alignas(2 * sizeof(Bits)) Pair {
      Bits first, second;
    };
    if (row >= m || column >= n) return;
    Bits* to = y + static_cast<u64>(row) * n + column;
    if (n % 2 == 0 && reinterpret_cast<u64>(to) % sizeof(Pair) == 0) {
      if constexpr (sizeof(Bits) == 2) {
        *reinterpret_cast<u32*>(to) = narrow2<Y>(first, second);
      } else {
        *reinterpret_cast<Pair*>(to) = {Number<Y>::narrow(first), Number<Y>::narrow(second)};
      }
      return;
    }
    to[0] = Number<Y>::narrow(first);
    if (column + 1 < n) to[1] = Number<Y>::narrow(second);
  }
};
