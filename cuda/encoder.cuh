// The encoder: the group of a team to its scale, zero point and codes, which go to a sink unit by unit
// (docs/format.md, sections 2 to 5). What is packed, trained with and differentiated are the same codes.
//
// NAN_ZERO: NaN counts as 0. GIVEN: scales and zero points are there, and only looked at. BLOCKS: that are to fit a
// multiprocessor at a time, which limits registers.

static const float DOMAIN = 0x1p120f;

// Whether the extremes of a group are found before it is widened: X is 1 or 2, BF16 or F16.
#define IN_PAIRS (!LONG && !NAN_ZERO && (X == 1 || X == 2) && __CUDA_ARCH__ >= 800)

// What an encoder is told of a tensor. rho: the variance kept, in units of 2^-16. Blocks of eight or 64 elements are
// numbered from `first_block` on.
struct Encoding {
    Shape shape;
    Table table;
    Source source;
    u64 rho, first_block, blocks_per_group;
};

// The scales and zero points of all groups, and where the first element, scale and zero point that are refused are
// reported: nowhere (null) where nobody can look.
struct Numbers {
    Number<SCALE>::Bits *scales;
    void *zero_points;
    i64 *status;

    // The first group or element of a kind that is refused.
    __device__ void refuse(int kind, u64 number) const {
        if (status) atomicMin(status + kind, (i64)number);
    }
};

enum Refused { ELEMENTS, SCALES, ZEROS };

// Whether a subnormal matters beyond the rounding of its quotient, which takes it for a zero by itself.
static const bool FLUSHED = X != F16 && (BITS == 1 || RULE != EXTREME || PRESERVE);

// A group as numbers of the contract: f32, subnormals as zeros where that is FLUSHED.
struct Held {
    const Loading &loading;
    const Group &group;
    const Shape &shape;

    // The eight values of a unit.
    __device__ void take(u32 chunk, float (&to)[UNIT]) const {
        loading.widen(chunk, to);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            if (FLUSHED) to[i] = flush(to[i]);
            if (NAN_ZERO && to[i] != to[i]) to[i] = 0.0f;
        }
    }

    // Calls pass(chunk, its eight values) for each unit of this thread.
    template <class Pass> __device__ void each(Pass pass) const {
        each_chunk(shape, [&](u32 chunk) {
            float values[UNIT];
            take(chunk, values);
            pass(chunk, values);
        });
    }

    // The sum over the group of value(x), for elements up to `end`.
    template <class Value> __device__ float sum(u64 end, Value value) const {
        return group_sum(shape, end, [&](u32 chunk, float (&terms)[UNIT]) {
            take(chunk, terms);
#pragma unroll
            for (int i = 0; i < UNIT; ++i) terms[i] = value(terms[i]);
        });
    }
};

__device__ inline Extremes extremes_of(const Held &held) {
    Extremes own = {0.0f, 0.0f};
#if IN_PAIRS
    // Two at a time, as memory holds them.
    u32 high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const u32 *pairs = (const u32 *)held.loading.units[i].words;
#pragma unroll
        for (int j = 0; j < UNIT / 2; ++j) {
            high = max_nan2<X>(high, pairs[j]);
            low = min_nan2<X>(low, pairs[j]);
        }
    }
    own.high = flush(max_nan(Number<X>::widen((u16)high), Number<X>::widen((u16)(high >> 16))));
    own.low = flush(min_nan(Number<X>::widen((u16)low), Number<X>::widen((u16)(low >> 16))));
#else
    held.each([&](u32, const float (&x)[UNIT]) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            own.high = max_nan(own.high, x[i]);
            own.low = min_nan(own.low, x[i]);
        }
    });
    own.high = flush(own.high), own.low = flush(own.low);
#endif
    return team_extremes(own);
}

// Reports the first element outside the domain.
__device__ inline void report(const Held &held, const Numbers &numbers) {
    u64 least = ~0ull >> 1;
    held.each([&](u32 chunk, const float (&x)[UNIT]) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            if (!(fabsf(x[i]) <= DOMAIN)) least = min(least, held.group.begin + (u64)unit_of(chunk) * UNIT + i);
    });
    numbers.refuse(ELEMENTS, least);
}

// The multiple of the scale with the smallest squared error; a tie goes to the earlier.
__device__ inline float search_scale(const Held &held, Affine chosen, const Table &table) {
    const float multiples[] = {64, 63, 62, 66, 60, 68, 56, 52, 47};
    float best = chosen.scale, least = 0.0f;
    for (int i = 0; i < 9; ++i) {
        const float scale = round_scale(__fmul_rn(chosen.scale, multiples[i] / 64));
        const float inverse = inverse_of(scale);
        const float error = held.sum(held.shape.size, [&](float x) {
            const float level = nearest_level(x, inverse, chosen.zero, table);
            const float difference = __fsub_rn(x, __fmul_rn(scale, level));
            return __fmul_rn(difference, difference);
        });
        if (i == 0 || error < least) best = scale, least = error;
    }
    return best;
}

