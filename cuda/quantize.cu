// Tensor to scales, zero points and packed codes in one pass; or, GIVEN, to codes on scales that are there.
//
// Memory is the limit of rounding to nearest, which takes 15 instructions an element. Drawn rounding takes 30, of which
// Philox 6, and systematic rounding 23: both are bound by the rate at which instructions are issued.

#include "floats.cuh"
#include "philox.cuh"
#include "scheme.cuh"
#include "planes.cuh"
#include "draws.cuh"
#include "team.cuh"
#include "groups.cuh"
#include "scales.cuh"
#include "codes.cuh"
#include "encoder.cuh"

// Whether the codes of a warp are brought to the order of memory before they are stored: its teams' groups follow each
// other, and a thread has several units, a team's width apart, so that a store of one would fill no sector of memory.
static const bool STAGED = FULL && TEAM < 32 && VECTORS > 1;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) pack(
    const Number<X>::Bits *x, u8 *packed, Number<SCALE>::Bits *scales, void *zero_points, i64 *status,
    const Encoding by
) {
    const Group group = group_of(by.shape);
    const Loading loading(x, group);
    const u64 first_group = group.number - threadIdx.x % 32 / TEAM;
    const bool staged =
        STAGED && first_group + 32 / TEAM <= by.shape.groups && by.shape.rows * by.shape.k % (16 * UNIT) == 0;
    __shared__ __align__(16) u64 stage[STAGED ? THREADS * VECTORS : 1];
    encode(loading, {scales, zero_points, status}, by,
           [&](u32 chunk, const float (&)[UNIT], u64 codes, const Affine &) {
        const u32 unit = unit_of(chunk);
        if (staged) {
            stage[threadIdx.x / TEAM * (TEAM * VECTORS) + unit] = codes;
            return;
        }
        if (!group.has(unit)) return;
        const int present = group.present(unit);
        if (!ALIGNED && present < UNIT) codes &= (1ull << 8 * present) - 1;
        const u64 column = group.column + unit * UNIT;
        const Place at = {by.shape.rows, by.shape.k, group.row, column, group.begin / UNIT + unit};
        Planes<0>::store(packed, at, codes, present);
    });
    if (staged) {
        __syncwarp();
        u64 codes[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) codes[i] = stage[threadIdx.x * VECTORS + i];
        const u64 unit = first_group * (TEAM * VECTORS) + threadIdx.x % 32 * VECTORS;
        Planes<0>::store_run(packed, {by.shape.rows, by.shape.k, 0, 0, unit}, codes);
    }
}
