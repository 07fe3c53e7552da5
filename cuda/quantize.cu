// Tensor to scales, zero points and packed codes in one pass; or, GIVEN, to codes on scales that are there.
//
// Memory is the limit of rounding to nearest; stochastic rounding is bound by instructions, of which Philox takes
// about nine an element.

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

extern "C" __global__ void __launch_bounds__(THREADS) pack(
    const Number<X>::Bits *x, u8 *packed, Number<SCALE>::Bits *scales, void *zero_points, i64 *status,
    const Encoding by
) {
    const Group group = group_of(by.shape);
    const Loading loading(x, group);
    const u64 first_unit = group.begin / UNIT;
    encode(loading, {scales, zero_points, status}, by,
           [&](u32 chunk, const float (&)[UNIT], int (&codes)[UNIT], const Affine &) {
        const u32 unit = unit_of(chunk), from = unit * UNIT;
        if (!group.has(unit)) return;
        const int present = group.present(unit);
        if (!ALIGNED) {
#pragma unroll
            for (int i = 0; i < UNIT; ++i)
                if (i >= present) codes[i] = 0;
        }
        const Place at = {by.shape.rows, by.shape.k, group.row, group.column + from, first_unit + unit};
        Planes<0>::store(packed, at, codes, present);
    });
}
