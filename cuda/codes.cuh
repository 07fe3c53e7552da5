// Elements to codes (docs/format.md, section 4).

static const float CODE_LIMIT = 0x1p20f;

// 1.5 * 2^23: a float of at most 2^22 plus this is rounded to an integer, which its low bits hold.
static const float MAGIC = 12582912.0f;

__device__ inline int magic_integer(float rounded) { return (int)(__float_as_uint(rounded) - 0x4b400000u); }

// To nearest: u = clamp(RNE(x * inverse) + z); a table's level nearest to it; the sign of a single bit.
__device__ inline int nearest_code(float x, float inverse, float zero, const Table &table) {
    if (LEVELS) {
        float t = fminf(fmaxf(__fmul_rn(x, inverse), -CODE_LIMIT), CODE_LIMIT);
        int code = 0;
#pragma unroll
        for (int i = 0; i + 1 < LEVELS; ++i)
            code += t > (float)(table.level(i) + table.level(i + 1)) * 0.5f - 128.0f;
        return code;
    }
    if (BITS == 1) return x >= 0.0f;
    // Clamped first: rounding keeps the order, and the bounds are integers.
    float t = fminf(fmaxf(__fmul_rn(x, inverse), -zero), (float)TOP_CODE - zero);
    if (SYMMETRIC) return magic_integer(__fadd_rn(t, MAGIC + zero));  // an even zero point rounds nothing
    return magic_integer(__fadd_rn(__fadd_rn(t, MAGIC), zero));
}

// What stochastic rounding divides by. Between 2^-60 and 2^60 the inverse in two words gives the correctly rounded
// quotient of a scale of at most 11 bits in two operations (rust/core/quantize/coders.rs says why).
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
        return scale == 0.0f ? 0.0f : __fdiv_rn(x, scale);
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

// floor(t) and f = t - floor(t); one bit has no whole steps.
__device__ inline float fraction_of(float t, float &floor) {
    floor = BITS == 1 ? 0.0f : floorf(t);
    return BITS == 1 ? __fadd_rn(t, 0.5f) : __fsub_rn(t, floor);
}

// Whether R + RNE(f * 2^DRAW_BITS) reaches 2^DRAW_BITS.
__device__ inline int rounds_up(float fraction, u32 draw) {
    if (DRAW_BITS == 32) return (int)((__float2ull_rn(fraction * 0x1p32f) + draw) >> 32);
    // 2^23 + F has F in its low bits, and none of its own at 2^16.
    u32 threshold = __float_as_uint(__fmaf_rn(fraction, 0x1p16f, 8388608.0f));
    return (int)((threshold + draw) >> 16 & 1);
}

// Stochastic codes need no clamp: the scale is chosen so that none leaves its range.

// t, f and F in one number: RNE(t * 2^16) is floor(t) * 2^16 + F, which a float holds for codes of up to 6 bits.
static const bool IN_16THS = DRAW_BITS == 16 && BITS >= 2 && BITS <= 6;

// The codes of a unit where every element has a draw.
__device__ inline void drawn_codes(
    const float (&x)[UNIT], const Divisor &divisor, float zero, const u32 (&draws)[UNIT], int (&codes)[UNIT]
) {
    float t[UNIT];
    if (IN_16THS) {
        divisor.quotients<16>(x, t);
        const float magic = __fmaf_rn(zero, 0x1p16f, MAGIC);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            // Below 0 the contract rounds t + 1 to f32 before it rounds that to F.
            const float negative = __fsub_rn(__fadd_rn(t[i], 0x1p16f), 0x1p16f);
            const u32 fixed = __float_as_uint(__fadd_rn(t[i] < 0.0f ? negative : t[i], magic));
            codes[i] = (int)((fixed + draws[i]) >> 16 & TOP_CODE);
        }
        return;
    }
    divisor.quotients<0>(x, t);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        float floor, fraction = fraction_of(t[i], floor);
        const int up = rounds_up(fraction, draws[i]);
        if (BITS == 1) codes[i] = divisor.scale == 0.0f ? x[i] >= 0.0f : up;
        else codes[i] = magic_integer(__fadd_rn(floor, MAGIC + zero)) + up;
    }
}

// t in units of 2^-24 modulo 2^8: floor(t) * 2^24 + F. The conversion holds |t| < 128.
static const bool IN_24THS = BITS > 1 && (SYMMETRIC || BITS < 8);

// The codes of a unit of a systematic block. With A the running sum of the fractions of the block's eight units, an
// element rounds up where A passes an integer; the sum of t instead of f counts the whole steps in as well.
// Threads of a team hold units in order, and a small team holds a block in several chunks: `carry` is the sum before
// this one, for the first chunk of a block its phase.
__device__ inline void systematic_codes(
    const float (&x)[UNIT], const Divisor &divisor, float zero, u32 &carry, int (&codes)[UNIT]
) {
    const int width = TEAM < 8 ? TEAM : 8, thread = threadIdx.x % width;
    float t[UNIT];
    u32 sums[UNIT], sum = 0;
    divisor.quotients<IN_24THS ? 24 : 0>(x, t);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        if (IN_24THS) {
            sum += (u32)__float2int_rn(t[i]);
        } else {
            float floor, fraction = fraction_of(t[i], floor);
            sum += ((u32)(int)floor << 24) + __float2uint_rn(fraction * 0x1p24f);
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
    u32 last = before >> 24;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        const u32 now = (before + sums[i]) >> 24;
        codes[i] = (int)(now - last + (BITS == 1 ? 0 : (u32)(int)zero) & TOP_CODE);
        if (BITS == 1 && divisor.scale == 0.0f) codes[i] = x[i] >= 0.0f;
        last = now;
    }
    carry += __shfl_sync(~0u, through, width - 1, width);
}
