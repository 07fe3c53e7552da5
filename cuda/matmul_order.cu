// Activations in the order of the matrix unit of a warp group, which takes them from shared memory as they lie.
#include "choice.cuh"
#include "words.cuh"

// x (m, k) to ordered (m, padded), a multiple of 64 columns, zeros behind the last: place 16·t + 8·h + 2·q + e of
// 64 is column 32·(t div 2) + 8·q + 4·(t mod 2) + 2·h + e, the one that lane q holds of W (`tiles.cuh`).
// k is a multiple of 8, rows begin at a multiple of 16 bytes. A thread 8 places.
extern "C" __global__ void matmul_order(CHOICE const u16* x, u16* ordered, int m, int k, int padded) {
  UNLESS_CHOSEN;
  let_next_begin();  // which waits for its end where it must
  const u32 chunks = padded / 8, at = blockIdx.x * blockDim.x + threadIdx.x;
  const u32 row = at / chunks, chunk = at % chunks;
  if (row >= m) return;
  const u32 step = chunk / 2 % 4, column = chunk / 8 * 64 + step / 2 * 32 + step % 2 * 4 + chunk % 2 * 2;
  u32 words[4];
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const u32 from = column + 8 * lane;
    words[lane] = from < k ? __ldg(reinterpret_cast<const u32*>(x + static_cast<u64>(row) * k + from)) : 0;
  }
  *reinterpret_cast<uint4*>(ordered + static_cast<u64>(row) * padded + chunk * 8) =
      make_uint4(words[0], words[1], words[2], words[3]);
}
