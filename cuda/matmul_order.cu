// Activations with their columns in the order of W in tiles, for the matrix unit of a warp group, which takes them from
// shared memory as they lie.
#include "choice.cuh"
#include "words.cuh"

// x (m, k) to ordered (m, padded), a multiple of 64 columns, zeros behind the last: place 16·t + 8·h + 2·q + e of
// 64 is column 32·(t div 2) + 8·q + 4·(t mod 2) + 2·h + e, the one that lane q holds of W (`tiles.cuh`).
// k is a multiple of 8, rows begin at a multiple of 16 bytes. A thread 8 places, whole warps; four threads exchange
// their words.
extern "C" __global__ void matmul_order(CHOICE const u16* x, u16* ordered, int m, int k, int padded) {
  UNLESS_CHOSEN;
  let_next_begin();  // which waits for its end where it must
  const u32 chunks = padded / 8, at = blockIdx.x * blockDim.x + threadIdx.x;
  const u32 row = at / chunks, column = at % chunks * 8;
  uint4 words = {};
  if (row < m && column < k) words = __ldg(reinterpret_cast<const uint4*>(x + static_cast<u64>(row) * k + column));
  // Word i of thread j becomes word j of thread i: first in pairs, then pairs of them.
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  u32 first = __shfl_xor_sync(~0u, odd ? words.x : words.y, 1);
  u32 second = __shfl_xor_sync(~0u, odd ? words.z : words.w, 1);
  if (odd) words.x = first, words.z = second;
  else words.y = first, words.w = second;
  first = __shfl_xor_sync(~0u, high ? words.x : words.z, 2);
  second = __shfl_xor_sync(~0u, high ? words.y : words.w, 2);
  if (high) words.x = first, words.y = second;
  else words.z = first, words.w = second;
  if (row < m) *reinterpret_cast<uint4*>(ordered + static_cast<u64>(row) * padded + column) = words;
}
