// The sums of one warp: 16 rows of W by 8·N rows of x, in float32, scaled group by group.
#include "matmul/output.cuh"
#include "matmul/tiles.cuh"

// The activations of half a unit (32 columns), for 8 rows: two operands of the matrix unit.
struct Activations {
  u32 word[4];
};

template <int N>
struct Sums {
  float total[N][4];    // of scaled groups
  float group[N][4];    // of the group at hand, before its scale
  float rows_of_x[N][4];  // Σ x over the group at hand, where the zero point has a fraction

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[n][i] = group[n][i] = rows_of_x[n][i] = 0.0f;
  }

  // Adds the group at hand, and begins another one.
  __device__ __forceinline__ void flush(const Group& scales) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (FRACTION) {
          group[n][i] = fmaf(-fraction_of_zero(scales, i / 2), rows_of_x[n][i], group[n][i]);
          rows_of_x[n][i] = 0.0f;
        }
        total[n][i] = fmaf(scale_of(scales, i / 2), group[n][i], total[n][i]);
        group[n][i] = 0.0f;
      }
  }
};

// Stays 0 until it meets NaN or ±Inf, then NaN.
__device__ __forceinline__ void watch(u32& finite, const Activations& x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) finite = fma2(x.word[i], 0, finite);
}

// Makes the results of rows of x that are not finite NaN.
template <int N>
__device__ __forceinline__ void spoil(float (&total)[N][4], const u32 (&finite)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) mma(total[n], ALL_ONES, finite[n], finite[n]);
}

// Writes the sums where `store` expects them, for a tile that begins at row `row0` of `rows`.
template <int N, int rows>
__device__ __forceinline__ void put(float* slab, const float (&total)[N][4], int row0, int lane) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + lane / 4 + 8 * (i / 2), col = 8 * n + lane % 4 * 2 + i % 2;
      slab[col * padded(rows) + row] = total[n][i];
    }
}
