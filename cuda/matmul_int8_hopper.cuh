// What the products of integers through wgmma share: clusters of blocks, and the names of sums in registers.
#include "hopper.cuh"
#include "matmul_int8.cuh"

#ifndef CLUSTER
#error "CLUSTER: blocks that share what they read"
#endif

// Of x and of W: one argument, the last of the kernel.
struct TensorMaps {
  TensorMap x, w;
};

// All threads of a cluster, wherever their warps are.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// To the same place of every block of the cluster.
__device__ __forceinline__ void copy_tile_to_all(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<u16>((1 << CLUSTER) - 1))
      : "memory");
}

// The sums `d` of a thread as operands, and their numbers.
#define FIRST_TEN "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define REGISTERS_8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
                       "+r"(d[i + 6]), "+r"(d[i + 7])
#define REGISTERS_32(i) REGISTERS_8(i), REGISTERS_8(i + 8), REGISTERS_8(i + 16), REGISTERS_8(i + 24)

// Keeps reads and writes of sums on their side of what the compiler does not see.
template <int N>
__device__ __forceinline__ void settle(int (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
