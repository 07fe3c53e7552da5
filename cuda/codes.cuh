// Elements to codes (docs/format.md, section 4).

static const float CODE_LIMIT = 0x1p20f;

// 1.5 * 2^23: a float of at most 2^22 plus this is rounded to an integer, which its low bits hold. The lowest byte of
// it is 0.
static const float MAGIC = 12582912.0f;

// Byte BYTE of each of eight words, the first one lowest.
template <int BYTE> __device__ inline u64 gather(const u32 (&words)[UNIT]) {
    const u32 two = 0x40 + 0x11 * BYTE;
    const u32 low = __byte_perm(__byte_perm(words[0], words[1], two), __byte_perm(words[2], words[3], two), 0x5410);
    const u32 high = __byte_perm(__byte_perm(words[4], words[5], two), __byte_perm(words[6], words[7], two), 0x5410);
    return (u64)high << 32 | low;
}

// A byte in each of eight.
__device__ inline u64 bytes_of(u32 byte) { return 0x0101010101010101ull * byte; }

// The smaller of each of two pairs of 16 bits.
__device__ inline u32 min_halves(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
    u32 y;
    asm("min.u16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
#else
    return __vminu2(a, b);
#endif
}

// x / s as rounding to nearest takes it. A subnormal x counts as 0; a subnormal quotient may.
__device__ inline float scaled(float x, float inverse) {
    float t;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(t) : "f"(x), "f"(inverse));
    return t;
}

// RNE(x * inverse) where its code is not clamped, and where it is the end of the codes: code - zero point. Clamped
// first: rounding keeps the order, and the bounds are integers.
__device__ inline float clamped(float x, float inverse, float zero) {
    return fminf(fmaxf(scaled(x, inverse), -zero), (float)TOP_CODE - zero);
}

// To nearest, in the low byte: u = clamp(RNE(x * inverse) + z); a table's level nearest to it; the sign of a single
// bit.
__device__ inline u32 nearest_code(float x, float inverse, float zero, const Table &table) {
    if (LEVELS) {
        // A threshold may lie at zero, and tell the least of quotients from it.
        const float t = fminf(fmaxf(__fmul_rn(flush(x), inverse), -CODE_LIMIT), CODE_LIMIT);
        u32 code = 0;
#pragma unroll
        for (int i = 0; i + 1 < LEVELS; ++i)
            code += t > (float)(table.level(i) + table.level(i + 1)) * 0.5f - 128.0f;
        return code;
    }
    if (BITS == 1) return x >= 0.0f;
    const float t = clamped(x, inverse, zero);
    if (SYMMETRIC) return __float_as_uint(__fadd_rn(t, MAGIC + zero));  // an even zero point rounds nothing
    return __float_as_uint(__fadd_rn(__fadd_rn(t, MAGIC), zero));
}

// Those of a unit, a byte each.
__device__ inline u64 nearest_codes(const float (&x)[UNIT], float inverse, float zero, const Table &table) {
    u32 words[UNIT];
    if (LEVELS || BITS == 1 || BITS == 8 || SYMMETRIC) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) words[i] = nearest_code(x[i], inverse, zero, table);
        return gather<0>(words);
    }
    // The zero point is added to all of them at once: with 128 more no byte is negative.
#pragma unroll
    for (int i = 0; i < UNIT; ++i) words[i] = __float_as_uint(__fadd_rn(clamped(x[i], inverse, zero), MAGIC + 128.0f));
    return gather<0>(words) - bytes_of(128 - (u32)zero);
}

// The level of a code to nearest before its scale, without its zero point.
__device__ inline float nearest_level(float x, float inverse, float zero, const Table &table) {
    if (LEVELS) return __fsub_rn((float)table.level((int)nearest_code(x, inverse, zero, table)), zero);
    return __fsub_rn(__fadd_rn(clamped(x, inverse, zero), MAGIC), MAGIC);
}

// f = t - floor(t); one bit has no whole steps.
__device__ inline float fraction_of(float t) {
    return BITS == 1 ? __fadd_rn(t, 0.5f) : __fsub_rn(t, floorf(t));
}

// Stochastic codes need no clamp: the scale is chosen so that none leaves its range.

// The code of an element with a draw: up where R + RNE(f * 2^DRAW_BITS) reaches 2^DRAW_BITS. `half`: where R is in
// the draw (draws.cuh).
__device__ inline u32 drawn_code(float x, const Divisor &divisor, float zero, u32 draw, u32 half) {
    if (BITS == 1 && divisor.scale == 0.0f) return x >= 0.0f;
    const float t = divisor.quotient(x), base = BITS == 1 ? MAGIC : MAGIC + zero;
    const float down = BITS == 1 ? base : __fadd_rd(t, base);  // the code that is rounded down, in its low bits
    const float fraction = BITS == 1 ? __fadd_rn(t, 0.5f) : __fsub_rn(t, __fsub_rn(down, base));
    u32 up;
    if (DRAW_BITS == 32) up = (u32)((__float2ull_rn(fraction * 0x1p32f) + draw) >> 32);
    else up = add_half(draw, half, __float2uint_rn(fraction * 0x1p16f)) >> 16;
    return __float_as_uint(down) + up & TOP_CODE;
}

