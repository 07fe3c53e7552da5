// Elements to codes (docs/format.md, section 4).

static const float CODE_LIMIT = 0x1p20f;

// 1.5 * 2^23: a float of at most 2^22 plus this is rounded to an integer, which its low bits hold. The lowest byte of
// it is 0.
static const float MAGIC = 12582912.0f;

// Byte BYTE of each of eight words, the first one lowest.
template <int BYTE> __device__ inline u64 gather(const u32 (&words)[UNIT]) {
    const u32 two = 0x40 + 0x11 * BYTE;
    const u32 low = __byte_perm(__byte_perm(words[0], words[1], two), __byte_perm(words[2], words[3], two), 0x5410);
    const u32 high = __byte_perm(__byte_perm(words[4], words[5], two), __byte_perm(words[6], words[7], two), 0x5410);
    return (u64)high << 32 | low;
}

// A byte in each of eight.
__device__ inline u64 bytes_of(u32 byte) { return 0x0101010101010101ull * byte; }

// x / s as rounding to nearest takes it. A subnormal x counts as 0; a subnormal quotient may.
__device__ inline float scaled(float x, float inverse) {
    float t;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(t) : "f"(x), "f"(inverse));
    return t;
}

// RNE(x * inverse) where its code is not clamped, and where it is the end of the codes: code - zero point. Clamped
// first: rounding keeps the order, and the bounds are integers.
__device__ inline float clamped(float x, float inverse, float zero) {
    return fminf(fmaxf(scaled(x, inverse), -zero), (float)TOP_CODE - zero);
}

// To nearest, in the low byte: u = clamp(RNE(x * inverse) + z); a table's level nearest to it; the sign of a single
// bit.
__device__ inline u32 nearest_code(float x, float inverse, float zero, const Table &table) {
    if (LEVELS) {
        const float t = fminf(fmaxf(scaled(x, inverse), -CODE_LIMIT), CODE_LIMIT);
        u32 code = 0;
#pragma unroll
        for (int i = 0; i + 1 < LEVELS; ++i)
            code += t > (float)(table.level(i) + table.level(i + 1)) * 0.5f - 128.0f;
        return code;
    }
    if (BITS == 1) return x >= 0.0f;
    const float t = clamped(x, inverse, zero);
    if (SYMMETRIC) return __float_as_uint(__fadd_rn(t, MAGIC + zero));  // an even zero point rounds nothing
    return __float_as_uint(__fadd_rn(__fadd_rn(t, MAGIC), zero));
}

// The level of a code to nearest before its scale, without its zero point.
__device__ inline float nearest_level(float x, float inverse, float zero, const Table &table) {
    if (LEVELS) return __fsub_rn((float)table.level((int)nearest_code(x, inverse, zero, table)), zero);
    return __fsub_rn(__fadd_rn(clamped(x, inverse, zero), MAGIC), MAGIC);
}

// What stochastic rounding divides by. Between 2^-60 and 2^60 the inverse in two words gives the correctly rounded
// quotient of a scale of at most 11 bits in two operations (rust/core/quantize/coders.rs says why).
// A subnormal x may come as it is: divided by so large a scale, it rounds to the codes of a zero.
struct Divisor {
    float scale, high, low;
    bool divide;

    explicit Divisor(float s) : scale(s) {
        high = inverse_of(s);
        low = __fmul_rn(__fmaf_rn(-high, s, 1.0f), high);
        divide = SCALE == F32 || !(s >= 0x1p-60f && s <= 0x1p60f);
    }

    float quotient(float x) const {
        if (!divide) return __fmaf_rn(x, high, __fmul_rn(x, low));
        return scale == 0.0f ? 0.0f : __fdiv_rn(flush(x), scale);
    }

    // x / s * 2^SHIFT of a unit, with one question for all eight.
    template <int SHIFT> void quotients(const float (&x)[UNIT], float (&t)[UNIT]) const {
        const float one = (float)(1 << SHIFT);
        if (!divide) {
#pragma unroll
            for (int i = 0; i < UNIT; ++i) t[i] = __fmaf_rn(x[i], high * one, __fmul_rn(x[i], low * one));
        } else {
#pragma unroll 1
            for (int i = 0; i < UNIT; ++i) {
                const float own = quotient(pick(x, i)) * one;
#pragma unroll
                for (int j = 0; j < UNIT; ++j) t[j] = i == j ? own : t[j];
            }
        }
    }

