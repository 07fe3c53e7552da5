// The groups of a tensor, each in the registers of a team (team.cuh).
//
// A team of TEAM threads holds a group, VECTORS units of eight elements a thread: unit u of the group is the
// (u / TEAM)th, or chunk, of thread u mod TEAM, so a team reads and writes memory in order. A group longer than that
// (LONG) is read again for each pass over it.
//
// X: dtype of the tensor. EXACT: the group size divides k, so groups follow each other without a break. ALIGNED: a
// multiple of 8 divides k and group size, and all memory lies on multiples of 16 bytes. FULL: groups are as long as a
// team can hold, all of them.

// The shape of x: rows of k elements in groups of `size`, and the logical index of its first element.
struct Shape {
    u64 rows, k, size, groups_per_row, groups, offset;

    __device__ u32 chunks() const { return (u32)((size + TEAM * UNIT - 1) / (TEAM * UNIT)); }

    // The longest group: that of a full team is known to the compiler.
    __device__ u64 longest() const { return FULL ? TEAM * VECTORS * UNIT : size; }
};

// The group of a team.
struct Group {
    u64 number;    // row by row
    u64 begin;     // index of its first element in x
    u64 row;       // where they are, if rows follow each other without a gap: all in row 0
    u64 column;
    u32 length;    // elements that are there; 0: no group

    // Whether this thread is the one of the team that speaks for it.
    __device__ bool first() const { return threadIdx.x % TEAM == 0 && length; }

    // Whether unit `unit` is there. Of a group that fills its team, all are or none.
    __device__ bool has(u32 unit) const { return FULL ? length : unit * UNIT < length; }

    // How many elements of a unit that is there are.
    __device__ int present(u32 unit) const { return (int)min((u32)UNIT, length - unit * UNIT); }
};

// The group of this thread's team.
__device__ inline Group group_of(const Shape &shape) {
    const u32 number = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM;
    const u64 begin = number * shape.longest();
    Group group = {number, begin, 0, begin, 0};
    if (EXACT && ALIGNED) {
        if (number < (u32)shape.groups) group.length = (u32)shape.longest();
        return group;
    }
    if (number >= (u32)shape.groups) return group;
    u32 row = number / (u32)shape.groups_per_row;
    u64 column = (number - (u64)row * shape.groups_per_row) * shape.size;
    group.row = row;
    group.column = column;
    group.begin = row * shape.k + column;
    group.length = (u32)min(shape.size, shape.k - column);
    return group;
}

// The number in its group of this thread's unit of a chunk.
__device__ inline u32 unit_of(u32 chunk) { return chunk * TEAM + threadIdx.x % TEAM; }

// Where in x this thread's unit of a chunk begins: a distance from the first one's that the compiler knows.
__device__ inline u64 offset_of(const Group &group, u32 chunk) {
    return group.begin + threadIdx.x % TEAM * UNIT + (u64)chunk * (TEAM * UNIT);
}

// Calls pass(chunk) for each chunk of a group, in the same order for every thread.
template <class Pass> __device__ void each_chunk(const Shape &shape, Pass pass) {
#if LONG
    for (u32 chunk = 0; chunk < shape.chunks(); ++chunk) pass(chunk);
#else
#pragma unroll
    for (u32 chunk = 0; chunk < VECTORS; ++chunk) pass(chunk);
#endif
}

// The part of a group that a thread reads: on its way from memory as soon as it is made.
struct Loading {
    const Number<X>::Bits *x;
    const Group &group;
#if !LONG
    Unit<X> units[VECTORS];
#endif

    __device__ Loading(const Number<X>::Bits *x, const Group &group) : x(x), group(group) {
#if !LONG
#pragma unroll
        for (u32 chunk = 0; chunk < VECTORS; ++chunk) load(chunk, units[chunk]);
#endif
    }

    // A unit as f32; zeros where the group has ended.
    __device__ void widen(u32 chunk, float (&values)[UNIT]) const {
#if LONG
        Unit<X> unit;
        load(chunk, unit);
        unit.widen(values);
#else
        units[chunk].widen(values);
#endif
    }

  private:
    __device__ void load(u32 chunk, Unit<X> &unit) const {
        const u32 number = unit_of(chunk), first = number * UNIT;
        // Where all groups are full, a team without one reads the first, and stores nothing.
        const Number<X>::Bits *from = x + offset_of(group, chunk) - (FULL && !group.length ? group.begin : 0);
        if (FULL || (ALIGNED && group.has(number))) {
            unit.load(from);
            return;
        }
        unit.clear();
        if (ALIGNED) return;
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            if (first + i < group.length) unit.elements[i] = from[i];
    }
};

