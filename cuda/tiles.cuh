// A packed matrix as the matrix unit takes it, and its codes as operands.
//
//   packed       plane ▸ tile of 16 rows ▸ unit of 64 columns ▸ lane ▸ words      (`width` words a lane)
//   scales       tile ▸ group ▸ row mod 8 ▸ row div 8                             (and zero points)
//
// A lane holds two rows, g and g + 8 (g = lane div 4), of 16 columns; four nibbles-wide "steps" of eight slots:
// slot i of step t is row g + 8·(i mod 2), column 32·(t div 2) + 8·(lane mod 4) + 4·(t mod 2) + 2·(i div 2 mod 2)
// + i div 4. In a plane of width 1, 2 or 4, slot i of step t lies at bit 4·i + width·(t mod (4/width)) of word
// t·width/4; in one of width 8, at byte i div 2 of word 2·t + i mod 2, words 0…3 of all lanes before words 4…7.
#include "half2.cuh"

#if !defined(PLANES) || !defined(REST) || !defined(ZERO) || !defined(ASYMMETRIC) || !defined(SCALE) || !defined(GROUP)
#error "PLANES: widths read; REST: bits not read; ZERO: twice the constant zero point; ASYMMETRIC; SCALE; GROUP"
#endif

constexpr int ROWS = 16, COLUMNS = 64;
constexpr int WIDTHS[] = {PLANES};
constexpr int COUNT = sizeof(WIDTHS) / sizeof(int);

// Bits of the planes before plane `count`.
constexpr int bits_before(int count) {
  int bits = 0;
  for (int plane = 0; plane < count; ++plane) bits += WIDTHS[plane];
  return bits;
}

constexpr int BITS = bits_before(COUNT);  // and the words a lane holds of a unit

template <int V>
struct Constant {
  static constexpr int value = V;
};

// Calls `f` with the number of each plane, as a constant.
template <int plane = 0, typename F>
__device__ __forceinline__ void for_planes(F f) {
  if constexpr (plane < COUNT) {
    f(Constant<plane>{});
    for_planes<plane + 1>(f);
  }
}

// A lane's words of a unit in a stage in shared memory, whose planes begin at `PLANE`: each has `UNITS_A_TILE` units of
// a tile.
template <int (*PLANE)(int), int UNITS_A_TILE>
__device__ __forceinline__ void read_unit(Words<BITS>& to, u32 stage, int tile, int unit, int lane) {
  for_planes([&](auto plane) {
    constexpr int p = decltype(plane)::value, width = WIDTHS[p];
    const u32 from = stage + PLANE(p) + (tile * UNITS_A_TILE + unit) * (width * WARP * 4);
    u32* words = to.word + bits_before(p);
    if constexpr (width == 8) {
      read_shared(words, from + 16 * lane);
      read_shared(words + 4, from + 16 * (WARP + lane));
    } else if constexpr (width == 4) {
      read_shared(words, from + 16 * lane);
    } else if constexpr (width == 2) {
      asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from + 8 * lane));
    } else {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(from + 4 * lane));
    }
  });
}

// Groups: of 32·HALVES columns; 0 is the whole row. Scales change within a unit where HALVES is odd.
constexpr int HALVES = GROUP / 32;
static_assert(GROUP % 32 == 0, "groups of a multiple of 32 columns");
constexpr int FLUSHES = HALVES % 2 ? 2 : 1;

// What group the half `half` (32 columns) of a row belongs to.
__device__ __forceinline__ int group_of(int half) { return HALVES ? half / (HALVES ? HALVES : 1) : 0; }

struct Matrix {
  const u8* packed;
  const void* scales;
  const u8* zero_points;
  int tiles, units, groups;

  // Where the units of a tile begin in plane `plane`.
  __device__ __forceinline__ const u8* tile(int plane, int tile) const {
    const u64 rows_before = static_cast<u64>(tiles) * bits_before(plane) + static_cast<u64>(tile) * WIDTHS[plane];
    return packed + rows_before * units * (4 * WARP);
  }
};

