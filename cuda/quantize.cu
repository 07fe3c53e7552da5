// Tensor to scales, zero points and packed codes in one pass (docs/format.md, sections 2 to 6).
//
// A team of TEAM threads holds a group in registers, VECTORS units of eight elements a thread: unit u of the group
// is the (u / TEAM)th of thread u mod TEAM, so a team reads and writes memory in order. A group longer than that
// (LONG) is read again for each pass over it.
//
// Memory is the limit of rounding to nearest; stochastic rounding is bound by instructions, of which Philox takes
// about nine an element.
//
// X: dtype of x. EXACT: the group size divides k, so groups follow each other without a break. ALIGNED: a multiple
// of 8 divides k and group size, and all memory lies on multiples of 16 bytes. FULL: groups are as long as a team
// can hold, all of them. NAN_ZERO: NaN counts as 0.

#include "floats.cuh"
#include "philox.cuh"
#include "scheme.cuh"
#include "planes.cuh"
#include "draws.cuh"
#include "team.cuh"
#include "scales.cuh"
#include "codes.cuh"

static const float DOMAIN = 0x1p120f;

// Whether the extremes of a group are found before it is widened: X is 1 or 2, BF16 or F16.
#define IN_PAIRS (!LONG && !NAN_ZERO && (X == 1 || X == 2) && __CUDA_ARCH__ >= 800)

// The shape of x: rows of k elements in groups of `size`, and the logical index of its first element.
struct Shape {
    u64 rows, k, size, groups_per_row, groups, offset;
};

// The group of a team.
struct Group {
    u64 number;    // row by row
    u64 begin;     // index of its first element in x
    u64 row;       // where they are, if rows follow each other without a gap: all in row 0
    u64 column;
    u32 length;    // elements that are there; 0: no group
};

__device__ inline Group group_of(const Shape &shape, u64 number) {
    Group group = {number, number * shape.size, 0, number * shape.size, 0};
    if (EXACT && ALIGNED) {
        if (number < shape.groups) group.length = (u32)shape.size;
        return group;
    }
    if (number >= shape.groups) return group;
    u32 row = (u32)number / (u32)shape.groups_per_row;
    u64 column = (number - (u64)row * shape.groups_per_row) * shape.size;
    group.row = row;
    group.column = column;
    group.begin = row * shape.k + column;
    group.length = (u32)min(shape.size, shape.k - column);
    return group;
}

// Unit `unit` of a group as memory holds it; zeros where the group has ended.
__device__ inline void load_unit(const Number<X>::Bits *x, const Group &group, u32 unit, Unit<X> &loaded) {
    const u32 first = unit * UNIT;
    const Number<X>::Bits *from = x + group.begin + first;
    if (ALIGNED) {
        // Of a group that fills its team, all units are there or none.
        if (FULL ? group.length : first < group.length) loaded.load(from);
        else loaded.clear();
    } else {
        loaded.clear();
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            if (first + i < group.length) loaded.elements[i] = from[i];
    }
}

// As f32, subnormals as zeros.
__device__ inline void widen_unit(const Unit<X> &loaded, float (&values)[UNIT]) {
    loaded.widen(values);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        if (X != F16) values[i] = flush(values[i]);
        if (NAN_ZERO && values[i] != values[i]) values[i] = 0.0f;
    }
}

// A group as its team holds it: passes go over its units, in the same order for every thread.
struct Held {
    const Number<X>::Bits *x;
    const Group &group;
    u32 chunks;
#if !LONG
    Unit<X> loaded[VECTORS];
    float values[VECTORS][UNIT];
#endif

    // Asks memory for it.
    __device__ Held(const Number<X>::Bits *x, const Group &group, const Shape &shape) : x(x), group(group) {
        chunks = (u32)((shape.size + TEAM * UNIT - 1) / (TEAM * UNIT));
#if !LONG
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) load_unit(x, group, unit(i), loaded[i]);
#endif
    }

    // Waits for it.
    __device__ void arrive() {
#if !LONG
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) widen_unit(loaded[i], values[i]);
#endif
    }

    __device__ u32 unit(u32 chunk) const { return chunk * TEAM + threadIdx.x % TEAM; }

    // Calls pass(number of the unit in the group, its eight values) for each unit of this thread.
    template <class Pass> __device__ void each(Pass pass) {
#if LONG
        for (u32 i = 0; i < chunks; ++i) {
            Unit<X> loaded;
            float values[UNIT];
            load_unit(x, group, unit(i), loaded);
            widen_unit(loaded, values);
            pass(unit(i), values);
        }
#else
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) pass(unit(i), values[i]);
#endif
    }

    // The sum over the group of value(x, index in the group), for elements up to `end`.
    template <class Value> __device__ float sum(u64 end, Value value) {
        Sum16 sum;
        each([&](u32 unit, const float (&x)[UNIT]) {
            float values[UNIT];
#pragma unroll
            for (int i = 0; i < UNIT; ++i) {
                u64 index = (u64)unit * UNIT + i;
                values[i] = index < end ? value(x[i], index) : 0.0f;
            }
            sum.add(values);
        });
        return sum.total();
    }
};

