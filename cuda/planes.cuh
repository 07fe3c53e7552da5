// Codes to bit planes and back, a unit of eight codes at a time: it fills `width` bytes of a plane of that width.

struct Widths {
    static constexpr int list[] = {PLANES};
    static const int count = sizeof(list) / sizeof(int);
    static constexpr int before(int plane) {
        int bits = 0;
        for (int i = 0; i < plane; ++i) bits += list[i];
        return bits;
    }
};
static constexpr int PLANE_BITS = Widths::before(Widths::count);

// Bytes of a row of k codes in a plane.
__device__ inline u64 row_bytes(u64 k, int width) { return (k * width + 7) / 8; }

// Where a unit lies in planes of `rows` rows of `k` codes: its row and the index of its first code there; or, where
// rows are whole units (ALIGNED), its number.
struct Place {
    u64 rows, k, row, column, unit;
};

// The bytes of one unit in one plane, the first one lowest. ALIGNED: k is a multiple of 8 and the blob lies on a
// multiple of 8 bytes, so rows follow each other without a gap and the bytes are one word.
template <int WIDTH> __device__ inline void store_bytes(u8 *to, u64 bytes, int count, bool aligned) {
    if (aligned) {
        if (WIDTH == 8) *(u64 *)to = bytes;
        else if (WIDTH == 4) *(u32 *)to = (u32)bytes;
        else if (WIDTH == 2) *(u16 *)to = (u16)bytes;
        else *to = (u8)bytes;
    } else {
        for (int i = 0; i < count; ++i) to[i] = (u8)(bytes >> 8 * i);
    }
}

template <int WIDTH> __device__ inline u64 load_bytes(const u8 *from, int count, bool aligned) {
    if (aligned) {
        if (WIDTH == 8) return __ldg((const u64 *)from);
        if (WIDTH == 4) return __ldg((const u32 *)from);
        if (WIDTH == 2) return __ldg((const u16 *)from);
        return __ldg(from);
    }
    u64 bytes = 0;
    for (int i = 0; i < count; ++i) bytes |= (u64)from[i] << 8 * i;
    return bytes;
}

// Where the bytes of a unit begin in a plane, and how many of the row are left from there, at most WIDTH.
template <int PLANE> __device__ inline u64 plane_offset(const Place &at, int &count) {
    constexpr int width = Widths::list[PLANE];
    if (ALIGNED) {
        count = width;
        return (PLANE ? at.rows * at.k / 8 * Widths::before(PLANE) : 0) + at.unit * width;
    }
    u64 start = 0;
#pragma unroll
    for (int i = 0; i < PLANE; ++i) start += at.rows * row_bytes(at.k, Widths::list[i]);
    u64 length = row_bytes(at.k, width), column = at.column * width / 8;
    count = (int)min((u64)width, length - column);
    return start + at.row * length + column;
}

// The `width` low bits of four bytes, one after the other, in the low bits; `low` ones of a byte are not looked at.
template <int WIDTH> __device__ inline u32 squeeze_four(u32 bytes, int low) {
    const u32 fields = bytes >> low & 0x01010101u * ((1 << WIDTH) - 1);
    if (WIDTH == 8) return fields;
    // Each field meets the factor that brings it behind the one before, above all other products.
    return WIDTH == 2 ? fields * 0x01041040u >> 24 : fields * 0x01020408u >> 24;
}

// The same of eight.
template <int WIDTH> __device__ inline u64 squeeze(u64 bytes, int low) {
    const u32 first = (u32)bytes, second = (u32)(bytes >> 32);
    if (WIDTH == 4) {
        const u32 own = 0x0f0f0f0f;
        return __byte_perm(first >> low & own | first >> low + 4 & ~own, second >> low & own | second >> low + 4 & ~own, 0x6420);
    }
    return squeeze_four<WIDTH>(first, low) | (u64)squeeze_four<WIDTH>(second, low) << 4 * WIDTH;
}