// Those of a unit, in bytes whose upper bits are undefined, nearly all of them by two operations: x / s + z in units of
// 2^-16, of which the draw decides whether they reach another integer. The sum is at most 2 * SLACK too large, and
// where that may matter, once in tens of thousands of elements, the code is made with care.
__device__ inline u64 drawn_codes(
    const float (&x)[UNIT], float scale, float inverse, float zero, const u32 (&draws)[UNIT], u32 half
) {
    // From 128 to 256, and from 256 to 512, a float counts in steps of 1 and of 2 units. The product with the inverse is
    // off by a quarter of a unit and by one, the sum by half a step, the fraction of the contract by half a unit and
    // half of that of the product; the upper half of a draw of 32 bits by one.
    static const u32 STEP = BITS < 7 ? 1 : 2, SLACK = (BITS < 7 ? 1 : 4) + DRAW_BITS / 32 * STEP;
    static const u32 ENOUGH = 2 * SLACK;
    const float base = (BITS < 7 ? 192.0f : 256.0f) + zero + SLACK * 0x1p-16f;
    u32 words[UNIT], least = ENOUGH;  // in the lower half
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        float sum;
        asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(x[i]), "f"(inverse), "f"(base));
        words[i] = add_half(draws[i], DRAW_BITS == 32 ? HIGH_HALF : half, STEP * __float_as_uint(sum));
        least = min_halves(least, words[i]);
    }
    u64 codes = gather<2>(words);
    if (least != ENOUGH || (BITS == 1 && scale == 0.0f)) {
        const Divisor divisor(scale);
        u32 doubtful = 0;
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            if ((words[i] & 0xffff) < ENOUGH || (BITS == 1 && scale == 0.0f)) doubtful |= 1u << i;
        for (; doubtful; doubtful &= doubtful - 1) {
            const int i = __ffs(doubtful) - 1;
            u32 draw = draws[0];
            float own = x[0];
#pragma unroll
            for (int j = 1; j < UNIT; ++j)
                if (i == j) draw = draws[j], own = x[j];
            codes = codes & ~(0xffull << 8 * i) | (u64)drawn_code(own, divisor, zero, draw, half) << 8 * i;
        }
    }
    return codes;
}

// t in units of 2^-24 modulo 2^8: floor(t) * 2^24 + F. The conversion holds |t| < 128.
static const bool IN_24THS = BITS > 1 && (SYMMETRIC || BITS < 8);
static const int SYSTEMATIC_TIMES = IN_24THS ? 1 << 24 : 1;

// a - b of each of eight bytes, modulo 2^BITS; upper bits are undefined.
__device__ inline u64 minus_bytes(u64 a, u64 b) {
    const u64 tops = bytes_of(0x80);
    const u64 difference = (a | tops) - (b & ~tops);
    return BITS < 8 ? difference : difference ^ (a ^ ~b) & tops;
}

// The codes of a unit of a systematic block, in bytes whose upper bits are undefined. With A the running sum of the
// fractions of the block's eight units, an element rounds up where A passes an integer; the sum of t + z instead of f
// counts the rest of the code in as well.
// Threads of a team hold units in order, and a small team holds a block in several chunks: `carry` is the sum before
// this one, for the first chunk of a block its phase.
__device__ inline u64 systematic_codes(
    const float (&x)[UNIT], const Quotients<SYSTEMATIC_TIMES> &quotients, float zero, u32 &carry
) {
    const int width = TEAM < 8 ? TEAM : 8, thread = threadIdx.x % width;
    const u32 offset = BITS == 1 ? 0 : (u32)(int)zero << 24;
    float t[UNIT];
    u32 terms[UNIT], sum = UNIT * offset;
    quotients.of(x, t);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
        if (IN_24THS) {
            terms[i] = (u32)__float2int_rn(t[i]);
        } else {
            const float floor = BITS == 1 ? 0.0f : floorf(t[i]);
            terms[i] = ((u32)(int)floor << 24) + __float2uint_rn(fraction_of(t[i]) * 0x1p24f);
        }
    }
#pragma unroll
    for (int i = 0; i < UNIT; i += 2) sum += terms[i] + terms[i + 1];
    u32 through = sum;
#pragma unroll
    for (int step = 1; step < width; step *= 2) {
        u32 other = __shfl_up_sync(~0u, through, step, width);
        if (thread >= step) through += other;
    }
    const u32 before = carry + through - sum;
    carry += __shfl_sync(~0u, through, width - 1, width);
    u32 sums[UNIT], last = before;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) last = sums[i] = last + terms[i] + offset;
    // Whole steps are in the highest byte.
    const u64 now = gather<3>(sums);
    u64 codes = minus_bytes(now, now << 8 | before >> 24);
    if (BITS == 1 && quotients.divisor.scale == 0.0f) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) sums[i] = x[i] >= 0.0f;
        codes = gather<0>(sums);
    }
    return codes;
}
