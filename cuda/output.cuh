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

// Four floats in the shared memory of the block with part `split` of the columns, at the address they have in this
// block's.
__device__ __forceinline__ float4 load_of(const float* own, int split) {
#if SPLITS > 1
  u32 address;
  float4 values;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(own)), "r"(split));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "r"(address));
  return values;
#else
  return *reinterpret_cast<const float4*>(own);
#endif
}

// The bias of row `row` of W, 0 where there is none.
__device__ __forceinline__ float bias_of(const Output& out, int row) {
  if (out.bias == nullptr || row >= out.n) return 0.0f;
  return out.bias_f32 ? static_cast<const float*>(out.bias)[row] : widen(static_cast<const u16*>(out.bias)[row]);
}

// A result before it is rounded: NaN or ±Inf among the activations has reached every sum of its row. What is added is
// the bias where the sum is finite, else NaN.
__device__ __forceinline__ float finish(float sum, float bias) { return sum + __fmaf_rn(sum, 0.0f, bias); }

// `count` results of row `m` of x from row `n` of W on, halves in `words`: at once where they fit.
template <int count>
__device__ __forceinline__ void store_halves(const Output& out, int m, int n, const u32 (&words)[count / 2]) {
  u16* y = out.y + static_cast<u64>(m) * out.n + n;
  if (n + count <= out.n && reinterpret_cast<u64>(y) % (2 * count) == 0) {
    if constexpr (count == 8) *reinterpret_cast<uint4*>(y) = make_uint4(words[0], words[1], words[2], words[3]);
    else *reinterpret_cast<uint2*>(y) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (n + i < out.n) y[i] = words[i / 2] >> 16 * (i % 2);
    }
  }
}

// Padded so that the lanes of a warp write to different banks.
constexpr int padded(int rows) { return rows + 4; }

// Adds the sums of `slabs` warps of each block of the cluster to rows `row0`… of W and `m0`… of x, `here` of them.
//
// sums: `slabs` ▸ `here` ▸ `padded(rows)` floats, complete in this block after a __syncthreads.
template <int rows, int cols, int slabs, int threads>
__device__ __forceinline__ void store(const float* sums, const Output& out, int row0, int m0, int here = cols) {
  constexpr int each = 4;
  const int chunks = rows / each * here;
  static_assert(rows % each == 0, "whole chunks of rows");
  if constexpr (SPLITS > 1) cluster_sync();
  for (int chunk = threadIdx.x + threads * blockIdx.y; chunk < chunks; chunk += threads * SPLITS) {
    const int row = chunk % (rows / each) * each, col = chunk / (rows / each);
    const int n = row0 + row, m = m0 + col;
    if (m >= out.m || n >= out.n) continue;
    float total[each] = {};
    for (int split = 0; split < SPLITS; ++split) {
#pragma unroll
      for (int slab = 0; slab < slabs; ++slab) {
        const float4 part = load_of(sums + (slab * here + col) * padded(rows) + row, split);
        total[0] += part.x;
        total[1] += part.y;
        total[2] += part.z;
        total[3] += part.w;
      }
    }
#pragma unroll
    for (int i = 0; i < each; ++i) total[i] = finish(total[i], bias_of(out, n + i));
    const u32 words[] = {round_halves(total[0], total[1]), round_halves(total[2], total[3])};
    store_halves<each>(out, m, n, words);
  }
  if constexpr (SPLITS > 1) cluster_sync();  // no block leaves while another reads its shared memory
}
