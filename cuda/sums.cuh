// The sums of one warp: 16 rows of W by 8 rows of x at a time, in float32, scaled group by group.
#include "output.cuh"
#include "tiles.cuh"

// The activations of half a unit (32 columns), for 8 rows: two operands of the matrix unit.
struct Activations {
  u32 word[4];
};

// Sums over the columns of one group, before its scale: of products, UNIT times as large, and of the activations.
struct GroupSums {
  float products[4];
  float activations[4];  // where the zero point has a fraction

  // Adds a step of 16 columns.
  __device__ __forceinline__ void add(const u32 (&a)[4], u32 b0, u32 b1) {
    mma(products, a, b0, b1);
    if constexpr (FRACTION) mma(activations, ALL_ONES, b0, b1);
  }

  // Adds the group to sums of scaled groups.
  __device__ __forceinline__ void scale(float (&total)[4], const Group& group) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = products[i];
      if constexpr (FRACTION) sum = fmaf(-fraction_of_zero(group, i / 2) * UNIT, activations[i], sum);
      total[i] = fmaf(scale_of(group, i / 2), sum, total[i]);
    }
  }
};

// Writes the sums, UNIT times as large, where `store` expects them, for a tile that begins at row `row0` of `rows`, and
// `here` rows of x.
template <int N, int rows>
__device__ __forceinline__ void put(float* slab, const float (&total)[N][4], int row0, int lane, int here = 8 * N) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + lane / 4 + 8 * (i / 2), col = 8 * n + lane % 4 * 2 + i % 2;
      if (col < here) slab[col * padded(rows) + row] = total[n][i] * (1 / UNIT);
    }
}
