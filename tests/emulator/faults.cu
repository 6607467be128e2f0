// Small kernels with one fault each, and the same without it: what the emulator must find.
#include <instructions.cuh>

enum Fault { NONE, PLANTED };

// ---- threads that do not wait for each other ------------------------------------------------------------

// y[i] = x[(i + 1) % n] for one block, through shared memory.
template <Fault FAULT>
__global__ void rotate(const float* x, float* y) {
    float* tile = dynamic_shared_memory<float>();
    tile[threadIdx.x] = x[threadIdx.x];
    if (FAULT != PLANTED) __syncthreads();
    y[threadIdx.x] = tile[(threadIdx.x + 1) % blockDim.x];
}

// The same through registers of neighbours in a warp, in place: all must read before any writes.
template <Fault FAULT>
__global__ void rotate_in_place(float* x) {
    float* tile = dynamic_shared_memory<float>();
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const float next = tile[(threadIdx.x + 1) % blockDim.x];
    if (FAULT != PLANTED) __syncthreads();
    tile[threadIdx.x] = next;
    __syncthreads();
    x[threadIdx.x] = tile[threadIdx.x];
}

// y[i] = x[i ^ 1], neighbours of one warp.
template <Fault FAULT>
__global__ void swap_neighbours(const float* x, float* y) {
    float* tile = dynamic_shared_memory<float>();
    tile[threadIdx.x] = x[threadIdx.x];
    if (FAULT != PLANTED) __syncwarp();
    y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Blocks must not depend on each other: block b > 0 reads what block b - 1 wrote.
template <Fault FAULT>
__global__ void chain(float* x) {
    const int b = blockIdx.x;
    if (threadIdx.x == 0) x[b] = FAULT == PLANTED && b > 0 ? x[b - 1] + 1.0f : float(b);
}

// y[0] = the sum of x, each block's added up by its first thread.
template <Fault FAULT>
__global__ void sum_blocks(const float* x, float* y) {
    float* tile = dynamic_shared_memory<float>();
    tile[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    if (threadIdx.x > 0) return;
    float sum = 0;
    for (int i = 0; i < blockDim.x; ++i) sum += tile[i];
    if (FAULT == PLANTED) y[0] += sum;
    else atomicAdd(y, sum);
}

// The same by the block that comes last, from what each has written. PLANTED: from what it reads at once.
template <Fault FAULT>
__global__ void sum_by_last_block(const float* x, float* sums, unsigned* arrived, float* y) {
    if (threadIdx.x > 0) return;
    float sum = 0;
    for (int i = 0; i < blockDim.x; ++i) sum += x[blockIdx.x * blockDim.x + i];
    sums[blockIdx.x] = sum;
    if (FAULT != PLANTED) __threadfence();
    const bool last = FAULT == PLANTED ? blockIdx.x == gridDim.x - 1
                                       : atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (!last) return;
    float total = 0;
    for (int i = 0; i < gridDim.x; ++i) total += sums[i];
    y[0] = total;
}

// ---- threads that wait for those who never come -----------------------------------------------------------

template <Fault FAULT>
__global__ void divergent_barrier(float* y) {
    if (FAULT != PLANTED || threadIdx.x < 16) __syncthreads();
    y[threadIdx.x] = 1.0f;
}

template <Fault FAULT>
__global__ void two_barriers(float* y) {
    if (FAULT == PLANTED && threadIdx.x < 16) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = 1.0f;
}

template <Fault FAULT>
__global__ void divergent_shuffle(float* y) {
    float value = threadIdx.x;
    if (FAULT != PLANTED || threadIdx.x % 2) value += __shfl_xor_sync(0xffffffffu, value, 1);
    y[threadIdx.x] = value;
}

template <Fault FAULT>
__global__ void shuffle_outside_mask(float* y) {
    float value = threadIdx.x;
    if (threadIdx.x < 16) value = __shfl_sync(0xffffu, value, FAULT == PLANTED ? 20 : 4);
    y[threadIdx.x] = value;
}

// ---- asynchronous copies ----------------------------------------------------------------------------------

constexpr int CHUNKS = 6, STAGES = 3;  // a chunk: 4 floats a thread

// y = x, chunk by chunk through a ring of STAGES buffers. LATE: one group is waited for too few.
// OVERWRITTEN: a chunk is fetched into the buffer that is read now.
enum RingFault { SOUND, LATE, OVERWRITTEN };

template <RingFault FAULT>
__global__ void copy_by_ring(const float* x, float* y) {
    float* ring = dynamic_shared_memory<float>();
    const int chunk = 4 * blockDim.x;
    auto fetch = [&](int i) {
        if (i < CHUNKS)
            copy_async<16>(ring + i % STAGES * chunk + 4 * threadIdx.x, x + i * chunk + 4 * threadIdx.x, true);
        commit_copies();
    };
    constexpr int AHEAD = FAULT == OVERWRITTEN ? STAGES : STAGES - 1;
    for (int i = 0; i < AHEAD; ++i) fetch(i);
    for (int i = 0; i < CHUNKS; ++i) {
        wait_copies<FAULT == LATE ? AHEAD : AHEAD - 1>();
        __syncthreads();
        fetch(i + AHEAD);
        // each thread reads what another one fetched
        const int k = (threadIdx.x + 1) % blockDim.x;
        for (int e = 0; e < 4; ++e) y[i * chunk + 4 * k + e] = ring[i % STAGES * chunk + 4 * k + e];
    }
}

template <Fault FAULT>
__global__ void misaligned_copy(const float* x, float* y) {
    float* tile = dynamic_shared_memory<float>();
    copy_async<16>(tile + 4 * threadIdx.x + (FAULT == PLANTED ? 1 : 0), x + 4 * threadIdx.x, true);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

template <Fault FAULT>
__global__ void copy_to_global(const float* x, float* y) {
    float* tile = dynamic_shared_memory<float>();
    copy_async<4>(FAULT == PLANTED ? y + threadIdx.x : tile + threadIdx.x, x + threadIdx.x, true);
    commit_copies();
    wait_copies<0>();
    y[threadIdx.x] = FAULT == PLANTED ? y[threadIdx.x] : tile[threadIdx.x];
}

// ---- memory -------------------------------------------------------------------------------------------------

template <Fault FAULT>
__global__ void uninitialized_dynamic(float* y) {
    float* tile = dynamic_shared_memory<float>();
    if (FAULT != PLANTED || threadIdx.x != 5) tile[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

template <Fault FAULT>
__global__ void uninitialized_static(float* y) {
    __shared__ float tile[32];
    if (FAULT != PLANTED || threadIdx.x != 5) tile[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

// OFFSET shifts the reads of x or the writes of y: -40 to 40.
__global__ void read_at(const float* x, float* y, int offset) { y[threadIdx.x] = x[int(threadIdx.x) + offset]; }

__global__ void write_at(const float* x, float* y, int offset) { y[int(threadIdx.x) + offset] = x[threadIdx.x]; }

__global__ void dynamic_at(float* y, int offset) {
    float* tile = dynamic_shared_memory<float>();
    tile[int(threadIdx.x) + offset] = 1.0f;
    y[threadIdx.x] = 1.0f;
}

__global__ void static_at(float* y, int offset) {
    __shared__ float tile[4][32];
    tile[1][int(threadIdx.x) + offset] = 1.0f;
    y[threadIdx.x] = 1.0f;
}

__global__ void vector_at(const float* x, float* y, int offset) {
    const float4 value = *reinterpret_cast<const float4*>(x + offset);
    y[threadIdx.x] = value.x + value.y + value.z + value.w;
}

__global__ void null_pointer(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

__global__ void overflow(float* y, int factor) { y[threadIdx.x] = float((1 << 20) * factor); }

__global__ void divide(int* y, int divisor) { y[threadIdx.x] = int(threadIdx.x) / divisor; }

__device__ __noinline__ float deeper(float* y, int depth) {
    volatile float frame[256];
    frame[depth % 256] = float(depth);
    return depth == 0 ? frame[0] : deeper(y, depth - 1) + frame[depth % 256];
}

__global__ void recursion(float* y, int depth) { y[threadIdx.x] = deeper(y, depth); }

// ---- matrices -----------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements in rows of 128 bytes; with SWIZZLE the 16-byte chunks of a row are
// permuted so that the rows of a matrix lie in different banks.
template <bool SWIZZLE>
__global__ void load_tile(const uint32_t* x, uint32_t* y) {
    uint32_t* tile = dynamic_shared_memory<uint32_t>();  // 8 rows of 8 chunks of 4 words
    for (int word = threadIdx.x; word < 8 * 32; word += 32) {
        const int row = word / 32, chunk = word % 32 / 4;
        tile[row * 32 + (SWIZZLE ? chunk ^ row : chunk) * 4 + word % 4] = x[word];
    }
    __syncwarp();
    const int row = threadIdx.x % 8, chunk = threadIdx.x / 8;
    uint32_t fragment[4];
    load_matrices(fragment, tile + row * 32 + (SWIZZLE ? chunk ^ row : chunk) * 4);
    for (int i = 0; i < 4; ++i) y[32 * i + threadIdx.x] = fragment[i];
}

// ---- products of a warpgroup --------------------------------------------------------------------------------

// HIDDEN: copies are not shown to the product. OVERWRITTEN: shared memory changes while the product may run.
// UNWAITED: the sums are stored before the product is waited for.
enum GroupFault { SOUND_GROUP, HIDDEN, OVERWRITTEN_OPERAND, UNWAITED };

// y (128 threads, 64) = the product of x's rows: 64 and 128 of 128 bytes of float16, of which 32 are multiplied.
template <GroupFault FAULT>
__global__ void group_product(const uint32_t* x, float* y) {
    unsigned char* memory = dynamic_shared_memory<unsigned char>();
    auto copy_rows = [&](bool valid) {
        for (int chunk = threadIdx.x; chunk < 192 * 8; chunk += 128)
            copy_async<16>(memory + 16 * (chunk ^ chunk / 8 % 8), x + 4 * chunk, valid);
        commit_copies();
        wait_copies<0>();
    };
    copy_rows(true);
    if (FAULT != HIDDEN) show_to_products();
    __syncthreads();
    float d[16][4] = {};
    begin_products();
    warpgroup_multiply_float16<false>(d, warpgroup_operand(memory), warpgroup_operand(memory + 64 * 128));
    commit_products();
    if (FAULT == OVERWRITTEN_OPERAND) copy_rows(false);
    if (FAULT != UNWAITED) wait_products<0>();
    for (int i = 0; i < 64; ++i) y[64 * threadIdx.x + i] = d[i / 4][i % 4];
    wait_products<0>();
}

// y (128 threads, 32) = the product of ones in registers and of x, 8 columns of 16 depths: with the fault the registers
// change while it may run.
template <GroupFault FAULT>
__global__ void group_product_of_columns(const uint32_t* x, float* y) {
    uint32_t* const memory = dynamic_shared_memory<uint32_t>();
    for (int word = threadIdx.x; word < 8 * 16 * 4; word += 128) memory[word] = x[word];
    show_to_products();
    __syncthreads();
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = 0x3c003c00u;  // twice 1
    float d[8][4] = {};
    begin_products();
    warpgroup_multiply_columns_float16(d, a, warpgroup_operand_of_columns(memory, 16 * 16));
    commit_products();
    if (FAULT == OVERWRITTEN_OPERAND) a[3] = 0;
    wait_products<0>();
    for (int i = 0; i < 32; ++i) y[32 * threadIdx.x + i] = d[i / 4][i % 4] + 0 * a[3];
}

// ---- patterns of access ---------------------------------------------------------------------------------

// y[i] = x[STEP * i], each a Value, by way of shared memory.
template <typename Value, int STEP>
__global__ void gather(const float* x, float* y) {
    Value* tile = dynamic_shared_memory<Value>();
    const Value* from = reinterpret_cast<const Value*>(x);
    Value* to = reinterpret_cast<Value*>(y);
    tile[STEP * threadIdx.x] = from[STEP * threadIdx.x];
    to[threadIdx.x] = tile[STEP * threadIdx.x];
}
