// A team: TEAM threads that share a group, a power of two. Up to 32 it is a part of a warp, beyond that a block.

static const int WARPS = THREADS / 32;

struct Extremes {
    float high, low;
};

// Of values that are ordered or NaN: the largest and the smallest of the team, in every thread.
__device__ inline Extremes team_extremes(Extremes own) {
#pragma unroll
    for (int step = min(TEAM, 32) / 2; step > 0; step /= 2) {
        own.high = max_nan(own.high, __shfl_xor_sync(~0u, own.high, step));
        own.low = min_nan(own.low, __shfl_xor_sync(~0u, own.low, step));
    }
    if (TEAM > 32) {
        __shared__ Extremes warps[32];
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
        __syncthreads();
        for (int i = 0; i < WARPS; ++i) {
            own.high = max_nan(own.high, warps[i].high);
            own.low = min_nan(own.low, warps[i].low);
        }
        __syncthreads();
    }
    return own;
}

__device__ inline void team_sync() {
    if (TEAM > 32) __syncthreads();
    else __syncwarp();
}

// Sums over a group in the order of the contract: element i to lane i mod 16, in index order, then halves onto
// halves. Elements come a chunk of TEAM units at a time; a chunk of one unit is the whole group.
struct Sum16 {
    static const int CHUNK = TEAM * UNIT;
    static const int STRIDE = CHUNK + (TEAM < 16 ? UNIT : 0);  // teams of one warp in different banks
    static const int LANES = TEAM >= 16 ? 1 : 16 / TEAM;       // lanes a thread carries
    float lanes[LANES];

    static float *memory() {
        __shared__ __align__(16) float memory[THREADS / TEAM * STRIDE + 16];
        return memory + threadIdx.x / TEAM * STRIDE;
    }

    Sum16() {
#pragma unroll
        for (int i = 0; i < LANES; ++i) lanes[i] = 0.0f;
    }

    void add(const float (&values)[UNIT]) {
        float *chunk = memory();
        const int thread = threadIdx.x % TEAM;
        team_sync();
        float4 *to = (float4 *)(chunk + thread * UNIT);
        to[0] = make_float4(values[0], values[1], values[2], values[3]);
        to[1] = make_float4(values[4], values[5], values[6], values[7]);
        team_sync();
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
            const int lane = thread + i * TEAM;
            if (lane < 16)
                for (int at = lane; at < CHUNK; at += 16) lanes[i] = __fadd_rn(lanes[i], chunk[at]);
        }
    }

    float total() {
        float *chunk = memory();
        const int thread = threadIdx.x % TEAM;
        team_sync();
#pragma unroll
        for (int i = 0; i < LANES; ++i)
            if (thread + i * TEAM < 16) chunk[thread + i * TEAM] = lanes[i];
        team_sync();
        float sums[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) sums[i] = chunk[i];
#pragma unroll
        for (int half = 8; half > 0; half /= 2)
#pragma unroll
            for (int i = 0; i < half; ++i) sums[i] = __fadd_rn(sums[i], sums[i + half]);
        return sums[0];
    }
};