    static float pick(const float (&x)[UNIT], int i) {
        float picked = x[0];
#pragma unroll
        for (int j = 1; j < UNIT; ++j) picked = i == j ? x[j] : picked;
        return picked;
    }
};

// f = t - floor(t); one bit has no whole steps.
__device__ inline float fraction_of(float t) {
    return BITS == 1 ? __fadd_rn(t, 0.5f) : __fsub_rn(t, floorf(t));
}

// Stochastic codes need no clamp: the scale is chosen so that none leaves its range.

// The codes of a unit where every element has a draw: up where R + RNE(f * 2^DRAW_BITS) reaches 2^DRAW_BITS. `half`:
// where R is in a draw (draws.cuh).
__device__ inline u64 drawn_codes(
    const float (&x)[UNIT], const Divisor &divisor, float zero, const u32 (&draws)[UNIT], u32 half
) {
    float t[UNIT];
    u32 words[UNIT];
    divisor.quotients<0>(x, t);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        // MAGIC + z + floor(t), in its low bits the code that is rounded down.
        const float down = BITS == 1 ? MAGIC : __fadd_rd(t[i], MAGIC + zero);
        const float fraction = BITS == 1 ? __fadd_rn(t[i], 0.5f) : __fsub_rn(t[i], __fsub_rn(down, MAGIC + zero));
        if (DRAW_BITS == 32) {
            const u32 up = (u32)((__float2ull_rn(fraction * 0x1p32f) + draws[i]) >> 32);
            words[i] = __float_as_uint(down) + up << 16;
        } else {
            // 2^23 + F has F in its low bits, and none of its own at 2^16, where the sum carries.
            const u32 threshold = __float_as_uint(__fmaf_rn(fraction, 0x1p16f, 8388608.0f));
            words[i] = (__float_as_uint(down) << 16) + add_half(draws[i], half, threshold);
        }
    }
    u64 codes = gather<2>(words);
    if (BITS == 1 && divisor.scale == 0.0f) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) words[i] = x[i] >= 0.0f;
        codes = gather<0>(words);
    }
    return codes & bytes_of(TOP_CODE);
}

// t in units of 2^-24 modulo 2^8: floor(t) * 2^24 + F. The conversion holds |t| < 128.
static const bool IN_24THS = BITS > 1 && (SYMMETRIC || BITS < 8);

// a - b and a + b of each of eight bytes.
__device__ inline u64 minus_bytes(u64 a, u64 b) {
    const u64 tops = bytes_of(0x80);
    return (a | tops) - (b & ~tops) ^ (a ^ ~b) & tops;
}

__device__ inline u64 plus_bytes(u64 a, u64 b) {
    const u64 tops = bytes_of(0x80);
    return (a & ~tops) + (b & ~tops) ^ (a ^ b) & tops;
}

// The codes of a unit of a systematic block. With A the running sum of the fractions of the block's eight units, an
// element rounds up where A passes an integer; the sum of t instead of f counts the whole steps in as well.
// Threads of a team hold units in order, and a small team holds a block in several chunks: `carry` is the sum before
// this one, for the first chunk of a block its phase.
__device__ inline u64 systematic_codes(const float (&x)[UNIT], const Divisor &divisor, float zero, u32 &carry) {
    const int width = TEAM < 8 ? TEAM : 8, thread = threadIdx.x % width;
    float t[UNIT];
    u32 sums[UNIT], sum = 0;
    divisor.quotients<IN_24THS ? 24 : 0>(x, t);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        if (IN_24THS) {
            sum += (u32)__float2int_rn(t[i]);
        } else {
            const float floor = BITS == 1 ? 0.0f : floorf(t[i]);
            sum += ((u32)(int)floor << 24) + __float2uint_rn(fraction_of(t[i]) * 0x1p24f);
        }
        sums[i] = sum;
    }
    u32 through = sum;
#pragma unroll
    for (int step = 1; step < width; step *= 2) {
        u32 other = __shfl_up_sync(~0u, through, step, width);
        if (thread >= step) through += other;
    }
    const u32 before = carry + through - sum;
    carry += __shfl_sync(~0u, through, width - 1, width);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) sums[i] += before;
    // Whole steps are in the highest byte.
    const u64 now = gather<3>(sums), last = now << 8 | before >> 24;
    u64 codes = minus_bytes(now, last);
    if (BITS > 1) codes = plus_bytes(codes, bytes_of((u32)(int)zero));
    if (BITS == 1 && divisor.scale == 0.0f) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) sums[i] = x[i] >= 0.0f;
        codes = gather<0>(sums);
    }
    return codes & bytes_of(TOP_CODE);
}
