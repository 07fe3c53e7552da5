// The dtypes of tensors, as memory holds them, and their way to f32 and back. No header of the toolkit: these few
// conversions are one instruction each, and a source without includes compiles wherever NVRTC is.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// The numbers by which the macros of a kernel name a dtype; `dtypes` in ops/cuda/macros.py.
enum Dtype { F32, BF16, F16, F64 };

template <int> struct Number;

template <> struct Number<F32> {
    typedef float Bits;
    static float widen(Bits x) { return x; }
    static Bits narrow(float x) { return x; }
};

template <> struct Number<BF16> {
    typedef u16 Bits;
    static float widen(Bits x) { return __uint_as_float((u32)x << 16); }
    // To nearest even by integers, for targets without the instruction and for scales.
    static Bits narrow(float x) {
        u32 bits = __float_as_uint(x);
        if (x != x) return 0x7fc0;
        return (Bits)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
};

template <> struct Number<F16> {
    typedef u16 Bits;
    static float widen(Bits x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }
    static Bits narrow(float x) {
        Bits y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
};

template <> struct Number<F64> {
    typedef double Bits;
    static float widen(Bits x) { return __double2float_rn(x); }
    static Bits narrow(float x) { return (double)x; }
};

// Two floats as two of a dtype of 16 bits, the first one low.
template <int T> u32 narrow2(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    if (T == BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return (u32)Number<T>::narrow(low) | (u32)Number<T>::narrow(high) << 16;
#endif
}

// A subnormal as the zero of its sign; everything else as it is.
__device__ inline float flush(float x) {
    float y;
    asm("mul.ftz.f32 %0, %1, 0f3F800000;" : "=f"(y) : "f"(x));
    return y;
}

// Maximum and minimum that are NaN where an operand is.
__device__ inline float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a != a || b != b ? a + b : fmaxf(a, b);
#endif
}

__device__ inline float min_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
#else
    return a != a || b != b ? a + b : fminf(a, b);
#endif
}

// The larger and the smaller of two pairs of a dtype of 16 bits, element by element; NaN where an operand is.
#if __CUDA_ARCH__ >= 800
template <int T> u32 max_nan2(u32 a, u32 b) {
    u32 y;
    if (T == BF16) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    else asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

template <int T> u32 min_nan2(u32 a, u32 b) {
    u32 y;
    if (T == BF16) asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    else asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
#endif

// Units: eight consecutive elements, which fill whole bytes of every plane ---------------------------------------

static const int UNIT = 8;

// A unit by loads and stores of 16 bytes; the address is a multiple of them.
template <int T> struct Unit {
    typedef typename Number<T>::Bits Bits;
    static const int WORDS = UNIT * sizeof(Bits) / 16;
    union {
        uint4 words[WORDS];
        Bits elements[UNIT];
    };

    void load(const Bits *x) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = __ldg((const uint4 *)x + i);
    }

    void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = make_uint4(0, 0, 0, 0);
    }

    void widen(float (&to)[UNIT]) const {
        if (T == BF16) {
            const u32 *pairs = (const u32 *)words;
#pragma unroll
            for (int i = 0; i < UNIT; ++i)
                to[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
            return;
        }
#pragma unroll
        for (int i = 0; i < UNIT; ++i) to[i] = Number<T>::widen(elements[i]);
    }

    void narrow(const float (&from)[UNIT]) {
        if (T == BF16 || T == F16) {
            u32 *pairs = (u32 *)words;
#pragma unroll
            for (int i = 0; i < UNIT; i += 2) pairs[i / 2] = narrow2<T>(from[i], from[i + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < UNIT; ++i) elements[i] = Number<T>::narrow(from[i]);
        }
    }

    void store(Bits *x) const {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) ((uint4 *)x)[i] = words[i];
    }
};
