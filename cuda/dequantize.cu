// Packed codes to a tensor: x = s * (k_r * 2^(B-r) + (2^(B-r) - 1) / 2 - z) (docs/format.md, section 1).
//
// A thread decodes UNITS units of eight elements, a block's width apart, so that a warp reads and writes memory in
// order. Memory is the limit.
//
// X: dtype of the result. READ: planes read. REST: bits of the code that are not. ALIGNED: a multiple of 8 divides k
// and group size, and all memory lies on multiples of 16 bytes. GROUP: units of a group where groups follow each
// other without a break and their number of units is a power of two, else 0.

#include "floats.cuh"
#include "philox.cuh"
#include "scheme.cuh"
#include "planes.cuh"
#include "draws.cuh"

// The dither that encoding added, as what is to be added to a code: 1/2 - U.
__device__ inline float dither(u32 draw) {
    u32 word = DRAW_BITS == 16 ? draw << 16 | 0x8000 : draw | 1;
    return __fmul_rn(__int2float_rn((int)(0x80000000u - word)), 0x1p-32f);
}

// The number that a code stands for before its zero point: exact.
__device__ inline float level_of(int code, int levels, const Table &table) {
    if (LEVELS) return (float)table.level(min(code, levels - 1));
    const float rest = (float)(1 << REST);
    // 2^23 + code has the code in its low bits.
    float exact = __uint_as_float(0x4b000000u | (u32)code) - 8388608.0f;
    return REST ? __fmaf_rn(exact, rest, (rest - 1.0f) * 0.5f) : exact;
}

__device__ inline float zero_of(const void *zero_points, u64 group) {
    if (ZERO_POINTS == BYTES) return (float)__ldg((const u8 *)zero_points + group);
    if (ZERO_POINTS == FLOATS) return __ldg((const float *)zero_points + group);
    return FIXED_ZERO;
}

extern "C" __global__ void __launch_bounds__(THREADS) unpack(
    const u8 *packed, const Number<SCALE>::Bits *scales, const void *zero_points, Number<X>::Bits *out,
    u64 rows, u64 k, u64 size, u64 groups_per_row, u64 units_per_row, u64 units, u64 offset,
    u64 table_low, u64 table_high, u32 key0, u32 key1, u32 stream, u32 step
) {
    const Table table = {table_low, table_high};
    const Source source = {key0, key1, stream, step};
    __shared__ __align__(16) u32 shared[THREADS / 32][WARP_WORDS];
    u32 *tiles = shared[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const u64 unit = ((u64)blockIdx.x * UNITS + i) * THREADS + threadIdx.x;
        u64 row = 0, column = unit * UNIT, group = 0;
        if (GROUP) {
            group = unit / (GROUP ? GROUP : 1);
        } else {
            row = (u32)unit / (u32)units_per_row;
            column = (unit - row * units_per_row) * UNIT;
            group = row * groups_per_row + (u32)column / (u32)size;
        }
        const u64 index = row * k + column;
        float dithers[UNIT];
        if (MODE == SUBTRACTIVE) {
            u32 draws[UNIT];
            if (TILED) fill_tiles(source, offset + index - UNIT * lane, tiles);
            unit_draws(source, offset + index, lane, tiles, draws);
#pragma unroll
            for (int j = 0; j < UNIT; ++j) dithers[j] = dither(draws[j]);
        }
        if (unit >= units) continue;

        int codes[UNIT];
        const Place at = {rows, k, row, column, unit};
        Planes<0>::load<READ>(packed, at, codes);
        float scale = 0.0f, zero = 0.0f, values[UNIT];
        if (ALIGNED) {
            scale = Number<SCALE>::widen(__ldg(scales + group));
            zero = zero_of(zero_points, group);
        }
#pragma unroll
        for (int j = 0; j < UNIT; ++j) {
            if (!ALIGNED) {
                if (column + j >= k) break;
                const u64 own = row * groups_per_row + (u32)(column + j) / (u32)size;
                scale = Number<SCALE>::widen(scales[own]);
                zero = zero_of(zero_points, own);
            }
            float value = __fsub_rn(level_of(codes[j], LEVELS, table), zero);
            if (MODE == SUBTRACTIVE) value = __fadd_rn(value, dithers[j]);
            values[j] = __fmul_rn(scale, value);
        }
        Number<X>::Bits *to = out + index;
        if (ALIGNED) {
            Unit<X> unit;
            unit.narrow(values);
            unit.store(to);
        } else {
#pragma unroll
            for (int j = 0; j < UNIT; ++j)
                if (column + j < k) to[j] = Number<X>::narrow(values[j]);
        }
    }
}
