// Packed codes to a tensor: x = s * (k_r * 2^(B-r) + (2^(B-r) - 1) / 2 - z) (docs/format.md, section 1).
//
// A thread decodes UNITS units of eight elements, a block's width apart, so that a warp reads and writes memory in
// order. Memory is the limit.
//
// X: dtype of the result. READ: planes read. REST: bits of the code that are not. ALIGNED: a multiple of 8 divides k
// and group size, and all memory lies on multiples of 16 bytes. GROUP: units of a group where groups follow each
// other without a break and their number of units is a power of two, else 0.

#include "choice.cuh"
#include "floats.cuh"
#include "philox.cuh"
#include "scheme.cuh"
#include "planes.cuh"
#include "draws.cuh"
#include "levels.cuh"

// The dither that encoding added, as what is to be added to a code: 1/2 - U.
__device__ inline float dither(u32 draw) {
    u32 word = DRAW_BITS == 16 ? draw << 16 | 0x8000 : draw | 1;
    return __fmul_rn(__int2float_rn((int)(0x80000000u - word)), 0x1p-32f);
}

__device__ inline float zero_of(const void *zero_points, u64 group) {
    if (ZERO_POINTS == BYTES) return (float)__ldg((const u8 *)zero_points + group);
    if (ZERO_POINTS == FLOATS) return __ldg((const float *)zero_points + group);
    return FIXED_ZERO;
}

// What is decoded: rows of k elements from logical index `offset` on.
struct Decoding {
    u64 rows, k, size, groups_per_row, units_per_row, units, offset;
    Table table;
    Source source;
};

// A unit of a thread: where it is, and what memory has of it.
struct Found {
    u64 unit, row, column, group, index, codes;
    float scale, zero;

    __device__ void load(
        const u8 *packed, const Number<SCALE>::Bits *scales, const void *zero_points, const Decoding &by, int i
    ) {
        unit = ((u64)blockIdx.x * UNITS + i) * THREADS + threadIdx.x;
        row = 0, column = unit * UNIT;
        if (GROUP) {
            group = unit / (GROUP ? GROUP : 1);
        } else {
            row = (u32)unit / (u32)by.units_per_row;
            column = (unit - row * by.units_per_row) * UNIT;
            group = row * by.groups_per_row + (u32)column / (u32)by.size;
        }
        index = row * by.k + column;
        if (unit >= by.units) return;
        codes = Planes<0>::load<READ>(packed, {by.rows, by.k, row, column, unit});
        if (ALIGNED) {
            scale = Number<SCALE>::widen(__ldg(scales + group));
            zero = zero_of(zero_points, group);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) unpack(
    CHOICE const u8 *packed, const Number<SCALE>::Bits *scales, const void *zero_points, Number<X>::Bits *out,
    const Decoding by
) {
    UNLESS_CHOSEN;
    __shared__ __align__(16) u32 shared[THREADS / 32][WARP_WORDS];
    u32 *tiles = shared[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    auto decode = [&](Found &found) {
        const u64 index = found.index;
        float dithers[UNIT], values[UNIT];
        if (MODE == SUBTRACTIVE) {
            u32 draws[UNIT];
            if (TILED) fill_tiles(by.source, ELEMENT, by.offset + index - UNIT * lane, tiles);
            take_halves(unit_draws(by.source, ELEMENT, by.offset + index, lane, tiles, draws), draws);
#pragma unroll
            for (int j = 0; j < UNIT; ++j) dithers[j] = dither(draws[j]);
        }
        if (found.unit >= by.units) return;
#pragma unroll
        for (int j = 0; j < UNIT; ++j) {
            if (!ALIGNED) {
                if (found.column + j >= by.k) break;
                const u64 group = found.row * by.groups_per_row + (u32)(found.column + j) / (u32)by.size;
                found.scale = Number<SCALE>::widen(scales[group]);
                found.zero = zero_of(zero_points, group);
            }
            float value = __fsub_rn(level_of(found.codes, j, by.table), found.zero);
            if (MODE == SUBTRACTIVE) value = __fadd_rn(value, dithers[j]);
            values[j] = __fmul_rn(found.scale, value);
        }
        Number<X>::Bits *to = out + index;
        if (ALIGNED) {
            Unit<X> unit;
            unit.narrow(values);
            unit.store(to);
        } else {
#pragma unroll
            for (int j = 0; j < UNIT; ++j)
                if (found.column + j < by.k) to[j] = Number<X>::narrow(values[j]);
        }
    };
    // All of a thread's units are on their way before the first is decoded.
    Found found[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) found[i].load(packed, scales, zero_points, by, i);
#pragma unroll
    for (int i = 0; i < UNITS; ++i) decode(found[i]);
}
