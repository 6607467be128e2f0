// Runs each wrapper of instructions.cuh, and the words of CUDA C++ that kernels lean on, on operands from
// outside: on the emulator and on a GPU the results must be those that the comments promise.
#include <elements.cuh>

__global__ void floats_of_float16(const uint16_t* bits, float* values) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    values[i] = float16_bits_to_float(bits[i]);
}

template <typename T>
__global__ void round_floats(const float* values, T* rounded) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    rounded[i] = from_float<T>(values[i]);
}

__global__ void round_floats_to_tf32(const uint32_t* bits, uint32_t* rounded) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    rounded[i] = round_to_tf32(bits[i]);
}

// What shared memory is like before the copies: no zeros.
DEVICE void fill_shared(int words) {
    uint32_t* memory = dynamic_shared_memory<uint32_t>();
    for (int i = threadIdx.x; i < words; i += blockDim.x) memory[i] = 0xabababab;
    __syncthreads();
}

// Each thread copies BYTES where valid says so; y gets all of shared memory.
template <int BYTES>
__global__ void copy_once(const unsigned char* x, const int* valid, unsigned char* y) {
    fill_shared(blockDim.x * BYTES / 4);
    unsigned char* memory = dynamic_shared_memory<unsigned char>();
    const int at = BYTES * threadIdx.x;
    copy_async<BYTES>(memory + at, x + at, valid[threadIdx.x] != 0);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    for (int i = 0; i < BYTES; ++i) y[at + i] = memory[at + i];
}

// Four groups of one copy each; after wait_copies<PENDING>, y gets those that must have landed.
template <int PENDING>
__global__ void copy_by_groups(const float* x, float* y) {
    fill_shared(4 * blockDim.x);
    float* memory = dynamic_shared_memory<float>();
    for (int group = 0; group < 4; ++group) {
        const int at = group * blockDim.x + threadIdx.x;
        copy_async<4>(memory + at, x + at, true);
        commit_copies();
    }
    wait_copies<PENDING>();
    __syncthreads();
    for (int group = 0; group < 4 - PENDING; ++group) {
        const int at = group * blockDim.x + (threadIdx.x + 1) % blockDim.x;  // another thread's
        y[at] = memory[at];
    }
    wait_copies<0>();
}

// y = address of dynamic shared memory modulo 1024, beside a variable, and whether two callers get the same.
__global__ void dynamic_address(int* y) {
    __shared__ int before[3];
    if (threadIdx.x > 0) return;
    before[0] = 1;
    y[0] = shared_address(dynamic_shared_memory<float>()) % 1024;
    y[1] = (const void*)dynamic_shared_memory<float>() == (const void*)dynamic_shared_memory<double>();
    y[2] = shared_address(dynamic_shared_memory<float>() + 5) - shared_address(dynamic_shared_memory<float>());
    y[3] = before[0];
}

// tile: 1024 words; rows[lane]: the word at which the lane's row begins. fragments (32, 4).
template <bool TRANSPOSED>
__global__ void load_fragments(const uint32_t* tile, const int* rows, uint32_t* fragments) {
    uint32_t* memory = dynamic_shared_memory<uint32_t>();
    for (int i = threadIdx.x; i < 1024; i += 32) memory[i] = tile[i];
    __syncwarp();
    uint32_t fragment[4];
    if (TRANSPOSED) load_matrices_transposed(fragment, memory + rows[threadIdx.x]);
    else load_matrices(fragment, memory + rows[threadIdx.x]);
    for (int i = 0; i < 4; ++i) fragments[4 * threadIdx.x + i] = fragment[i];
}

enum Kind { TF32, FLOAT16, BFLOAT16 };

// One product a block: a (blocks, 32, 4), b (blocks, 32, 2), d (blocks, 32, 4), in place.
template <Kind KIND>
__global__ void multiply(const uint32_t* a_of, const uint32_t* b_of, float* d_of) {
    const int lane = blockIdx.x * 32 + threadIdx.x;
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = a_of[4 * lane + i];
    for (int i = 0; i < 2; ++i) b[i] = b_of[2 * lane + i];
    for (int i = 0; i < 4; ++i) d[i] = d_of[4 * lane + i];
    if (KIND == TF32) multiply_tf32(d, a, b);
    if (KIND == FLOAT16) multiply_float16(d, a, b);
    if (KIND == BFLOAT16) multiply_bfloat16(d, a, b);
    for (int i = 0; i < 4; ++i) d_of[4 * lane + i] = d[i];
}