__device__ inline Extremes extremes_of(Held &held) {
    Extremes own = {0.0f, 0.0f};
#if IN_PAIRS
    // Two at a time, as memory holds them.
    u32 high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const u32 *pairs = (const u32 *)held.loaded[i].words;
#pragma unroll
        for (int j = 0; j < UNIT / 2; ++j) {
            high = max_nan2<X>(high, pairs[j]);
            low = min_nan2<X>(low, pairs[j]);
        }
    }
    own.high = flush(max_nan(Number<X>::widen((u16)high), Number<X>::widen((u16)(high >> 16))));
    own.low = flush(min_nan(Number<X>::widen((u16)low), Number<X>::widen((u16)(low >> 16))));
    return team_extremes(own);
#endif
    held.each([&](u32, const float (&x)[UNIT]) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            own.high = max_nan(own.high, x[i]);
            own.low = min_nan(own.low, x[i]);
        }
    });
    return team_extremes(own);
}

// Reports the first element outside the domain.
__device__ inline void report(Held &held, i64 *status) {
    u64 least = ~0ull >> 1;
    held.each([&](u32 unit, const float (&x)[UNIT]) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            if (!(fabsf(x[i]) <= DOMAIN)) least = min(least, held.group.begin + (u64)unit * UNIT + i);
    });
    atomicMin(status, (i64)least);
}

// The multiple of the scale with the smallest squared error; a tie goes to the earlier.
__device__ inline float search_scale(Held &held, const Shape &shape, Affine chosen, const Table &table) {
    const float multiples[] = {64, 63, 62, 66, 60, 68, 56, 52, 47};
    float best = chosen.scale, least = 0.0f;
    for (int i = 0; i < 9; ++i) {
        const float scale = round_scale(__fmul_rn(chosen.scale, multiples[i] / 64));
        const float inverse = inverse_of(scale);
        const float error = held.sum(shape.size, [&](float x, u64) {
            int code = nearest_code(x, inverse, chosen.zero, table);
            float level = __fsub_rn(LEVELS ? (float)table.level(code) : (float)code, chosen.zero);
            float difference = __fsub_rn(x, __fmul_rn(scale, level));
            return __fmul_rn(difference, difference);
        });
        if (i == 0 || error < least) best = scale, least = error;
    }
    return best;
}

// Shrinks a group about its mean, so that it keeps its variance; nothing where there is none, or it overflows.
__device__ inline Affine preserved(Held &held, Affine chosen) {
    const u64 end = held.group.length;
    const float n = (float)end;
    const Divisor divisor(chosen.scale);
    const float mean = __fdiv_rn(held.sum(end, [](float x, u64) { return x; }), n);
    const float variance = __fdiv_rn(held.sum(end, [&](float x, u64) {
        float deviation = __fsub_rn(x, mean);
        return __fmul_rn(deviation, deviation);
    }), n);
    const float spread = __fdiv_rn(held.sum(end, [&](float x, u64) {
        float floor, fraction = fraction_of(divisor.quotient(x), floor);
        return __fmul_rn(fraction, __fsub_rn(1.0f, fraction));
    }), n);
    const float noise = __fmul_rn(__fmul_rn(spread, chosen.scale), chosen.scale);
    const float total = __fadd_rn(variance, noise);
    if (total == 0.0f || !isfinite(total)) return chosen;
    const float factor = __fsqrt_rn(__fdiv_rn(variance, total));
    Affine kept = {round_scale(__fmul_rn(chosen.scale, factor)), chosen.zero};
    if (kept.scale != 0.0f)
        kept.zero = __fsub_rn(chosen.zero, __fdiv_rn(__fmul_rn(mean, __fsub_rn(1.0f, factor)), kept.scale));
    return kept;
}

__device__ inline bool is_finite(float x) { return fabsf(x) < __int_as_float(0x7f800000); }