// The lowest four fields of `width` bits, a byte each.
template <int WIDTH> __device__ inline u32 spread(u32 fields) {
    if (WIDTH == 8) return fields;
    if (WIDTH == 4) {
        const u32 twice = __byte_perm(fields, 0, 0x1100);
        return twice & 0x000f000f | twice >> 4 & 0x0f000f00;
    }
    if (WIDTH == 2) {
        const u32 pairs = (fields | fields << 12) & 0x000f000f;
        return (pairs | pairs << 6) & 0x03030303;
    }
    return (fields & 0xf) * 0x00204081u & 0x01010101;
}

// The planes from PLANE on of the eight codes of a unit, a byte each, the first one lowest.
template <int PLANE> struct Planes {
    static __device__ void store(u8 *packed, const Place &at, u64 codes, int present) {
        constexpr int width = Widths::list[PLANE];
        constexpr int below = PLANE_BITS - Widths::before(PLANE + 1);
        int count;
        u8 *to = packed + plane_offset<PLANE>(at, count);
        // A plane of bytes may be cut anywhere, the others only at the end of a row.
        if (width == 8) count = min(count, present);
        store_bytes<width>(to, squeeze<width>(codes, below), count, ALIGNED);
        Planes<PLANE + 1>::store(packed, at, codes, present);
    }

    // The same for COUNT units, of which `at` is the first, by as few stores as can be. ALIGNED, and planes begin on
    // multiples of 16 bytes.
    template <int COUNT> static __device__ void store_run(u8 *packed, const Place &at, const u64 (&codes)[COUNT]) {
        constexpr int width = Widths::list[PLANE], bytes = COUNT * width;
        constexpr int below = PLANE_BITS - Widths::before(PLANE + 1);
        int count;
        u8 *to = packed + plane_offset<PLANE>(at, count);
        u32 words[(bytes + 3) / 4] = {};
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const u64 fields = squeeze<width>(codes[i], below);
            if constexpr (width == 8) words[2 * i] = (u32)fields, words[2 * i + 1] = (u32)(fields >> 32);
            else words[i * width / 4] |= (u32)fields << 8 * width * (i % (4 / width));
        }
        if constexpr (bytes % 16 == 0) {
#pragma unroll
            for (int i = 0; i < bytes / 4; i += 4)
                *(uint4 *)(to + 4 * i) = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
        } else if constexpr (bytes % 4 == 0) {
#pragma unroll
            for (int i = 0; i < bytes / 4; ++i) ((u32 *)to)[i] = words[i];
        } else {
#pragma unroll
            for (int i = 0; i < bytes; ++i) to[i] = (u8)(words[i / 4] >> 8 * (i % 4));
        }
        Planes<PLANE + 1>::store_run(packed, at, codes);
    }

    // Puts the fields of the planes below COUNT, from PLANE on, behind the bits that codes have.
    template <int COUNT> static __device__ u64 load(const u8 *packed, const Place &at, u64 codes = 0) {
        if constexpr (PLANE < COUNT) {
            constexpr int width = Widths::list[PLANE];
            int count;
            const u8 *from = packed + plane_offset<PLANE>(at, count);
            const u64 bytes = load_bytes<width>(from, count, ALIGNED);
            const u64 fields = (u64)spread<width>((u32)(bytes >> 4 * width)) << 32 | spread<width>((u32)bytes);
            codes = Planes<PLANE + 1>::template load<COUNT>(packed, at, (PLANE ? codes << width : 0) | fields);
        }
        return codes;
    }
};

template <> struct Planes<Widths::count> {
    static __device__ void store(u8 *, const Place &, u64, int) {}
    template <int COUNT> static __device__ void store_run(u8 *, const Place &, const u64 (&)[COUNT]) {}
    template <int> static __device__ u64 load(const u8 *, const Place &, u64 codes) { return codes; }
};
