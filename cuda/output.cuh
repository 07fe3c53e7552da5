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

// Two floats in the shared memory of the block with part `split` of the columns, at the address they have in this
// block's.
__device__ __forceinline__ float2 load_of(const float* own, int split) {
#if SPLITS > 1
  u32 address;
  float2 values;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(own)), "r"(split));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(values.x), "=f"(values.y) : "r"(address));
  return values;
#else
  return *reinterpret_cast<const float2*>(own);
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
  const bool pairs_fit = out.n % 2 == 0 && reinterpret_cast<u64>(out.y) % 4 == 0;
  if constexpr (SPLITS > 1) cluster_sync();
  for (int pair = threadIdx.x + threads * blockIdx.y; pair < pairs; pair += threads * SPLITS) {
    const int row = pair % (rows / 2) * 2, col = pair / (rows / 2);
    const int n = row0 + row, m = m0 + col;
    if (m >= out.m || n >= out.n) continue;
    float total[2] = {0.0f, 0.0f};
    for (int split = 0; split < SPLITS; ++split) {
#pragma unroll
      for (int slab = 0; slab < slabs; ++slab) {
        const float2 part = load_of(sums + (slab * cols + col) * padded(rows) + row, split);
        total[0] += part.x;
        total[1] += part.y;
      }
    }
    u16* y = out.y + static_cast<u64>(m) * out.n + n;
    u16 results[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (n + i >= out.n) break;
      // NaN or ±Inf among the activations has reached every sum of its row.
      if (!isfinite(total[i])) total[i] = __int_as_float(0x7fffffff);
      if (out.bias != nullptr) {
        total[i] += out.bias_f32 ? static_cast<const float*>(out.bias)[n + i]
                                 : widen(static_cast<const u16*>(out.bias)[n + i]);
      }
      results[i] = round_half(total[i]);
    }
    if (pairs_fit) {
      *reinterpret_cast<u32*>(y) = results[0] | static_cast<u32>(results[1]) << 16;
    } else {
      y[0] = results[0];
      if (n + 1 < out.n) y[1] = results[1];
    }
  }
  if constexpr (SPLITS > 1) cluster_sync();  // no block leaves while another reads its shared memory
}
