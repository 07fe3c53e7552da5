// Codes to the numbers that they stand for (docs/format.md, section 1). REST: bits of a code that are not read.

// A code without the bits that are not read, as the number before its zero point: exact.
__device__ inline float level_of(int code, const Table &table) {
    if (LEVELS) return (float)table.level(min(code, LEVELS - 1));
    const float rest = (float)(1 << REST);
    // 2^23 + code has the code in its low bits.
    float exact = __uint_as_float(0x4b000000u | (u32)code) - 8388608.0f;
    return REST ? __fmaf_rn(exact, rest, (rest - 1.0f) * 0.5f) : exact;
}
