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

// Stores the planes from PLANE on of the eight codes of a unit.
template <int PLANE> struct Planes {
    static __device__ void store(u8 *packed, const Place &at, const int (&codes)[UNIT], int present) {
        constexpr int width = Widths::list[PLANE];
        constexpr int shift = PLANE_BITS - Widths::before(PLANE + 1);
        int count;
        u8 *to = packed + plane_offset<PLANE>(at, count);
        u32 low = 0, high = 0;
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
            u32 field = ((u32)codes[i] >> shift) & ((1 << width) - 1);
            if (i * width < 32) low |= field << (i * width & 31);
            else high |= field << (i * width & 31);
        }
        // A plane of bytes may be cut anywhere, the others only at the end of a row.
        if (width == 8) count = min(count, present);
        store_bytes<width>(to, (u64)high << 32 | low, count, ALIGNED);
        Planes<PLANE + 1>::store(packed, at, codes, present);
    }

    // Puts the fields of the planes below COUNT, from PLANE on, behind the bits that codes have.
    template <int COUNT> static __device__ void load(const u8 *packed, const Place &at, int (&codes)[UNIT]) {
        if constexpr (PLANE < COUNT) {
            constexpr int width = Widths::list[PLANE];
            int count;
            const u8 *from = packed + plane_offset<PLANE>(at, count);
            u64 bytes = load_bytes<width>(from, count, ALIGNED);
            u32 low = (u32)bytes, high = (u32)(bytes >> 32);
#pragma unroll
            for (int i = 0; i < UNIT; ++i) {
                u32 field = (i * width < 32 ? low : high) >> (i * width & 31) & ((1 << width) - 1);
                codes[i] = PLANE ? codes[i] << width | (int)field : (int)field;
            }
            Planes<PLANE + 1>::template load<COUNT>(packed, at, codes);
        }
    }
};

template <> struct Planes<Widths::count> {
    static __device__ void store(u8 *, const Place &, const int (&)[UNIT], int) {}
    template <int> static __device__ void load(const u8 *, const Place &, int (&)[UNIT]) {}
};