// Shrinks a group about its mean, so that it keeps its variance; nothing where there is none, or it overflows.
__device__ inline Affine preserved(const Held &held, Affine chosen) {
    const u64 end = held.group.length;
    const float n = (float)end;
    const Divisor divisor(chosen.scale);
    const float mean = __fdiv_rn(held.sum(end, [](float x) { return x; }), n);
    const float variance = __fdiv_rn(held.sum(end, [&](float x) {
        float deviation = __fsub_rn(x, mean);
        return __fmul_rn(deviation, deviation);
    }), n);
    const float spread = __fdiv_rn(held.sum(end, [&](float x) {
        const float fraction = fraction_of(divisor.quotient(x));
        return __fmul_rn(fraction, __fsub_rn(1.0f, fraction));
    }), n);
    const float noise = __fmul_rn(__fmul_rn(spread, chosen.scale), chosen.scale);
    const float factor = kept_deviation(variance, noise);
    if (factor == 1.0f) return chosen;
    Affine kept = {round_scale(__fmul_rn(chosen.scale, factor)), chosen.zero};
    if (kept.scale != 0.0f)
        kept.zero = __fsub_rn(chosen.zero, __fdiv_rn(__fmul_rn(mean, __fsub_rn(1.0f, factor)), kept.scale));
    return kept;
}

__device__ inline bool is_finite(float x) { return fabsf(x) < __int_as_float(0x7f800000); }

// The scale and zero point by the rule of the scheme.
__device__ inline Affine choose(const Held &held, const Extremes &extremes, const Table &table) {
    const float n = (float)held.group.length;
    Affine chosen = {0.0f, FIXED_ZERO};
    if (RULE == RMS) {
        const float square = held.sum(held.group.length, [](float x) { return __fmul_rn(x, x); });
        chosen.scale = round_scale(__fmul_rn(__fsqrt_rn(__fdiv_rn(square, n)), RMS_LEVEL));
    } else if (BITS == 1 && MODE == NEAREST && !LEVELS) {
        const float sum = held.sum(held.group.length, [](float x) { return fabsf(x); });
        chosen.scale = round_scale(__fdiv_rn(__fmul_rn(2.0f, sum), n));
    } else {
        chosen = choose_by_extremes(extremes.high, extremes.low);
    }
    return chosen;
}

// The scale and zero point that are given. NaN stands for those that no rule makes.
__device__ inline Affine given(const Group &group, const Numbers &numbers) {
    Affine given = {0.0f, FIXED_ZERO};
    if (!group.length) return given;
    given.scale = Number<SCALE>::widen(numbers.scales[group.number]);
    if (ZERO_POINTS == BYTES) given.zero = (float)((const u8 *)numbers.zero_points)[group.number];
    const bool scale_fits = given.scale == 0.0f || (is_finite(given.scale) && fabsf(given.scale) >= 0x1p-126f);
    const bool zero_fits = given.zero <= (float)TOP_CODE || ZERO_POINTS != BYTES;
    if (group.first() && !scale_fits) numbers.refuse(SCALES, group.number);
    if (group.first() && !zero_fits) numbers.refuse(ZEROS, group.number);
    if (!scale_fits || !zero_fits) given.scale = __int_as_float(0x7fc00000);
    return given;
}

// Encodes the group of a team. For each chunk, `sink` is called with its number, its values (subnormals as they are, or
// as zeros), their codes, a byte each, the scale and zero point that are stored (the scale NaN where anything of the
// group is refused), and the inverse of the scale that was chosen. Elements that are not there have some value and some
// code; in a byte, the bits above those of a code are undefined.
template <class Sink>
__device__ void encode(const Loading &loading, const Numbers &numbers, const Encoding &by, Sink sink) {
    const Group &group = loading.group;
    __shared__ __align__(16) u32 shared[WARPS][WARP_WORDS];
    const Drawn drawn(by.source, ELEMENT, by.shape, group, shared[threadIdx.x / 32]);
    const u64 block = by.first_block + group.number * by.blocks_per_group;
    const BlockDraws phases(by.source, MODE == SYSTEMATIC ? block : 0);
    const Held held = {loading, group, by.shape};

    const Extremes extremes = extremes_of(held);
    const bool refused = !(extremes.high <= DOMAIN && extremes.low >= -DOMAIN);
    if (refused && numbers.status) report(held, numbers);

    Affine chosen = GIVEN ? given(group, numbers) : choose(held, extremes, by.table);
    if (!GIVEN) {
        if (group.first() && !refused && !is_finite(chosen.scale)) numbers.refuse(SCALES, group.number);
        if (RULE == MSE && BITS > 1) chosen.scale = search_scale(held, chosen, by.table);
    }
    Affine stored = chosen;
    if (PRESERVE) stored = preserved(held, chosen);
    if (refused) stored.scale = __int_as_float(0x7fc00000);
    if (!GIVEN && group.first()) {
        numbers.scales[group.number] = Number<SCALE>::narrow(stored.scale);
        if (ZERO_POINTS == BYTES) ((u8 *)numbers.zero_points)[group.number] = (u8)stored.zero;
        if (ZERO_POINTS == FLOATS) ((float *)numbers.zero_points)[group.number] = stored.zero;
    }

    const Quotients<SYSTEMATIC_TIMES> quotients(MODE == SYSTEMATIC ? chosen.scale : 1.0f);
    const float inverse = inverse_of(chosen.scale);
    u32 carry = 0;
    held.each([&](u32 chunk, const float (&x)[UNIT]) {
        u64 codes;
        if constexpr (MODE == NEAREST) {
            codes = nearest_codes(x, inverse, chosen.zero, by.table);
        } else if constexpr (MODE == SYSTEMATIC) {
            if (BlockDraws::begins(chunk)) carry = shrunk<24>(phases(chunk) >> 8, (u32)by.rho);
            codes = systematic_codes(x, quotients, chosen.zero, carry);
        } else {
            u32 draws[UNIT], half;
            const u64 index = drawn.unit(chunk, draws, half);
            half = rounding_draws(by.source, index, block + unit_of(chunk), (u32)by.rho, half, draws);
            codes = drawn_codes(x, chosen.scale, inverse, chosen.zero, draws, half);
        }
        sink(chunk, x, codes, stored, inverse);
    });
}
