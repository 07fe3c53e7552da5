// The scale and the zero point of a group (docs/format.md, section 3).

// Magnitudes below this become 0.
static const float SMALLEST_SCALE = SCALE == F16 ? 0x1p-24f : 0x1p-126f;

__device__ inline float dropped(float scale) { return fabsf(scale) < SMALLEST_SCALE ? 0.0f : scale; }

// round_sd: to nearest even in the dtype of scales.
__device__ inline float round_scale(float scale) {
    return dropped(Number<SCALE>::widen(Number<SCALE>::narrow(scale)));
}

// The next larger value of the dtype of scales after one that is not negative, or `steps` of them.
__device__ inline float neighbour(float scale, int steps) {
    if (SCALE == F16) return Number<F16>::widen((u16)(Number<F16>::narrow(scale) + steps));
    return __uint_as_float(__float_as_uint(scale) + (SCALE == BF16 ? steps << 16 : steps));
}

// A number of the f64 arithmetic of the contract as two floats: `high` is the sum rounded to f32.
struct Double {
    float high, low;
};

// a - b in f64 (Knuth's sum of two floats).
__device__ inline Double difference_of(float a, float b) {
    const float high = __fsub_rn(a, b), back = __fadd_rn(high, b);
    const float low = __fsub_rn(__fsub_rn(a, back), __fsub_rn(b, __fsub_rn(back, high)));
    // At most half a step of f64 above a float is that float.
    const float half_step = __uint_as_float(__float_as_uint(high) & 0x7f800000u) * 0x1p-53f;
    return {high, low <= half_step ? fminf(low, 0.0f) : low};
}

// The smallest value s of the dtype with s * factor >= target, where the product is exact.
__device__ inline float smallest_scale(Double target, float factor) {
    float least;
    if (SCALE == F32) {
        // At most one step away.
        const double whole = (double)target.high + target.low;
        if (!(whole > 0.0)) return 0.0f;
        least = __double2float_rn(__ddiv_rn(whole, (double)factor));
        if (least > 0.0f) least = neighbour(least, -1);
        if (!((double)least * factor >= whole)) least = neighbour(least, 1);
        if (!((double)least * factor >= whole)) least = neighbour(least, 1);
    } else {
        // The quotient in f32 is so close that what it is rounded to is the value below it or the one above; the
        // product has 19 bits at most.
        least = Number<SCALE>::widen(Number<SCALE>::narrow(target.high * (1.0f / factor)));
        if (!(__fsub_rn(__fmul_rn(least, factor), target.high) >= target.low)) least = neighbour(least, 1);
    }
    return dropped(least);
}

__device__ inline float smallest_scale(float target, float factor) { return smallest_scale(Double{target, 0.0f}, factor); }

// 1 / s, and 0 for 0. Of a scale of at most 11 bits 1 / s is at least 2^-37 of itself away from where rounding changes,
// so that Newton's step from the hardware's estimate is rounded correctly. Scales that are given may be so large that
// the inverse is subnormal.
__device__ inline float inverse_of(float scale) {
    if (scale == 0.0f) return 0.0f;
    if (SCALE == F32 || GIVEN) return __fdiv_rn(1.0f, scale);
    float estimate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(scale));
    return __fmaf_rn(estimate, __fmaf_rn(-estimate, scale, 1.0f), estimate);
}

// x / s, rounded correctly: of the scale as a number between 1 and 2, which `unit` makes of it, the inverse in two words
// is off by less than 2^-46 of itself. That suffices for a scale of at most 11 bits (rust/core/quantize/coders.rs says
// why); for one of 24 the exact remainder corrects it (Markstein, 1990).
struct Divisor {
    float scale, unit, high, low;

    explicit __device__ Divisor(float s) : scale(s) {
        unit = __uint_as_float((254u << 23) - (__float_as_uint(s) & 0x7f800000u));
        high = inverse_of(s * unit);
        low = __fmul_rn(__fmaf_rn(-high, s * unit, 1.0f), high);
    }

    __device__ float quotient(float x) const {
        x = flush(x) * unit;
        const float t = __fmaf_rn(x, high, __fmul_rn(x, low));
        return SCALE == F32 ? __fmaf_rn(__fmaf_rn(-t, scale * unit, x), high, t) : t;
    }
};

// x / s * TIMES, a unit at a time: without a `unit` of 2 where no thread of the warp has a scale so small that a
// subnormal x matters, or so large that the second word is subnormal. Made and used by whole warps.
template <int TIMES> struct Quotients {
    Divisor divisor;
    float high, low;
    bool far;

    explicit __device__ Quotients(float s) : divisor(s) {
        high = divisor.high * divisor.unit * TIMES, low = divisor.low * divisor.unit * TIMES;
        const float magnitude = fabsf(s);
        far = SCALE == F32 || __any_sync(~0u, !(magnitude >= 0x1p-60f && magnitude <= 0x1p60f) && magnitude != 0.0f);
    }

    __device__ void of(const float (&x)[UNIT], float (&t)[UNIT]) const {
        if (far) {
#pragma unroll
            for (int i = 0; i < UNIT; ++i) t[i] = divisor.quotient(x[i]) * TIMES;
        } else {
#pragma unroll
            for (int i = 0; i < UNIT; ++i) t[i] = __fmaf_rn(x[i], high, __fmul_rn(x[i], low));
        }
    }
};

// a / TOP_CODE (Markstein, 1990).
__device__ inline float over_top(float a) {
    const float inverse = 1.0f / TOP_CODE, near = __fmul_rn(a, inverse);
    return __fmaf_rn(__fmaf_rn(-near, (float)TOP_CODE, a), inverse, near);
}

struct Affine {
    float scale, zero;
};

// The choice by the extremes of the group, high >= 0 >= low.
__device__ inline Affine choose_by_extremes(float high, float low) {
    const bool up = high >= -low;
    const float peak = up ? high : -low;
    Affine chosen = {0.0f, FIXED_ZERO};
    if (LEVELS) {
        chosen.scale = round_scale(__fdiv_rn(peak, 127.0f));
    } else if (NESTED) {
        float scale = fmaxf(smallest_scale(peak, 128.0f), smallest_scale(up ? -low : high, 119.0f));
        chosen.scale = (up ? -scale : scale) + 0.0f;
    } else if (BITS == 1) {
        chosen.scale = smallest_scale(2.0f * peak, 1.0f);
    } else if (SYMMETRIC) {
        if (MODE == NEAREST) chosen.scale = round_scale((up ? high : low) * (-1.0f / (1 << (BITS - 1))));
        else chosen.scale = smallest_scale(peak, (1 << (BITS - 1)) - 1);
    } else {
        if (MODE == NEAREST) {
            chosen.scale = round_scale(over_top(__fsub_rn(high, low)));
            chosen.zero = fminf(fmaxf(rintf(Divisor(chosen.scale).quotient(-low)), 0.0f), (float)TOP_CODE);
        } else {
            // The smallest integer whose product with the scale is not below -low.
            chosen.scale = smallest_scale(difference_of(high, low), TOP_CODE - 1);
            chosen.zero = rintf(__fmul_rn(-low, inverse_of(chosen.scale)));
            chosen.zero += __fmaf_rn(chosen.zero, chosen.scale, low) < 0.0f ? 1.0f : 0.0f;
        }
        chosen.zero = chosen.scale == 0.0f ? 0.0f : chosen.zero + 0.0f;
    }
    return chosen;
}
