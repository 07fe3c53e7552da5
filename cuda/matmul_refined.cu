// Which rows of x are refined: those whose size, √ Σ s² over the scales of their groups in int8, is above a threshold.
#include "words.cuh"

// scales (m, groups) to refined (m), and into `kinds`, 0 before, bit 0 if a row is not and bit 1 if one is. Sums are
// taken in float64 in the order of the groups; squares of float32 are exact there. A thread a row.
extern "C" __global__ void matmul_refined(const float* scales, double threshold, u8* refined, u32* kinds, int m,
                                          int groups) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= m) return;
  const float* own = scales + static_cast<u64>(row) * groups;
  double sum = 0.0;
  for (int group = 0; group < groups; ++group) {
    const double scale = own[group];
    sum = __dadd_rn(sum, __dmul_rn(scale, scale));
  }
  const bool above = __dsqrt_rn(sum) > threshold;  // not so for NaN
  refined[row] = above;
  atomicOr(kinds, above ? 2u : 1u);
}
