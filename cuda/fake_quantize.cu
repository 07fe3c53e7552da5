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

// Q − z of the codes of a unit, of which the top bits are read.
__device__ inline void decode(u64 codes, float zero, const Table &table, float (&levels)[UNIT]) {
    const u64 read = codes >> REST & bytes_of(0xff >> REST);
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
           [&](u32 chunk, const float (&)[UNIT], u64 codes, const Affine &stored) {
        float values[UNIT];
        decode(codes, stored.zero, by.table, values);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) values[i] = __fmul_rn(stored.scale, values[i]);
        store_unit(out, group, chunk, values);
    });
}

// Where a code is not clamped: the rounded quotient, or for levels and signs, which have no codes beyond, the
// quotient itself lies between these.
struct Inside {
    float low, high;

    __device__ Inside(float zero, const Table &table) {
        if (LEVELS) low = (float)table.level(0) - 128.0f, high = (float)table.level(LEVELS - 1) - 128.0f;
        else if (BITS == 1) low = -1.0f, high = 1.0f;
        else low = -zero, high = (float)TOP_CODE - zero;
    }

    __device__ bool operator()(float v) const {
        const float reach = LEVELS || BITS == 1 ? v : rintf(v);
        return reach >= low && reach <= high;
    }
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
           [&](u32 chunk, const float (&x)[UNIT], u64 codes, const Affine &given) {
        const float inverse = inverse_of(given.scale);
        const bool refused = given.scale != given.scale;
        const Inside inside(given.zero, by.table);
        float grads_x[UNIT], levels[UNIT], terms[UNIT];
        grads.widen(chunk, grads_x);
        decode(codes, given.zero, by.table, levels);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            const float grad = refused ? given.scale : grads_x[i];
            const float v = fminf(fmaxf(__fmul_rn(flush(x[i]), inverse), -CODE_LIMIT), CODE_LIMIT);
            const bool passes = refused || inside(v);
            const float slope = __fsub_rn(levels[i], passes ? v : 0.0f);
            const bool present = (u64)unit_of(chunk) * UNIT + i < group.length;
            terms[i] = present ? __fmul_rn(grad, slope) : 0.0f;
            grads_x[i] = passes ? grad : 0.0f;
        }
        sum.add(terms);
        store_unit(grad_x, group, chunk, grads_x);
    });
    const float total = sum.total();
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fmul_rn((float)group.length, highest_level(by.table))));
    if (group.first()) grad_scales[group.number] = __fmul_rn(total, factor);
}