// Rows of 128 bytes into shared memory, chunk c of row r at c ^ r % 8.
DEVICE void put_rows(unsigned char* memory, const uint32_t* x, int rows) {
    for (int word = threadIdx.x; word < rows * 32; word += blockDim.x) {
        const int row = word / 32, chunk = word % 32 / 4;
        reinterpret_cast<uint32_t*>(memory)[row * 32 + (chunk ^ row % 8) * 4 + word % 4] = x[word];
    }
}

// Products of a warpgroup, steps first to last - 1 of 32 bytes of a's depth, added up: a (64 * EVERY + 8 rows of 128
// bytes, of which every EVERY-th group of eight from first_row on is multiplied), or for TF32 a_registers
// (steps, 128, 4); b (COLUMNS rows of 128 bytes), with PANELS panels of 64 rows; d (128, COLUMNS / 8, 4).
template <Kind KIND, int COLUMNS, bool PANELS, int EVERY>
__global__ void __launch_bounds__(128)
multiply_by_warpgroup(const uint32_t* a_rows, const uint32_t* a_registers, const uint32_t* b_rows, float* d_of,
                      int first, int last, int first_row) {
    constexpr int ROW = 128, PANEL = 64 * ROW;
    unsigned char* a_memory = dynamic_shared_memory<unsigned char>();
    unsigned char* b_memory = a_memory + (EVERY * 64 + 8) * ROW;
    put_rows(a_memory, a_rows, EVERY * 64 + 8);
    put_rows(b_memory, b_rows, COLUMNS);
    constexpr int SUMS = COLUMNS / 2;  // of a thread
    float d[COLUMNS / 8][4];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) d[i / 4][i % 4] = d_of[SUMS * threadIdx.x + i];
    show_to_products();
    __syncthreads();
    const uint64_t a = warpgroup_operand<EVERY>(a_memory + first_row * ROW);
    const uint64_t b = PANELS ? warpgroup_operand_of_panels(b_memory, PANEL) : warpgroup_operand(b_memory);
    for (int step = first; step < last; ++step) {
        const uint64_t a_step = a + 2 * step, b_step = b + (PANELS ? 128 : 2) * step;
        uint32_t fragment[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) fragment[i] = a_registers[(128 * step + threadIdx.x) * 4 + i];
        begin_products();
        if constexpr (KIND == FLOAT16) warpgroup_multiply_float16<PANELS>(d, a_step, b_step);
        if constexpr (KIND == BFLOAT16) warpgroup_multiply_bfloat16<PANELS>(d, a_step, b_step);
        if constexpr (KIND == TF32) warpgroup_multiply_tf32(d, fragment, b_step);
        commit_products();
        wait_products<0>();
    }
#pragma unroll
    for (int i = 0; i < SUMS; ++i) d_of[SUMS * threadIdx.x + i] = d[i / 4][i % 4];
}

// One product of a warpgroup: a_registers (128, 4); b in BLOCKS columns of 8 lines, which lie `pitch` depths apart in
// b_columns (depths, 8), from depth `first` on; d (128, BLOCKS, 4).
template <Kind KIND, int BLOCKS>
__global__ void __launch_bounds__(128)
multiply_columns_by_warpgroup(const uint32_t* a_registers, const uint32_t* b_columns, float* d_of, int depths,
                              int pitch, int first) {
    constexpr int SUMS = BLOCKS * 4;  // of a thread
    uint32_t* const memory = dynamic_shared_memory<uint32_t>();
    for (int word = threadIdx.x; word < depths * 4; word += blockDim.x) memory[word] = b_columns[word];
    uint32_t a[4];
    float d[BLOCKS][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = a_registers[4 * threadIdx.x + i];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) d[i / 4][i % 4] = d_of[SUMS * threadIdx.x + i];
    show_to_products();
    __syncthreads();
    const uint64_t b = warpgroup_operand_of_columns(memory, pitch * 16) + first;
    begin_products();
    if constexpr (KIND == FLOAT16) warpgroup_multiply_columns_float16(d, a, b);
    if constexpr (KIND == BFLOAT16) warpgroup_multiply_columns_bfloat16(d, a, b);
    commit_products();
    wait_products<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) d_of[SUMS * threadIdx.x + i] = d[i / 4][i % 4];
}

