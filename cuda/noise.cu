// Uniform noise of the width of a quantizer's step (docs/format.md, section 5). A group is held by a team; Philox, of
// which an element takes a quarter, is the limit.
//
// PRESERVE: deviations of each group from its mean are shrunk, so that it keeps its variance.

#include "floats.cuh"
#include "philox.cuh"
#include "draws.cuh"
#include "team.cuh"
#include "groups.cuh"

struct Injection {
    Shape shape;
    Source source;
};

// status: where the first group whose width is refused is reported; nothing is where nobody can look, and it becomes
// NaN.
extern "C" __global__ void __launch_bounds__(THREADS) inject_noise(
    const Number<X>::Bits *x, const float *widths, Number<X>::Bits *out, i64 *status,
    const Injection by
) {
    const Shape &shape = by.shape;
    const Group group = group_of(shape);
    const Loading loading(x, group);
    __shared__ __align__(16) u32 shared[WARPS][WARP_WORDS];
    const Drawn drawn(by.source, NOISE, shape, group, shared[threadIdx.x / 32]);
    float width = group.length ? widths[group.number] : 0.0f;
    if (!(width >= 0.0f && width < __int_as_float(0x7f800000))) {
        if (status) atomicMin(status, (i64)group.number);
        width = __int_as_float(0x7fc00000);
    }
    // The top 24 bits of a draw, centred: exact.
    auto added = [&](u32 chunk, float (&noise)[UNIT]) {
        u32 draws[UNIT], half;
        drawn.unit(chunk, draws, half);
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            noise[i] = __fmul_rn(((float)(draws[i] >> 8) - 8388607.5f) * 0x1p-24f, width);
    };

    float mean = 0.0f, factor = 1.0f;
    if (PRESERVE) {
        const u64 end = group.length;
        const float n = (float)end;
        mean = __fdiv_rn(group_sum(shape, end, [&](u32 chunk, float (&x)[UNIT]) { loading.widen(chunk, x); }), n);
        const float variance = __fdiv_rn(group_sum(shape, end, [&](u32 chunk, float (&x)[UNIT]) {
            loading.widen(chunk, x);
#pragma unroll
            for (int i = 0; i < UNIT; ++i) {
                const float deviation = __fsub_rn(x[i], mean);
                x[i] = __fmul_rn(deviation, deviation);
            }
        }), n);
        const float power = __fdiv_rn(group_sum(shape, end, [&](u32 chunk, float (&noise)[UNIT]) {
            added(chunk, noise);
#pragma unroll
            for (int i = 0; i < UNIT; ++i) noise[i] = __fmul_rn(noise[i], noise[i]);
        }), n);
        factor = kept_deviation(variance, power);
    }
    each_chunk(shape, [&](u32 chunk) {
        float values[UNIT], noise[UNIT];
        loading.widen(chunk, values);
        added(chunk, noise);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            values[i] = __fadd_rn(values[i], noise[i]);
            if (PRESERVE) values[i] = __fadd_rn(mean, __fmul_rn(__fsub_rn(values[i], mean), factor));
        }
        store_unit(out, group, chunk, values);
    });
}
