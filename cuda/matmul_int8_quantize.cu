// Activations to int8 codes, with a scale a group and the sums of the codes (docs/format.md, section 7): one pass.
//
// A team of TEAM threads holds a group in registers, VECTORS units of eight elements a thread; a group longer than
// that (LONG) is read twice. Codes go where `matmul_int8.cuh` says. Memory is the limit.
//
// X: dtype of x. WHOLE: units are whole and lie on multiples of 16 bytes. NIBBLES: the weight has two codes a byte;
// in every 32 columns, those of even and of odd index of a unit go to the half of the row where its codes will be.
#include "choice.cuh"
#include "floats.cuh"

constexpr int WARP = 32, SEGMENT = 32768;

// `combine` over the values of a team, in every thread.
template <typename F>
__device__ __forceinline__ u32 team_reduce(u32 value, F combine) {
#pragma unroll
  for (int step = (TEAM < WARP ? TEAM : WARP) / 2; step > 0; step /= 2) {
    value = combine(value, __shfl_xor_sync(~0u, value, step));
  }
  if constexpr (TEAM > WARP) {
    __shared__ u32 warps[(TEAM + WARP - 1) / WARP];
    __syncthreads();
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
    __syncthreads();
    value = warps[0];
    for (int i = 1; i < TEAM / WARP; ++i) value = combine(value, warps[i]);
  }
  return value;
}

struct Group {
  const Number<X>::Bits* x;
  signed char* codes;
  int length;

  __device__ __forceinline__ void load(Unit<X>& to, int unit) const {
    to.clear();
    if constexpr (WHOLE) {
      if (unit * UNIT < length) to.load(x + unit * UNIT);
    } else {
#pragma unroll
      for (int i = 0; i < UNIT; ++i) {
        if (unit * UNIT + i < length) to.elements[i] = x[unit * UNIT + i];
      }
    }
  }

  // Units with those that fill the last 32 columns.
  __device__ __forceinline__ int units() const { return (length + 31) / 32 * 4; }
};

// The largest magnitude as bits, which magnitudes order as integers do, NaN above all.
__device__ __forceinline__ u32 magnitude(u32 most, const Unit<X>& unit) {
  float values[UNIT];
  unit.widen(values);
#pragma unroll
  for (int i = 0; i < UNIT; ++i) most = max(most, __float_as_uint(values[i]) & 0x7fffffffu);
  return most;
}

struct Scale {
  float scale, inverse;

  explicit __device__ __forceinline__ Scale(u32 most) {
    const bool finite = most < 0x7f800000u;
    scale = __fdiv_rn(__uint_as_float(most), 127.0f);
    if (scale < 0x1p-126f) scale = 0.0f;
    inverse = scale == 0.0f || !finite ? 0.0f : __fdiv_rn(1.0f, scale);
    if (!finite) scale = __uint_as_float(0x7fffffffu);
  }
};

// Stores the codes of a unit. Returns their sum.
__device__ __forceinline__ int store(const Unit<X>& from, float inverse, signed char* codes, int unit) {
  float values[UNIT];
  u32 words[UNIT], packed[2];
  from.widen(values);
  // 1.5·2^23 rounds to an integer, whose two's complement the low bits hold.
#pragma unroll
  for (int i = 0; i < UNIT; ++i) words[i] = __float_as_uint(__fadd_rn(__fmul_rn(values[i], inverse), 12582912.0f));
  constexpr int step = NIBBLES ? 2 : 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32* own = words + (NIBBLES ? half : 4 * half);
    packed[half] = __byte_perm(__byte_perm(own[0], own[step], 0x0040),
                               __byte_perm(own[2 * step], own[3 * step], 0x0040), 0x5410);
  }
  if constexpr (NIBBLES) {
    u32* to = reinterpret_cast<u32*>(codes + unit / 4 * 32) + unit % 4;
    to[0] = packed[0];
    to[4] = packed[1];
  } else {
    reinterpret_cast<uint2*>(codes)[unit] = make_uint2(packed[0], packed[1]);
  }
  return __dp4a(static_cast<int>(packed[0]), 0x01010101, __dp4a(static_cast<int>(packed[1]), 0x01010101, 0));
}

// x (m, k) in groups of `size`, which begin at multiples of `padded` columns of rows of `stride` codes.
extern "C" __global__ void __launch_bounds__(THREADS)
    matmul_int8_quantize(CHOICE const Number<X>::Bits* x, signed char* codes, float* scales, int* sums, int m, int k, int size,
                         int padded, int stride, int groups, int segments) {
  UNLESS_CHOSEN;
  let_next_begin();  // which waits for the end of this before it reads codes
  const u32 number = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
  const u32 row = number / static_cast<u32>(groups), group = number % static_cast<u32>(groups);
  const bool there = row < m;
  const int thread = threadIdx.x % TEAM;
  const auto most_of = [](u32 a, u32 b) { return max(a, b); };
  const auto sum_of = [](u32 a, u32 b) { return a + b; };
  Group own = {x, codes, 0};
  if (there) {
    const u64 begin = static_cast<u64>(group) * size;
    own = {x + static_cast<u64>(row) * k + begin, codes + static_cast<u64>(row) * stride + static_cast<u64>(group) * padded,
           static_cast<int>(min(static_cast<u64>(size), k - begin))};
  }
  u32 most = 0;
  if constexpr (!LONG) {
    Unit<X> held[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) own.load(held[i], thread + i * TEAM);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) most = magnitude(most, held[i]);
    const Scale scale(team_reduce(most, most_of));
    u32 sum = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int unit = thread + i * TEAM;
      if (unit < own.units()) sum += store(held[i], scale.inverse, own.codes, unit);
    }
    sum = team_reduce(sum, sum_of);
    if (thread == 0 && there) {
      scales[static_cast<u64>(row) * groups + group] = scale.scale;
      sums[static_cast<u64>(row) * groups + group] = sum;
    }
  } else {
    Unit<X> unit;
    for (int i = thread; i < own.units(); i += TEAM) {
      own.load(unit, i);
      most = magnitude(most, unit);
    }
    const Scale scale(team_reduce(most, most_of));
    if (thread == 0) scales[static_cast<u64>(row) * groups + group] = scale.scale;
    const int per_group = segments / groups;
    for (int segment = 0; segment < per_group; ++segment) {
      const int end = min(own.units(), (segment + 1) * (SEGMENT / UNIT));
      u32 sum = 0;
      for (int i = segment * (SEGMENT / UNIT) + thread; i < end; i += TEAM) {
        own.load(unit, i);
        sum += store(unit, scale.inverse, own.codes, i);
      }
      sum = team_reduce(sum, sum_of);
      if (thread == 0) sums[static_cast<u64>(row) * segments + group * per_group + segment] = sum;
    }
  }
}