// status: where the first element outside the domain and the first scale that is not finite are reported; nothing
// is where nobody can look. rms: the largest level of "rms" in units of 1/127. rho: the variance kept, 2^-16.
extern "C" __global__ void __launch_bounds__(THREADS) pack(
    const Number<X>::Bits *x, u8 *packed, Number<SCALE>::Bits *scales, void *zero_points, i64 *status,
    u64 rows, u64 k, u64 size, u64 groups_per_row, u64 groups, u64 offset,
    u64 table_low, u64 table_high, float rms, u32 key0, u32 key1, u32 stream, u32 step, u32 rho,
    u64 first_block, u64 blocks_per_group
) {
    const Shape shape = {rows, k, size, groups_per_row, groups, offset};
    const Table table = {table_low, table_high};
    const Source source = {key0, key1, stream, step};
    const u64 number = (u64)blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
    const Group group = group_of(shape, number);
    Held held(x, group, shape);

    __shared__ __align__(16) u32 shared[WARPS][WARP_WORDS];
    u32 *tiles = shared[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    // While memory is on its way, a small team draws for all its units; a larger one will, chunk by chunk.
    if (TILED && TEAM < 32) fill_tiles(source, shape.offset + (number - lane / TEAM) * shape.size, tiles);
    held.arrive();

    const Extremes extremes = extremes_of(held);
    const bool refused = !(extremes.high <= DOMAIN && extremes.low >= -DOMAIN);
    if (refused && status) report(held, status);

    Affine chosen;
    if (RULE == RMS) {
        float square = held.sum(group.length, [](float x, u64) { return __fmul_rn(x, x); });
        chosen.scale = round_scale(__fmul_rn(__fsqrt_rn(__fdiv_rn(square, (float)group.length)), rms));
        chosen.zero = FIXED_ZERO;
    } else if (BITS == 1 && MODE == NEAREST && !LEVELS) {
        float sum = held.sum(group.length, [](float x, u64) { return fabsf(x); });
        chosen.scale = round_scale(__fdiv_rn(__fmul_rn(2.0f, sum), (float)group.length));
        chosen.zero = FIXED_ZERO;
    } else {
        chosen = choose_by_extremes(extremes.high, extremes.low);
    }
    const bool first = threadIdx.x % TEAM == 0 && group.length;
    if (first && status && !refused && !is_finite(chosen.scale)) atomicMin(status + 1, (i64)number);
    if (RULE == MSE && BITS > 1) chosen.scale = search_scale(held, shape, chosen, table);

    Affine stored = chosen;
    if (PRESERVE) stored = preserved(held, chosen);
    if (refused) stored.scale = __int_as_float(0x7fc00000);
    if (first) {
        scales[number] = Number<SCALE>::narrow(stored.scale);
        if (ZERO_POINTS == BYTES) ((u8 *)zero_points)[number] = (u8)stored.zero;
        if (ZERO_POINTS == FLOATS) ((float *)zero_points)[number] = stored.zero;
    }

    const Divisor divisor(chosen.scale);
    const u64 block = first_block + number * blocks_per_group;
    const u64 first_unit = group.begin / UNIT;
    u32 carry = 0;
    held.each([&](u32 unit, const float (&x)[UNIT]) {
        int codes[UNIT];
        if constexpr (MODE == NEAREST) {
#pragma unroll
            for (int i = 0; i < UNIT; ++i) codes[i] = nearest_code(x[i], divisor.high, chosen.zero, table);
        } else if constexpr (MODE == SYSTEMATIC) {
            // Where a chunk is at least a block, or begins one.
            if (TEAM >= 8 || unit / TEAM * TEAM % 8 == 0)
                carry = shrunk<24>(block_draw(source, block + unit / 8) >> 8, rho);
            systematic_codes(x, divisor, chosen.zero, carry, codes);
        } else {
            u32 draws[UNIT];
            const u64 index = shape.offset + group.begin + (u64)unit * UNIT;
            if (TILED && TEAM >= 32) fill_tiles(source, index - UNIT * lane, tiles);
            const int place = TEAM < 32 ? lane / TEAM * (TEAM * VECTORS) + unit : lane;
            rounding_draws(source, index, place, block + unit, rho, tiles, draws);
            drawn_codes(x, divisor, chosen.zero, draws, codes);
        }
        const u32 from = unit * UNIT;
        if (FULL ? group.length : from < group.length) {
            const int present = (int)min((u32)UNIT, group.length - from);
            if (!ALIGNED) {
#pragma unroll
                for (int i = 0; i < UNIT; ++i)
                    if (i >= present) codes[i] = 0;
            }
            const Place at = {shape.rows, shape.k, group.row, group.column + from, first_unit + unit};
            Planes<0>::store(packed, at, codes, present);
        }
    });
}
