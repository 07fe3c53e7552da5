// What a kernel is compiled for: the macros of ops/cuda/macros.py as constants with the names of the contract.
//
// BITS, SYMMETRIC, NESTED     as in a scheme
// LEVELS                      levels of the table, 0 for uniform ones
// RULE                        how the scale is chosen: extreme, mse or rms
// RMS_LEVEL                   of "rms": the largest level in units of 1/127
// SCALE                       dtype of the scales
// ZERO_POINTS                 dtype of the stored zero points: none, u8 or f32
// MODE, DRAW_BITS, SHRINK     rounding (draws.cuh); SHRINK: a variance other than 1
// PRESERVE                    "mean+var"
// PLANES                      widths, most significant first

enum Rule { EXTREME, MSE, RMS };
enum Stored { NONE, BYTES, FLOATS };

static const int TOP_CODE = (1 << BITS) - 1;

// The zero point of a symmetric scheme.
static const float FIXED_ZERO = LEVELS ? 128.0f : NESTED ? 136.0f : BITS == 1 ? 0.5f : (float)(1 << (BITS - 1));

// The levels of a table, a byte each, ascending.
struct Table {
    u64 low, high;
    u32 level(int code) const { return (u32)((code < 8 ? low : high) >> 8 * (code & 7)) & 0xff; }
};