// One product of a warpgroup: a_registers (128, 4); b in blocks of 8 lines x 16 bytes in `words` words of memory, from
// byte `first` on, of which the next depths lie depth_bytes on, the next lines line_bytes; d (128, BLOCKS, 4).
template <int BLOCKS>
__global__ void __launch_bounds__(128)
multiply_blocks_by_warpgroup(const uint32_t* a_registers, const uint32_t* b_blocks, float* d_of, int words, int first,
                             int depth_bytes, int line_bytes) {
    constexpr int SUMS = BLOCKS * 4;  // of a thread
    uint32_t* const memory = dynamic_shared_memory<uint32_t>();
    for (int word = threadIdx.x; word < words; word += blockDim.x) memory[word] = b_blocks[word];
    uint32_t a[4];
    float d[BLOCKS][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = a_registers[4 * threadIdx.x + i];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) d[i / 4][i % 4] = d_of[SUMS * threadIdx.x + i];
    show_to_products();
    __syncthreads();
    begin_products();
    warpgroup_multiply_tf32(d, a, warpgroup_operand_of_blocks(memory + first / 4, depth_bytes, line_bytes));
    commit_products();
    wait_products<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) d_of[SUMS * threadIdx.x + i] = d[i / 4][i % 4];
}

// y (8, 32): what shuffles by `by` within segments of WIDTH lanes give, and votes of the lanes of mask.
template <int WIDTH>
__global__ void warp_words(const float* x, float* y, int by, unsigned mask) {
    const int lane = threadIdx.x;
    const float value = x[lane];
    y[lane] = __shfl_sync(0xffffffffu, value, by, WIDTH);
    y[32 + lane] = __shfl_up_sync(0xffffffffu, value, by, WIDTH);
    y[64 + lane] = __shfl_down_sync(0xffffffffu, value, by, WIDTH);
    y[96 + lane] = __shfl_xor_sync(0xffffffffu, value, by, WIDTH);
    const double wide = __shfl_xor_sync(0xffffffffu, double(value) + 1e-9, 1);
    y[128 + lane] = float((wide - double(__shfl_xor_sync(0xffffffffu, value, 1))) * 1e9);
    if (mask >> lane & 1) {
        const unsigned positive = __ballot_sync(mask, value > 0);
        y[160 + lane] = float(__popc(positive));
        y[192 + lane] = float(2 * __any_sync(mask, value > 100) + __all_sync(mask, value > -100));
        y[224 + lane] = positive >> lane & 1;
    }
}

// y (6, 64): how many threads of the block say true, whether any and all do, and results of atomics.
__global__ void block_words(const float* x, float* y, int* counters) {
    const int i = threadIdx.x;
    y[i] = float(__syncthreads_count(x[i] > 0));
    y[64 + i] = float(__syncthreads_or(x[i] > 100));
    y[128 + i] = float(__syncthreads_and(x[i] > -100));
    atomicAdd(&counters[0], 2);
    atomicMax(&counters[1], i);
    atomicMin(&counters[2], -i);
    atomicOr(&counters[3], 1 << i % 16);
    atomicCAS(&counters[4], 0, 7);
    atomicInc(reinterpret_cast<unsigned*>(&counters[5]), 60);
    y[192 + i] = fmaxf(x[i], __uint_as_float(0x7fc00000u)) + fminf(__uint_as_float(0x7fc00000u), x[i]);
    y[256 + i] = float(__clz(i)) + 100.0f * float(__ffs(i)) + 10000.0f * float(__popc(i));
    y[320 + i] = float(__umulhi(0x80000000u + unsigned(i), 0x10000u));
}
