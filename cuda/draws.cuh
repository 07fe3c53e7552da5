// The random bits of elements and blocks (docs/format.md, sections 4 and 5).
//
// TILED: the units of a warp are consecutive and begin a tile, so it generates the counters of DRAWN units at once, one
// a lane after the other, and shares the words through its part of shared memory. Otherwise every element asks for
// its own.

enum Mode { NEAREST, IID, ANTITHETIC, STRATIFIED, SYSTEMATIC, SUBTRACTIVE };

static const int TILE = DRAW_BITS == 32 ? 64 : 128;
static const int WARP_TILES = TILED ? DRAWN * UNIT / TILE : 0;
// 64 words, and a gap that keeps neighbours in different banks: the best one where there are few enough tiles.
static const int TILE_WORDS = DRAW_BITS == 16 ? 80 : 68;
static const int WARP_WORDS = TILED ? WARP_TILES * TILE_WORDS : 4;

// R' = half + rho (R - half), rho in units of 2^-16.
template <int WIDTH> __device__ inline u32 shrunk(u32 draw, u32 rho) {
    const i64 half = 1ll << (WIDTH - 1);
    return (u32)(half + (((i64)rho * ((i64)draw - half)) >> 16));
}

// The draw of element `index`, of its own counter.
__device__ inline u32 element_draw(const Source &source, Purpose purpose, u64 index) {
    int j = (int)(index % 64);
    u32 word = word_of(philox(source, purpose, index / TILE * 16 + j % 16), j / 16);
    return DRAW_BITS == 32 ? word : index % 128 < 64 ? word & 0xffff : word >> 16;
}

__device__ inline u32 block_draw(const Source &source, u64 block) {
    return word_of(philox(source, BLOCK, block / 4), (int)(block % 4));
}

// In every second pair of tiles, fours of words change places: with that, threads that read or write together find what
// they want in different banks.
__device__ inline int swapped(int tile) { return (tile ^ tile >> 1) & 1 ? 4 : 0; }

// Fills the tiles of a warp, of which the first begins at element `first`.
__device__ inline void fill_tiles(const Source &source, Purpose purpose, u64 first, u32 *tiles) {
    const int lane = threadIdx.x % 32;
    u64 counter = first / TILE * 16 + lane;
    tiles += lane / 16 * TILE_WORDS;
    auto fill = [&](u32 *to) {
        const uint4 words = philox(source, purpose, counter);
        to[0] = words.x, to[16] = words.y, to[32] = words.z, to[48] = words.w;
        counter += 32, tiles += 2 * TILE_WORDS;
    };
    const int place = lane % 16 ^ swapped(lane / 16);
    __syncwarp();
    // Two pairs of tiles at a time: all of them would take the registers of what is on its way from memory, and be put
    // before it.
#pragma unroll 1
    for (int pairs = WARP_TILES / 2; pairs > 0; pairs -= 2) {
        fill(tiles + place);
        if (WARP_TILES % 4 == 0 || pairs > 1) fill(tiles + (place ^ 4));
    }
    __syncwarp();
}

// Where a draw of 16 bits is in its word: the second operand of `add_half`.
static const u32 LOW_HALF = 1, HIGH_HALF = 0x100;

// A half of a word, plus another word.
__device__ inline u32 add_half(u32 word, u32 half, u32 other) {
    u32 sum;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(word), "r"(half), "r"(other));
    return sum;
}

// The words of a unit, of which the first four lie at `first`, the others at `second`.
__device__ inline void take_words(const u32 *first, const u32 *second, u32 (&draws)[UNIT]) {
    const uint4 a = *(const uint4 *)first, b = *(const uint4 *)second;
    draws[0] = a.x, draws[1] = a.y, draws[2] = a.z, draws[3] = a.w;
    draws[4] = b.x, draws[5] = b.y, draws[6] = b.z, draws[7] = b.w;
}

// The own draws of a unit: `index` is the logical index of its first element, `place` its number among the units of
// the warp's tiles. Those of 16 bits are a half of their words, which is returned.
__device__ inline u32 unit_draws(
    const Source &source, Purpose purpose, u64 index, int place, const u32 *tiles, u32 (&draws)[UNIT]
) {
#if TILED
    const int tile = place / (TILE / UNIT), swap = swapped(tile);
    const u32 *from = tiles + tile * TILE_WORDS + place % 8 * UNIT;
    take_words(from + swap, from + (4 - swap), draws);
    return place % 16 < 8 ? LOW_HALF : HIGH_HALF;
#else
#pragma unroll 1
    for (int i = 0; i < UNIT; ++i) {
        u64 own = MODE == ANTITHETIC ? (index + i) & ~1ull : index + i;
        u32 draw = element_draw(source, purpose, own);
#pragma unroll
        for (int j = 0; j < UNIT; ++j)
            if (i == j) draws[j] = draw;
    }
    return LOW_HALF;
#endif
}

// The draws themselves.
__device__ inline void take_halves(u32 half, u32 (&draws)[UNIT]) {
    if (DRAW_BITS == 32) return;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) draws[i] = add_half(draws[i], half, 0);
}

// A permutation of 0..7 by Fisher and Yates, the word as a fraction: three bits an entry, the first one lowest.
__device__ inline u32 permutation(u32 word) {
    u32 order = 076543210;
#pragma unroll
    for (int i = 7; i > 0; --i) {
        u64 product = (u64)word * (i + 1);
        int j = (int)(product >> 32);
        word = (u32)product;
        u32 change = ((order >> 3 * i) ^ (order >> 3 * j)) & 7;
        order ^= change << 3 * i | change << 3 * j;
    }
    return order;
}

// Own draws of a unit to its draws R: `index` is the logical index of its first element, `stratum` the number of its
// block of eight. Returns the half of a word that they are.
__device__ inline u32 rounding_draws(
    const Source &source, u64 index, u64 stratum, u32 rho, u32 half, u32 (&draws)[UNIT]
) {
    if (MODE != ANTITHETIC && MODE != STRATIFIED && !SHRINK) return half;
    take_halves(half, draws);
    if (MODE == ANTITHETIC) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            // A pair shares the draw of its even element, and the odd one takes the complement.
            u32 even = TILED && i % 2 ? draws[i - 1] : draws[i];
            draws[i] = (index + i) % 2 ? 0xffffffffu >> (32 - DRAW_BITS) ^ even : even;
        }
    }
    if (MODE == STRATIFIED) {
        u32 order = permutation(block_draw(source, stratum));
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            draws[i] = (order >> 3 * i & 7) << (DRAW_BITS - 3) | draws[i] >> 3;
    }
    if (SHRINK) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) draws[i] = shrunk<DRAW_BITS>(draws[i], rho);
    }
    return LOW_HALF;
}
