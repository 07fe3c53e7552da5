// What Hopper has of its own: barriers in shared memory, the copy engine, and the matrix unit of a warp group.
#include "words.cuh"

#ifndef STAGES
#error "STAGES: that copies run ahead"
#endif

constexpr int GROUP_THREADS = 128;  // of a warp group

struct alignas(64) TensorMap {
  u64 words[16];
};

// Barriers --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Arrives, and lets `bytes` of copies arrive before the phase ends.
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives. What it says is that copies may overwrite what has been read, and of that the threads have waited for
// the end.
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier of block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(u32 barrier, int rank) {
  u32 address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(barrier), "r"(rank));
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// A stage of a ring of STAGES, and the parity of its phase.
struct Slot {
  int stage = 0;
  u32 parity = 0;

  // By fewer than STAGES.
  __device__ __forceinline__ void advance(int by = 1) {
    if ((stage += by) >= STAGES) stage -= STAGES, parity ^= 1;
  }
};

// Copies ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_tile(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The matrix unit -------------------------------------------------------------------------------------------

// What describes rows of 128 bytes, swizzled, that begin at `address`; 32 bytes on are 2 more.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (address & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the `N` latest groups of products are there.
template <int N>
__device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
