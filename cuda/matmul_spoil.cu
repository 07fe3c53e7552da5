// NaN over the results of rows of x that are not finite, where cuBLAS has multiplied them.
#include "half2.cuh"

// A block a row: x (m, k), k a multiple of 8 and rows on multiples of 16 bytes; y (m, n). What is not finite has
// reached every result of its row, so nearly always one of them is all that is read.
extern "C" __global__ void matmul_spoil(const u16* x, u16* y, int n, int k) {
  constexpr u32 exponent = BF16 ? 0x7f80 : 0x7c00;
  u16* results = y + static_cast<u64>(blockIdx.x) * n;
  if ((results[0] & exponent) != exponent) return;
  const uint4* row = reinterpret_cast<const uint4*>(x + static_cast<u64>(blockIdx.x) * k);
  bool finite = true;
  for (int i = threadIdx.x; i < k / 8; i += blockDim.x) {
    const uint4 words = row[i];
    const u32 each[4] = {words.x, words.y, words.z, words.w};
    for (const u32 word : each) {
      finite &= (word & exponent) != exponent && (word >> 16 & exponent) != exponent;
    }
  }
  if (__syncthreads_and(finite)) return;
  for (int i = threadIdx.x; i < n; i += blockDim.x) results[i] = 0x7fff;
}