__device__ __forceinline__ Matrix matrix(const u8* packed, const void* scales, const u8* zero_points, int n, int k) {
  return {packed, scales, zero_points, (n + ROWS - 1) / ROWS, (k + COLUMNS - 1) / COLUMNS,
          GROUP ? (k + GROUP - 1) / (GROUP ? GROUP : 1) : 1};
}

// Scales and zero points -----------------------------------------------------------------------------------

// What a lane needs of a group: the scales of its two rows, and what to subtract from their codes.
struct Group {
#if SCALE == 2
  float2 scales;
#else
  u32 scales;
#endif
#if ASYMMETRIC
  u16 zero_points;
#endif
};

// Bytes of the scales of a tile's rows in a group, and of those with the zero points behind.
constexpr int SCALE_BYTES = ROWS * (SCALE == 2 ? 4 : 2), GROUP_BYTES = SCALE_BYTES + (ASYMMETRIC ? ROWS : 0);

// A lane's part of a group of a tile in shared memory.
__device__ __forceinline__ void read_group(Group& to, u32 from, int lane) {
#if SCALE == 2
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(to.scales.x), "=f"(to.scales.y) : "r"(from + lane / 4 * 8));
#else
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(to.scales) : "r"(from + lane / 4 * 4));
#endif
#if ASYMMETRIC
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(to.zero_points) : "r"(from + SCALE_BYTES + lane / 4 * 2));
#endif
}

// Where a lane's part of the groups of a tile lies.
struct GroupReader {
  static constexpr int LANE_BYTES = SCALE == 2 ? 8 : 4, STEP = ROWS / 2;

  const u8* scales;
  const u8* zero_points;

  __device__ __forceinline__ GroupReader(const Matrix& w, int tile, int lane) {
    const u64 first = static_cast<u64>(tile) * w.groups * STEP + lane / 4;
    scales = static_cast<const u8*>(w.scales) + first * LANE_BYTES;
    zero_points = ASYMMETRIC ? w.zero_points + first * 2 : nullptr;
  }

  // Brings a group, and those beside it, to L2.
  __device__ __forceinline__ void prefetch(u32 group) const {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(scales + group * (STEP * LANE_BYTES)));
    if (ASYMMETRIC) asm volatile("prefetch.global.L2 [%0];" ::"l"(zero_points + group * (STEP * 2)));
  }

  __device__ __forceinline__ void load(Group& to, u32 group) const {
    const u8* from = scales + group * (STEP * LANE_BYTES);
#if SCALE == 2
    to.scales = __ldg(reinterpret_cast<const float2*>(from));
#else
    to.scales = __ldg(reinterpret_cast<const u32*>(from));
#endif
#if ASYMMETRIC
    to.zero_points = __ldg(reinterpret_cast<const u16*>(zero_points + group * (STEP * 2)));
#endif
  }
};

// s·2^REST of row `row` (0: g, 1: g + 8).
__device__ __forceinline__ float scale_of(const Group& group, int row) {
  constexpr float step = 1 << REST;
#if SCALE == 2
  return (row ? group.scales.y : group.scales.x) * step;
#elif SCALE == 1
  return widen_f16(row ? group.scales >> 16 : group.scales & 0xffff) * step;
#else
  return __uint_as_float(row ? group.scales & 0xffff0000u : group.scales << 16) * step;
#endif
}

// The scale of row `row` in both halves, where it has 16 bits.
__device__ __forceinline__ u32 scales_of(const Group& group, int row) {
#if SCALE < 2
  return __byte_perm(group.scales, 0, row ? 0x3232 : 0x1010);
#else
  return 0;
#endif
}

// The zero point of the codes read, (z − (2^REST − 1)/2) / 2^REST, is integer + fraction; the integer is taken
// from every code, exactly, and the fraction, where there is one, from the sums.
constexpr int UNITS_OF_ZERO = 2 << REST;
constexpr bool FRACTION = ASYMMETRIC ? REST > 0 : (ZERO - (1 << REST) + 1) % UNITS_OF_ZERO != 0;

