// Codes to the numbers that they stand for (docs/format.md, section 1). REST: bits of a code that are not read.

// Code i of eight, a byte each, without the bits that are not read, as the number before its zero point: exact.
__device__ inline float level_of(u64 codes, int i, const Table &table) {
    const u32 word = (u32)(i < 4 ? codes : codes >> 32);
    if (LEVELS) return (float)table.level(min((int)(word >> 8 * (i & 3) & 0xff), LEVELS - 1));
    // 2^23 + code has the code in its low bits.
    const float code = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 | i & 3)) - 8388608.0f;
    const float rest = (float)(1 << REST);
    return REST ? __fmaf_rn(code, rest, (rest - 1.0f) * 0.5f) : code;
}
