// Codes, a byte each, to bit planes and back (docs/format.md, section 6): a thread a unit of eight codes.
//
// READ: planes read. ALIGNED: k is a multiple of 8, and so are all addresses.

#include "floats.cuh"
#include "planes.cuh"

// The place of a thread's unit.
__device__ inline Place place_of(u64 unit, u64 rows, u64 k, u64 units_per_row) {
    const u64 row = ALIGNED ? 0 : (u32)unit / (u32)units_per_row;
    return {rows, k, row, (unit - row * units_per_row) * UNIT, unit};
}

extern "C" __global__ void __launch_bounds__(THREADS) pack_codes(
    const u8 *codes, u8 *packed, u64 rows, u64 k, u64 units_per_row, u64 units
) {
    const u64 unit = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (unit >= units) return;
    const Place at = place_of(unit, rows, k, units_per_row);
    const u8 *from = codes + at.row * k + at.column;
    const int present = ALIGNED ? UNIT : (int)min((u64)UNIT, k - at.column);
    Planes<0>::store(packed, at, load_bytes<8>(from, present, ALIGNED), present);
}

extern "C" __global__ void __launch_bounds__(THREADS) unpack_codes(
    const u8 *packed, u8 *codes, u64 rows, u64 k, u64 units_per_row, u64 units
) {
    const u64 unit = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (unit >= units) return;
    const Place at = place_of(unit, rows, k, units_per_row);
    const int present = ALIGNED ? UNIT : (int)min((u64)UNIT, k - at.column);
    store_bytes<8>(codes + at.row * k + at.column, Planes<0>::load<READ>(packed, at), present, ALIGNED);
}