__device__ __forceinline__ int doubled_zero(const Group& group, int row) {
#if ASYMMETRIC
  const int zero = 2 * (row ? group.zero_points >> 8 : group.zero_points & 0xff);
#else
  constexpr int zero = ZERO;
#endif
  return zero - (1 << REST) + 1;
}

__device__ __forceinline__ int integer_zero(const Group& group, int row) {
  return doubled_zero(group, row) >> (REST + 1);
}

__device__ __forceinline__ float fraction_of_zero(const Group& group, int row) {
  return (doubled_zero(group, row) & (UNITS_OF_ZERO - 1)) * (1.0f / UNITS_OF_ZERO);
}

// Codes to operands ----------------------------------------------------------------------------------------
//
// A field of a code in a half is a float that grows by the same step for every one of the code: field · slope + offset
// is what the matrix unit takes. In float16 the field comes into the mantissa of BASE. In bfloat16 it is a float as it
// lies: subnormals and the least of the normal numbers, all that the low byte can be, are 2^-133 apart. No slope leads
// from there to the code itself, but one does to UNIT times it, which sums make good in the end.
#if BF16
constexpr u32 MAGIC = 0;
constexpr float UNIT = 1.0f / 64, BASE = 0, SLOPE = 0x1p127f;
#else
constexpr u32 MAGIC = 0x64006400;
constexpr float UNIT = 1, BASE = 1024, SLOPE = 1;
#endif

constexpr bool NIBBLES = BITS <= 4;
constexpr u32 CODE = (1 << BITS) - 1;

// A nibble of row g + 8 is read where it lies, 16 times as large.
__device__ __forceinline__ constexpr float slope_of(int row) { return NIBBLES && row ? SLOPE / 16 : SLOPE; }

// Masks of the fields of a code in both halves of a word, in registers: an instruction takes one literal, MAGIC.
struct Masks {
  u32 low, high;  // of codes at bit 0, and of nibbles at bit 4
};

// `zero` is 0 in every launch, and the compiler does not know.
__device__ __forceinline__ Masks masks(u32 zero) {
  return {CODE * 0x00010001u + (BF16 ? 0 : zero), CODE * 0x00100010u + (BF16 ? 0 : zero)};
}

// From fields to operands, of each row, both halves alike.
struct Line {
  u32 slope[2], offset[2];
};

// To codes less the integer zero point, exact. One that is stored is a field too.
__device__ __forceinline__ Line line_of(const Group& group) {
  Line line;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    line.slope[row] = twice(slope_of(row));
#if ASYMMETRIC
    if constexpr (REST == 0) {
      const u32 field = __byte_perm(group.zero_points, MAGIC, row ? 0x5151 : 0x5050);
      line.offset[row] = fma2(field, twice(-SLOPE), twice(BASE - BASE * slope_of(row)));
      continue;
    }
#endif
    line.offset[row] = twice(-(BASE * slope_of(row) + integer_zero(group, row) * UNIT));
  }
  return line;
}

// (a where the mask is set, else b): one instruction, of which the compiler would make two.
__device__ __forceinline__ u32 select(u32 mask, u32 a, u32 b) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(result) : "r"(a), "r"(b), "r"(mask));
  return result;
}

__device__ __forceinline__ u32 shift_right(u32 word, int by) { return by >= 0 ? word >> by : word << -by; }

// How the planes of a step, and slots of a parity, come side by side: each is shifted right by `own`, then all of them
// together by `common`, which is what makes the fewest shifts.
struct Shifts {
  int common[4][2] = {}, own[COUNT][4][2] = {};

  constexpr Shifts() {
    for (int step = 0; step < 4; ++step)
      for (int odd = 0; odd < 2; ++odd) {
        int by[COUNT] = {}, fewest = COUNT + 1, &best = common[step][odd];
        for (int plane = 0; plane < COUNT; ++plane) {
          const int width = WIDTHS[plane], fields = width < 4 ? 4 / width : 1;  // of as many steps side by side
          const int at = width == 8 ? 0 : 4 * odd + width * (step % fields);
          by[plane] = at - (BITS - bits_before(plane) - width);
        }
        for (int all = 0; all <= (NIBBLES ? 4 : 8) - BITS; ++all) {
          int shifts = all > 0;
          for (int plane = 0; plane < COUNT; ++plane) shifts += by[plane] != all;
          if (shifts < fewest) best = all, fewest = shifts;
        }
        for (int plane = 0; plane < COUNT; ++plane) own[plane][step][odd] = by[plane] - best;
      }
  }
};

