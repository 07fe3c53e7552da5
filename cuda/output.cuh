// Sums of warps and of blocks to results: added in one order, whatever the timing.
#include "half2.cuh"

#ifndef SPLITS
#error "SPLITS: blocks, of one cluster, that share the columns"
#endif

#if SPLITS > 1
#define CLUSTER __cluster_dims__(1, SPLITS, 1)
#else
#define CLUSTER
#endif

struct Output {
  u16* y;            // (m, n)
  const void* bias;  // (n,) in float32 or the dtype of y, or null
  int bias_f32;
  int m, n;
};

__device__ __forceinline__ void cluster_sync() {
#if SPLITS > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A float in the shared memory of block `rank` of this cluster, at the address it has in this block's.
__device__ __forceinline__ float load_of_rank(const float* own, int rank) {
#if SPLITS > 1
  u32 address;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address));
  return value;
#else
  return *own;
#endif
}

// Padded so that the lanes of a warp write to different banks.
constexpr int padded(int rows) { return rows + 4; }

// Adds the sums of `slabs` warps of each block of the cluster to rows `row0`… of W and `m0`… of x.
//
// sums: `slabs` ▸ `cols` ▸ `padded(rows)` floats, complete in this block after a __syncthreads.
template <int rows, int cols, int slabs, int threads>
__device__ __forceinline__ void store(const float* sums, const Output& out, int row0, int m0) {
  constexpr int pairs = rows * cols / 2;
  static_assert(rows % 2 == 0, "pairs of rows");
  cluster_sync();
  for (int pair = threadIdx.x + threads * blockIdx.y; pair < pairs; pair += threads * SPLITS) {
    const int row = pair % (rows / 2) * 2, col = pair / (rows / 2);
    float total[2] = {0.0f, 0.0f};
    for (int rank = 0; rank < SPLITS; ++rank) {
#pragma unroll
      for (int slab = 0; slab < slabs; ++slab) {
        const float* at = sums + (slab * cols + col) * padded(rows) + row;
        total[0] += load_of_rank(at, rank);
        total[1] += load_of_rank(at + 1, rank);
      }
    }
    const int n = row0 + row, m = m0 + col;
    if (m >= out.m) continue;
    u16* y = out.y + static_cast<u64>(m) * out.n + n;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (n + i >= out.n) break;
      // NaN or ±Inf among the activations has reached every sum of its row.
      if (!isfinite(total[i])) total[i] = __int_as_float(0x7fffffff);
      if (out.bias != nullptr) {
        total[i] += out.bias_f32 ? static_cast<const float*>(out.bias)[n + i]
                                 : widen(static_cast<const u16*>(out.bias)[n + i]);
      }
      y[i] = round_half(total[i]);
    }
  }
  cluster_sync();  // no block leaves while another reads its shared memory
}
