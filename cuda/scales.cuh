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

// The smallest value s of the dtype with s * factor >= target, compared in f64, where the product is exact.
__device__ inline float smallest_scale(double target, float factor) {
    if (!(target > 0.0)) return 0.0f;
    float least;
    if (SCALE == F32) {
        // At most one step away.
        least = __double2float_rn(__ddiv_rn(target, (double)factor));
        if (least > 0.0f) least = neighbour(least, -1);
        if (!((double)least * factor >= target)) least = neighbour(least, 1);
    } else {
        // The quotient in f32 is so close that what it is rounded to is the value below it or the one above.
        least = __fdiv_rn(__double2float_rn(target), factor);
        least = Number<SCALE>::widen(Number<SCALE>::narrow(least));
    }
    if (!((double)least * factor >= target)) least = neighbour(least, 1);
    return dropped(least);
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
        chosen.scale = smallest_scale(2.0 * peak, 1.0f);
    } else if (SYMMETRIC) {
        if (MODE == NEAREST) chosen.scale = round_scale((up ? high : low) * (-1.0f / (1 << (BITS - 1))));
        else chosen.scale = smallest_scale(peak, (1 << (BITS - 1)) - 1);
    } else {
        if (MODE == NEAREST) {
            chosen.scale = round_scale(__fdiv_rn(__fsub_rn(high, low), (float)TOP_CODE));
            chosen.zero = fminf(fmaxf(rintf(__fdiv_rn(-low, chosen.scale)), 0.0f), (float)TOP_CODE);
        } else {
            chosen.scale = smallest_scale((double)high - (double)low, TOP_CODE - 1);
            chosen.zero = (float)ceil(__ddiv_rn(-(double)low, (double)chosen.scale));
        }
        chosen.zero = chosen.scale == 0.0f ? 0.0f : chosen.zero + 0.0f;
    }
    return chosen;
}

__device__ inline float inverse_of(float scale) { return scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale); }
