// Pairs of 16-bit floats in a register, and the matrix unit that multiplies them.
#include "words.cuh"

#ifndef BF16
#error "BF16: 1 for bfloat16 activations, 0 for float16"
#endif

#if BF16
constexpr u32 ONES = 0x3f803f80;
#else
constexpr u32 ONES = 0x3c003c00;
#endif

// a · b + c in both halves, rounded once.
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 result;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#endif
  return result;
}

__device__ __forceinline__ u32 add2(u32 a, u32 b) {
#if BF16
  return fma2(a, ONES, b);
#else
  u32 result;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#endif
}

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
#if BF16
  return fma2(a, b, 0x80008000);  // −0 changes no product, nor its sign
#else
  u32 result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#endif
}

__device__ __forceinline__ u16 round_half(float value) {
  u16 half;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
#endif
  return half;
}

// Two floats to the low and the high half.
__device__ __forceinline__ u32 round_halves(float low, float high) {
  u32 halves;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
#endif
  return halves;
}

__device__ __forceinline__ float widen_bf16(u32 half) { return __uint_as_float(half << 16); }

__device__ __forceinline__ float widen_f16(u32 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(half)));
  return value;
}

__device__ __forceinline__ float widen(u32 half) { return BF16 ? widen_bf16(half) : widen_f16(half); }

// Both halves the value, which a 16-bit float holds exactly.
__device__ __forceinline__ u32 twice(float value) { return round_half(value) * 0x00010001u; }

// An operand of the matrix unit with 1 everywhere.
constexpr u32 ALL_ONES[4] = {ONES, ONES, ONES, ONES};

// d += a · b: a is 16 rows of weights by 16 columns, b those 16 columns of 8 rows of activations.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif
  asm(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
