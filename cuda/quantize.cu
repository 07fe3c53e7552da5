// Tensor to scales, zero points and packed codes in one pass; or, GIVEN, to codes on scales that are there.
//
// Memory is the limit of rounding to nearest, which takes 12 instructions an element, and nearly that of systematic
// rounding, which takes 15. Drawn rounding takes 17, of which Philox 6: it is bound by the rate at which instructions
// are issued.

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

// The codes of a warp's groups, a gap of 16 bytes behind each that keeps neighbours in different banks.
struct Stage {
    static const int GROUP = TEAM * VECTORS, STRIDE = GROUP + 2, RUN = VECTORS % 4 ? VECTORS : 4;
    u64 units[STAGED ? 32 / TEAM * STRIDE : 1];

    // Where this thread's unit of a chunk goes.
    __device__ u64 &operator[](u32 chunk) {
        return units[threadIdx.x % 32 / TEAM * STRIDE + threadIdx.x % TEAM + (u64)chunk * TEAM];
    }

    // RUN units that follow each other, of which the first is `unit` among those of the warp.
    __device__ void take(u32 unit, u64 (&codes)[RUN]) const {
#pragma unroll
        for (int i = 0; i < RUN; i += RUN % 2 ? 1 : 2) {
            const u64 *from = units + (unit + i) / GROUP * STRIDE + (unit + i) % GROUP;
            if (RUN % 2) codes[i] = *from;
            else *(uint4 *)&codes[i] = *(const uint4 *)from;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) pack(
    const Number<X>::Bits *x, u8 *packed, Number<SCALE>::Bits *scales, void *zero_points, i64 *status,
    const Encoding by
) {
    const Group group = group_of(by.shape);
    const Loading loading(x, group);
    __shared__ __align__(16) Stage stages[WARPS];
    Stage &stage = stages[threadIdx.x / 32];
    auto store = [&](u32 chunk, u64 codes) {
        const u32 unit = unit_of(chunk);
        if (!group.has(unit)) return;
        const int present = group.present(unit);
        if (!ALIGNED && present < UNIT) codes &= (1ull << 8 * present) - 1;
        const u64 column = group.column + unit * UNIT;
        const Place at = {by.shape.rows, by.shape.k, group.row, column, group.begin / UNIT + unit};
        Planes<0>::store(packed, at, codes, present);
    };
    encode(loading, {scales, zero_points, status}, by,
           [&](u32 chunk, const float (&)[UNIT], u64 codes, const Affine &, float) {
        if (Widths::list[0] == 8) codes &= bytes_of(TOP_CODE);
        if (STAGED) stage[chunk] = codes;
        else store(chunk, codes);
    });
    if constexpr (STAGED) {
        const u32 first = (u32)group.number - threadIdx.x % 32 / TEAM, groups = (u32)by.shape.groups;
        const bool planes_begin_on_words = (u32)by.shape.rows * (u32)by.shape.k % (16 * UNIT) == 0;
        if (!planes_begin_on_words || first >= groups || groups - first < 32 / TEAM) {
#pragma unroll 1
            for (u32 chunk = 0; chunk < VECTORS; ++chunk) store(chunk, stage[chunk]);
            return;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < VECTORS; i += Stage::RUN) {
            u64 codes[Stage::RUN];
            const u32 unit = i * 32 + threadIdx.x % 32 * Stage::RUN;
            stage.take(unit, codes);
            const Place at = {by.shape.rows, by.shape.k, 0, 0, (u64)first * Stage::GROUP + unit};
            Planes<0>::store_run(packed, at, codes);
        }
    }
}
