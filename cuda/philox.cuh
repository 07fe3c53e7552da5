// Philox4x32-10 (Salmon et al., 2011): random bits by counter, so without state and without order.

// Whose bits: key and the upper words of the counter (docs/format.md, section 5).
struct Source {
    u32 key0, key1;
    u64 step, stream;
};

enum Purpose { ELEMENT, BLOCK, NOISE };

// The four words of counter n.
__device__ inline uint4 philox(const Source &source, Purpose purpose, u64 n) {
    u32 c0 = (u32)n, c1 = (u32)(n >> 32) | (u32)purpose << 24, c2 = (u32)source.stream, c3 = (u32)source.step;
    u32 k0 = source.key0, k1 = source.key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u64 a = (u64)0xD2511F53u * c0, b = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c1 = (u32)b;
        c3 = (u32)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

__device__ inline u32 word_of(const uint4 &words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}