// Stores a unit, as far as it is there.
__device__ inline void store_unit(
    Number<X>::Bits *x, const Group &group, u32 chunk, const float (&values)[UNIT]
) {
    const u32 number = unit_of(chunk), first = number * UNIT;
    Number<X>::Bits *to = x + offset_of(group, chunk);
    if (ALIGNED) {
        if (!group.has(number)) return;
        Unit<X> unit;
        unit.narrow(values);
        unit.store(to);
    } else {
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            if (first + i < group.length) to[i] = Number<X>::narrow(values[i]);
    }
}

// The sum over a group, for elements up to `end`, of what terms(chunk, values) leaves for the eight of each unit; in
// the order of the contract.
template <class Terms> __device__ float group_sum(const Shape &shape, u64 end, Terms terms) {
    Sum16 sum;
    each_chunk(shape, [&](u32 chunk) {
        float values[UNIT];
        terms(chunk, values);
        const u64 first = (u64)unit_of(chunk) * UNIT;
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
            if (first + i >= end) values[i] = 0.0f;
        sum.add(values);
    });
    return sum.total();
}

// The factor of deviations that keeps the variance of a group to which noise is added; 1 where there is none, or it
// overflows.
__device__ inline float kept_deviation(float variance, float noise) {
    const float total = __fadd_rn(variance, noise);
    if (total == 0.0f || !(total < __int_as_float(0x7f800000))) return 1.0f;
    return __fsqrt_rn(__fdiv_rn(variance, total));
}

// The draws of a group's elements, through a warp's part of shared memory.
struct Drawn {
    const Source &source;
    const Purpose purpose;
    const Shape &shape;
    const Group &group;
    u32 *tiles;

    // Whether a tile holds whole groups: then a thread's words lie at distances from its first that the compiler knows.
    static const bool IN_A_TILE = TILED && TEAM <= 8 && TILE / UNIT % (TEAM * VECTORS) == 0;
    const u32 *first, *second;

    // While memory is on its way, a small team draws for all its units; a larger one will, chunk by chunk.
    __device__ Drawn(const Source &source, Purpose purpose, const Shape &shape, const Group &group, u32 *tiles)
        : source(source), purpose(purpose), shape(shape), group(group), tiles(tiles) {
        const u32 number = (u32)group.number - threadIdx.x % 32 / TEAM;
        if (TILED && TEAM < 32) fill_tiles(source, purpose, shape.offset + number * shape.longest(), tiles);
        if (IN_A_TILE) {
            const int place = threadIdx.x % 32 / TEAM * (TEAM * VECTORS), tile = place / (TILE / UNIT);
            const u32 *own = tiles + tile * TILE_WORDS + (place % 8 + threadIdx.x % TEAM) * UNIT;
            first = own + swapped(tile), second = own + 4 - swapped(tile);
        }
    }

    // Those of this thread's unit of a chunk, and the half of their words that they are; returns the logical index of
    // its first element.
    __device__ u64 unit(u32 chunk, u32 (&draws)[UNIT], u32 &half) const {
        const int lane = threadIdx.x % 32;
        const u32 unit = unit_of(chunk);
        const u64 index = shape.offset + group.begin + (u64)unit * UNIT;
        if (TILED && TEAM >= 32) fill_tiles(source, purpose, index - UNIT * lane, tiles);
        const int place = TEAM < 32 ? lane / TEAM * (TEAM * VECTORS) + unit : lane;
        if (IN_A_TILE) {
            take_words(first + chunk * TEAM % 8 * UNIT, second + chunk * TEAM % 8 * UNIT, draws);
            half = place % 16 < 8 ? LOW_HALF : HIGH_HALF;
        } else {
            half = unit_draws(source, purpose, index, place, tiles, draws);
        }
        return index;
    }
};

// The draws of a group's blocks of 64 elements, of which `first` is the first. Threads of eight (or of a smaller team)
// want the same one: each draws for another chunk, and hands it round.
struct BlockDraws {
    static const int WIDTH = TEAM < 8 ? TEAM : 8;
    const Source &source;
    const u64 first;
    u32 own;

    __device__ BlockDraws(const Source &source, u64 first) : source(source), first(first) {
        if (!LONG) own = draw(threadIdx.x % WIDTH * 8 / WIDTH);
    }

    // Whether a block begins with a chunk, or several.
    static __device__ bool begins(u32 chunk) { return chunk * TEAM % 8 == 0; }

    // That of this thread's unit of a chunk with which blocks begin.
    __device__ u32 operator()(u32 chunk) const {
        return LONG ? draw(chunk) : __shfl_sync(~0u, own, chunk * WIDTH / 8, WIDTH);
    }

  private:
    __device__ u32 draw(u32 chunk) const { return block_draw(source, first + unit_of(chunk) / 8); }
};
