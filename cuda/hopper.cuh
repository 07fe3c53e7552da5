// What Hopper has of its own: barriers in shared memory, the copy engine, and the matrix unit of a warp group.
#include "half2.cuh"

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

#define REGISTERS_8(i) "+f"(d[(i) / 4][0]), "+f"(d[(i) / 4][1]), "+f"(d[(i) / 4][2]), "+f"(d[(i) / 4][3]), \
                       "+f"(d[(i) / 4 + 1][0]), "+f"(d[(i) / 4 + 1][1]), "+f"(d[(i) / 4 + 1][2]), "+f"(d[(i) / 4 + 1][3])
#define REGISTERS_16(i) REGISTERS_8(i), REGISTERS_8(i + 8)
#define REGISTERS_32(i) REGISTERS_16(i), REGISTERS_16(i + 16)
#define REGISTERS_64(i) REGISTERS_32(i), REGISTERS_32(i + 32)
#define TEN(t) ",%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define EIGHT "%0,%1,%2,%3,%4,%5,%6,%7"
#define SIXTY EIGHT ",%8,%9" TEN(1) TEN(2) TEN(3) TEN(4) TEN(5)
#if BF16
#define HALF_TYPES ".f32.bf16.bf16 {"
#else
#define HALF_TYPES ".f32.f16.f16 {"
#endif
// The operands behind `d`, by their numbers.
#define WGMMA(shape, d_list, a0, a1, a2, a3, b, more)                                                      \
  "{\n.reg .pred more;\nsetp.ne.b32 more, %" #more ", 0;\nwgmma.mma_async.sync.aligned." shape HALF_TYPES d_list \
  "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", more, 1, 1, 0;\n}"

// d = a · b, `more`: + d. A warp's 16 rows of the 64 of its group by 16 columns; those columns of 8·N rows of x.
template <int N>
__device__ __forceinline__ void multiply(float (&d)[N][4], const u32 (&a)[4], u64 b, int more) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma is part of sm_90a alone"
#endif
  static_assert(N == 2 || N == 4 || N == 8 || N == 16 || N == 32, "16 to 256 rows of x");
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more)
  if constexpr (N == 2) {
    asm volatile(WGMMA("m64n16k16", EIGHT, 8, 9, 10, 11, 12, 13) : REGISTERS_8(0) : OPERANDS);
  } else if constexpr (N == 4) {
    asm volatile(WGMMA("m64n32k16", EIGHT ",%8,%9,%10,%11,%12,%13,%14,%15", 16, 17, 18, 19, 20, 21)
                 : REGISTERS_16(0) : OPERANDS);
  } else if constexpr (N == 8) {
    asm volatile(WGMMA("m64n64k16", EIGHT ",%8,%9" TEN(1) TEN(2) ",%30,%31", 32, 33, 34, 35, 36, 37)
                 : REGISTERS_32(0) : OPERANDS);
  } else if constexpr (N == 16) {
    asm volatile(WGMMA("m64n128k16", SIXTY ",%60,%61,%62,%63", 64, 65, 66, 67, 68, 69) : REGISTERS_64(0) : OPERANDS);
  } else {
    asm volatile(WGMMA("m64n256k16", SIXTY TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
                       ",%120,%121,%122,%123,%124,%125,%126,%127", 128, 129, 130, 131, 132, 133)
                 : REGISTERS_64(0), REGISTERS_64(64) : OPERANDS);
  }
#undef OPERANDS
}

__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the `N` latest groups of products are there.
template <int N>
__device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps reads and writes of sums on their side of what the compiler does not see.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}
