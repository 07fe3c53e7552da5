// The value that a quantized tensor decodes to, and the gradients that pass through it.
//
//     forward:    x ──encode──► codes ──► s · (Q − z)                     (what unpack(pack(x)) gives)
//     backward:   x ──encode──► codes ──┬► grad of x: grad where the code was not clamped, else 0
//                                       └► grad of s: Σ grad · (Q − z − v), v = x / s, or Q − z where clamped
//
// The gradients are those of LSQ, as in rust/core/fake_quantize.rs. Memory is the limit of both.

#include "floats.cuh"
#include "philox.cuh"
#include "scheme.cuh"
#include "draws.cuh"
#include "team.cuh"
#include "groups.cuh"
#include "scales.cuh"
#include "codes.cuh"
#include "encoder.cuh"
#include "levels.cuh"

// Q − z of the codes of a unit, of which the top bits are read. To nearest, what is rounded and clamped is that already.
__device__ inline void decode(
    const float (&x)[UNIT], u64 codes, float inverse, float zero, const Table &table, float (&levels)[UNIT]
) {
    if (MODE == NEAREST && BITS > 1 && !LEVELS && !REST) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) levels[i] = nearest_level(x[i], inverse, zero, table);
        return;
    }
    const u64 read = codes >> REST & bytes_of(TOP_CODE >> REST);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) levels[i] = __fsub_rn(level_of(read, i, table), zero);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fake_quantize(
    const Number<X>::Bits *x, Number<SCALE>::Bits *scales, void *zero_points, Number<X>::Bits *out, i64 *status,
    const Encoding by
) {
    const Group group = group_of(by.shape);
    const Loading loading(x, group);
    encode(loading, {scales, zero_points, status}, by,
           [&](u32 chunk, const float (&x)[UNIT], u64 codes, const Affine &stored, float inverse) {
        float values[UNIT];
        decode(x, codes, inverse, stored.zero, by.table, values);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) values[i] = __fmul_rn(stored.scale, values[i]);
        store_unit(out, group, chunk, values);
    });
}

// Where a code is not clamped: the quotients that round to a code, or for levels and signs, which have no codes
// beyond, those between the outermost.
struct Inside {
    float low, high;

    __device__ Inside(float zero, const Table &table) {
        if (LEVELS) low = (float)table.level(0) - 128.0f, high = (float)table.level(LEVELS - 1) - 128.0f;
        else if (BITS == 1) low = -1.0f, high = 1.0f;
        else low = -reach(zero), high = reach((float)TOP_CODE - zero);
    }

    // The largest number that rounds to an integer that is not negative: its tie rounds to it if it is even.
    static __device__ float reach(float integer) {
        const float tie = integer + 0.5f;
        return (u32)integer % 2 ? __uint_as_float(__float_as_uint(tie) - 1) : tie;
    }

    __device__ bool operator()(float v) const { return v >= low && v <= high; }
};

// Qp: the level farthest above the zero point; of asymmetric schemes, whose zero points differ, the last code.
__device__ inline float highest_level(const Table &table) {
    if (LEVELS) return (float)table.level(LEVELS - 1) - FIXED_ZERO;
    return (float)TOP_CODE - (SYMMETRIC ? FIXED_ZERO : 0.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fake_quantize_backward(
    const Number<X>::Bits *grad, const Number<X>::Bits *x, Number<SCALE>::Bits *scales, void *zero_points,
    Number<X>::Bits *grad_x, float *grad_scales, i64 *status, const Encoding by
) {
    const Group group = group_of(by.shape);
    const Loading loading(x, group), grads(grad, group);
    Sum16 sum;
    encode(loading, {scales, zero_points, status}, by,
           [&](u32 chunk, const float (&x)[UNIT], u64 codes, const Affine &given, float inverse) {
        const Inside inside(given.zero, by.table);
        const u32 unit = unit_of(chunk);
        float grads_x[UNIT], levels[UNIT], terms[UNIT];
        grads.widen(chunk, grads_x);
        decode(x, codes, inverse, given.zero, by.table, levels);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            const float grad = grads_x[i], v = __fmul_rn(flush(x[i]), inverse);
            const bool passes = inside(v), present = FULL || (u64)unit * UNIT + i < group.length;
            terms[i] = present ? __fmul_rn(grad, __fsub_rn(levels[i], passes ? v : 0.0f)) : 0.0f;
            grads_x[i] = passes ? grad : 0.0f;
        }
        if (given.scale != given.scale) {
#pragma unroll
            for (int i = 0; i < UNIT; ++i) terms[i] = grads_x[i] = given.scale;
        }
        sum.add(terms);
        store_unit(grad_x, group, chunk, grads_x);
    });
    const float total = sum.total();
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fmul_rn((float)group.length, highest_level(by.table))));
    if (group.first()) grad_scales[group.number] = __fmul_rn(total, factor);
}
