// A matrix in tiles as plain rows of 16-bit floats, for products with so many rows of x that cuBLAS wins.
#include "choice.cuh"
#include "tiles.cuh"

// weight (n, k), whose rows begin at a multiple of 16 bytes. A warp a unit: grid of as many blocks as it takes.
extern "C" __global__ void matmul_expand(CHOICE const u8* packed, const void* scales, const u8* zero_points, u16* weight,
                                         int n, int k) {
  UNLESS_CHOSEN;
  const Matrix w = matrix(packed, scales, zero_points, n, k);
  const u32 warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP, tile = warp / w.units, unit = warp % w.units;
  if (tile >= w.tiles) return;
  Words<BITS> codes;
  for_planes([&](auto plane) {
    constexpr int p = decltype(plane)::value, width = WIDTHS[p];
    const u8* from = w.tile(p, tile) + unit * (width * 4 * WARP) + lane * 4 * (width < 4 ? width : 4);
    u32* words = codes.word + bits_before(p);
    load_once<width < 4 ? width : 4>(words, from);
    if constexpr (width == 8) load_once<4>(words + 4, from + 16 * WARP);
  });
  const GroupReader groups(w, tile, lane);
  const Masks mask = masks(n >> 31);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Group group;
    groups.load(group, min(group_of(2 * unit + half), w.groups - 1));
    const Line line = line_of(group);
    u32 a[2][4];
    decode(a[0], codes, 2 * half, line, mask);
    decode(a[1], codes, 2 * half + 1, line, mask);
    auto weights = [&](u32 codes, int row) {
      const u32 values = scaled(codes, group, row);
      return UNIT == 1 ? values : mul2(values, twice(1 / UNIT));
    };
    const int column = unit * COLUMNS + 32 * half + lane % 4 * 8;
    if (column >= k) continue;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int at = tile * ROWS + lane / 4 + 8 * row;
      if (at >= n) continue;
      uint4 values;
      values.x = weights(a[0][row], row);
      values.y = weights(a[0][row + 2], row);
      values.z = weights(a[1][row], row);
      values.w = weights(a[1][row + 2], row);
      *reinterpret_cast<uint4*>(weight + static_cast<u64>(at) * k + column) = values;
    }
  }
}
