// A packed matrix as bytes, a code or the level of a table each, in the columns that `matmul_int8.cuh` wants.
//
// SIGNED: what is subtracted from each byte, which makes it a signed one; 0: nothing, and it is none.
// READ: planes read. ALIGNED: a multiple of 8 divides k and group size, and the blob lies on a multiple of 8 bytes.
#include "choice.cuh"
#include "floats.cuh"
#include "scheme.cuh"
#include "planes.cuh"

constexpr int UNITS = 4;  // of eight codes, a thread

// n rows of k codes in groups of `size`, to rows of `stride` bytes whose groups begin at multiples of `padded`.
extern "C" __global__ void matmul_int8_expand(CHOICE const u8* packed, u8* levels, u64 n, u64 k, u64 size, u64 padded, u64 stride,
                                              u64 units_per_row, u64 units, u64 table_low, u64 table_high) {
  UNLESS_CHOSEN;
  const Table table = {table_low, table_high};
#pragma unroll
  for (int turn = 0; turn < UNITS; ++turn) {
    const u64 unit = (static_cast<u64>(blockIdx.x) * UNITS + turn) * blockDim.x + threadIdx.x;
    if (unit >= units) return;
    const u32 row = static_cast<u32>(unit) / static_cast<u32>(units_per_row);
    const u32 column = (static_cast<u32>(unit) - row * static_cast<u32>(units_per_row)) * UNIT;
    u64 codes = Planes<0>::load<READ>(packed, {n, k, row, column, unit});
    if (LEVELS) {
      u64 looked_up = 0;
#pragma unroll
      for (int i = 0; i < UNIT; ++i) {
        const int code = static_cast<int>(codes >> 8 * i & 0xff);
        looked_up |= static_cast<u64>(table.level(min(code, LEVELS - 1))) << 8 * i;
      }
      codes = looked_up;
    }
    if (SIGNED) {
      // With the top bit no byte borrows from the next; without it they are two's complements.
      const u64 tops = 0x8080808080808080ull;
      codes = SIGNED == 128 ? codes ^ tops : (codes | tops) - SIGNED * 0x0101010101010101ull ^ tops;
    }
    u8* to = levels + row * stride;
    if (ALIGNED) {
      const u32 group = column / static_cast<u32>(size);
      to += group * padded + (column - group * size);
      *reinterpret_cast<u64*>(to) = codes;
    } else {
#pragma unroll
      for (int i = 0; i < UNIT; ++i) {
        if (column + i >= k) break;
        const u32 group = (column + i) / static_cast<u32>(size);
        to[group * padded + (column + i - group * size)] = static_cast<u8>(codes >> 8 * i);
      }
    }
  }
}
