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

__device__ inline int stochastic_code(float x, float scale, float floor, float zero, int up) {
    if (BITS == 1) return scale == 0.0f ? x >= 0.0f : up;
    return min(max(magic_integer(__fadd_rn(floor, MAGIC + zero)) + up, 0), TOP_CODE);
}

// The fixed-point fractions of a systematic block, 2^-24.
__device__ inline u32 fixed_fraction(float fraction) { return __float2uint_rn(fraction * 0x1p24f); }

// Which of the elements of a unit round up: the running sum of the fractions of its block passes an integer there.
// The units of a block of 64 are those of eight threads, or of the whole team.
__device__ inline void systematic(const float (&fractions)[UNIT], u32 phase, int (&up)[UNIT]) {
    const int width = TEAM < 8 ? TEAM : 8, thread = threadIdx.x % width;
    u32 sums[UNIT], sum = 0;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) sums[i] = sum += fixed_fraction(fractions[i]);
    u32 before = sum;
#pragma unroll
    for (int step = 1; step < width; step *= 2) {
        u32 other = __shfl_up_sync(~0u, before, step, width);
        if (thread >= step) before += other;
    }
    u32 last = phase + before - sum;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        u32 now = phase + before - sum + sums[i];
        up[i] = (int)((now >> 24) - (last >> 24) & 255);
        last = now;
    }
}