constexpr Shifts SHIFTS;

// The codes of step `step` side by side, in fields of 4 bits where they fit (all eight slots), else of 8 (slots
// of parity `odd`). What lies in a field above the code is undefined.
__device__ __forceinline__ u32 gather(const Words<BITS>& unit, int step, int odd) {
  const int common = SHIFTS.common[step][odd];
  u32 codes = 0;
  for_planes([&](auto plane) {
    constexpr int p = decltype(plane)::value, width = WIDTHS[p], begins = bits_before(p), below = BITS - begins - width;
    constexpr u32 field = ((1u << width) - 1 << below) * (NIBBLES ? 0x11111111u : 0x01010101u);
    const u32 word = unit.word[begins + (width == 8 ? 2 * step + odd : step * width / 4)];
    const u32 moved = shift_right(word, SHIFTS.own[p][step][odd]);
    codes = p == 0 ? moved : select(field << common, moved, codes);
  });
  return codes >> common;
}

// The operand of step `step`.
__device__ __forceinline__ void decode(u32 (&a)[4], const Words<BITS>& unit, int step, const Line& line,
                                       const Masks& masks) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const u32 codes = gather(unit, step, NIBBLES ? 0 : row);
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      u32 field;
      if constexpr (BITS == 8) field = __byte_perm(codes, MAGIC, high ? 0x5351 : 0x5250);
      else field = codes >> 8 * high & (NIBBLES && row ? masks.high : masks.low) | MAGIC;
      a[row + 2 * high] = fma2(field, line.slope[row], line.offset[row]);
    }
  }
}

// Whether scales are of the type of the operands. A code less its zero point has 8 bits at most, a scale 8 or 11: their
// product is exact in float32, so that one multiplication in 16 bits, rounded once, gives the bits of `unpack`.
constexpr bool OWN_SCALES = SCALE == (BF16 ? 0 : 1) && REST == 0;

// Two columns of row `row` of a group from its codes less the integer zero point: s · (code − zero point), rounded
// once in float32 and once more to 16 bits, the bits of `unpack`, times UNIT. (Below 2^-120 the last bits are lost.)
__device__ __forceinline__ u32 scaled(u32 codes, const Group& group, int row) {
  if constexpr (OWN_SCALES) {
    if constexpr (FRACTION) codes = add2(codes, twice(-fraction_of_zero(group, row) * UNIT));
    return mul2(codes, scales_of(group, row));
  }
  const float scale = scale_of(group, row), fraction = FRACTION ? fraction_of_zero(group, row) * UNIT : 0.0f;
  const float low = widen(codes & 0xffff) - fraction, high = widen(codes >> 16) - fraction;
  return round_halves(__fmul_rn(scale, low), __fmul_rn(scale, high));
}

// Whether one line leads from fields to `scaled` operands: s · zero point is exact where that is a power of two, and
// field · (s · slope) is s · code, exact before it is rounded with the offset.
constexpr bool ONE_LINE = BF16 && OWN_SCALES && !ASYMMETRIC && !FRACTION && (ZERO & (ZERO - 1)) == 0;

// Whether the slopes of that line are finite: both scales are below 2.
__device__ __forceinline__ bool has_line(const Group& group) {
#if SCALE < 2
  return (group.scales & 0x40004000) == 0;
#else
  return false;
#endif
}

// The line to `scaled` operands.
__device__ __forceinline__ Line scaled_line_of(const Group& group) {
  Line line = line_of(group);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    line.slope[row] = mul2(scales_of(group, row), line.slope[row]);
    line.offset[row] = mul2(scales_of(group, row), line.offset[row]);
  }
  return line;
}
