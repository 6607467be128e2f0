// What the kernels of batch normalization share. Arrays of images are (rows, channels), a row being a pixel.
//
// These kernels run at the speed of memory. A thread keeps to a pack of WIDTH neighbouring channels, what belongs
// to them in registers, and visits rows of its block, several loads on their way at once. A block is blockDim.x
// packs side by side and blockDim.y rows, at most THREADS threads; blocks of one blockIdx.x share the rows of the
// same packs. Sums run in an order that the sizes alone decide.
#pragma once
#include <elements.cuh>

constexpr int THREADS = 256;

// Blocks that a multiprocessor shall hold at once: 80 or 64 registers for a thread.
constexpr int resident(int width) {
#if __CUDA_ARCH__ >= 1000  // the compiler multiplies in pairs there, and takes more registers
    return width > 4 ? 2 : 3;
#else
    return width > 4 ? 3 : 4;
#endif
}

template <typename T> using Sum = typename Accumulator<T>::type;

// ---- which channels and rows are a thread's ------------------------------------------------------------

// The pack of a thread.
template <int WIDTH>
struct Column {
    long long rows;
    int channels, pack, channel;
    bool inside;

    DEVICE Column(long long rows, long long channels) : rows(rows), channels(channels) {
        pack = blockIdx.x * blockDim.x + threadIdx.x;
        channel = pack * WIDTH;
        inside = channel < channels;
    }

    // The first row of the thread's first share.
    template <int AT_ONCE>
    DEVICE long long first_row() const {
        return (long long)(blockIdx.y) * (AT_ONCE * blockDim.y) + threadIdx.y;
    }
};

// Rows of a thread that it visits together: every blockDim.y-th one, up or down, COUNT of them or what is left.
template <int WIDTH, int COUNT, bool DOWN>
struct Share {
    long long start, start_pack;  // the first row's pack in arrays of elements, and of one byte for each pack
    int step, step_pack, left;

    DEVICE Share(const Column<WIDTH>& column, long long first) {
        const long long row = DOWN ? column.rows - 1 - first : first;
        const int packs = column.channels / WIDTH, down = DOWN ? -1 : 1;
        start = row * column.channels + column.channel;
        start_pack = row * packs + column.pack;
        step = down * (int)blockDim.y * column.channels;
        step_pack = down * (int)blockDim.y * packs;
        left = (int)min(column.rows - first, (long long)(COUNT * blockDim.y));
    }

    DEVICE bool has(int k) const { return k * (int)blockDim.y < left; }

    template <typename T>
    DEVICE Pack<T, WIDTH> load(const T* array, int k) const {
        return *reinterpret_cast<const Pack<T, WIDTH>*>(array + start + k * step);
    }

    template <typename T>
    DEVICE void store(T* array, int k, const Pack<T, WIDTH>& pack) const {
        *reinterpret_cast<Pack<T, WIDTH>*>(array + start + k * step) = pack;
    }

    // The byte of row k's pack in an array (rows, packs).
    template <typename Byte>
    DEVICE Byte& byte(Byte* array, int k) const {
        return array[start_pack + k * step_pack];
    }
};

// Calls visit(share) for the shares of a thread, which cover the rows of its block from the first to the last one
// or, DOWN, from the last to the first.
template <int COUNT, bool DOWN, int WIDTH, typename Visit>
DEVICE void for_each_share(const Column<WIDTH>& column, Visit visit) {
    if (!column.inside) return;
    const long long step = (long long)(gridDim.y) * (COUNT * blockDim.y);
    for (long long first = column.template first_row<COUNT>(); first < column.rows; first += step) {
        visit(Share<WIDTH, COUNT, DOWN>(column, first));
    }
}

// A vector's elements for the channels of a thread, or a default where there is no vector.
template <typename S, int WIDTH, typename P>
DEVICE void load_vector(S (&values)[WIDTH], const P* vector, const Column<WIDTH>& column, S otherwise) {
    constexpr int PART = WIDTH * sizeof(P) > 16 ? 16 / sizeof(P) : WIDTH;  // of one access
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) values[i] = otherwise;
    if (vector == nullptr || !column.inside) return;
#pragma unroll
    for (int i = 0; i < WIDTH; i += PART) {
        const auto part = *reinterpret_cast<const Pack<P, PART>*>(vector + column.channel + i);
#pragma unroll
        for (int k = 0; k < PART; ++k) values[i + k] = S(to_float(part.values[k]));
    }
}

// ---- sums ------------------------------------------------------------------------------------------------

// What the gradients of a channel are made of: the sums of grad and of grad * (x - mean).
template <typename S>
struct GradSums {
    S total, products;

    DEVICE void add(S grad, S deviation) {
        total += grad;
        products = fma(grad, deviation, products);
    }

    DEVICE void merge(const GradSums& other) {
        total += other.total;
        products += other.products;
    }
};

// Merge what the threads of one threadIdx.x hold, in a tree: afterwards each of them holds the result.
template <int WIDTH, typename Part>
DEVICE void merge_rows(Part (&mine)[WIDTH], Part (&shared)[WIDTH][THREADS]) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) shared[i][thread] = mine[i];
    for (int half = blockDim.y / 2; half > 0; half /= 2) {  // blockDim.y is a power of two
        __syncthreads();
        if (threadIdx.y < half) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                mine[i].merge(shared[i][thread + half * blockDim.x]);
                shared[i][thread] = mine[i];
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) mine[i] = shared[i][threadIdx.x];
}

// ---- affine maps -----------------------------------------------------------------------------------------

// (x - center) * scale + shift for the channels of a thread: exact where x is far from 0 and close to center.
template <typename S, int WIDTH>
struct Affine {
    S center[WIDTH], scale[WIDTH], shift[WIDTH];

    DEVICE S of(S x, int i) const { return fma(x - center[i], scale[i], shift[i]); }
};

// What training keeps of a batch, and the running statistics that it moves, (channels,), beside the number of
// batches. All but inv_std may be null.
template <typename S, typename P>
struct Statistics {
    S* mean;
    S* inv_std;
    P* running_mean;
    P* running_var;
    long long* batches;
    double momentum;

    DEVICE void store(int channel, S batch_mean, S batch_var, S batch_inv_std, long long rows) const {
        if (mean != nullptr) mean[channel] = batch_mean;
        inv_std[channel] = batch_inv_std;
        const S correction = S(rows) / S(rows > 1 ? rows - 1 : 1);  // the unbiased variance
        if (running_mean != nullptr) move(running_mean[channel], batch_mean);
        if (running_var != nullptr) move(running_var[channel], batch_var * correction);
        if (batches != nullptr && channel == 0) ++*batches;
    }

    DEVICE void move(P& running, S found) const {
        running = from_float<P>(Sum<P>(S(1 - momentum) * S(to_float(running)) + S(momentum) * found));
    }
};

DEVICE float inverse_root(float x) { return rsqrtf(x); }
DEVICE double inverse_root(double x) { return 1 / sqrt(x); }

// The affine map that normalizes, of mean (already in `center`) and variance; one row of blocks keeps the statistics.
template <typename S, typename P, int WIDTH>
DEVICE void normalize(Affine<S, WIDTH>& affine, const S (&var)[WIDTH], const P* weight, const P* bias, double eps,
                      const Statistics<S, P>& statistics, const Column<WIDTH>& column) {
    load_vector(affine.scale, weight, column, S(1));
    load_vector(affine.shift, bias, column, S(0));
    const bool keeps = blockIdx.y == 0 && threadIdx.y == 0 && column.inside;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const S inv_std = inverse_root(var[i] + S(eps));
        affine.scale[i] *= inv_std;
        if (keeps) statistics.store(column.channel + i, affine.center[i], var[i], inv_std, column.rows);
    }
}

// grad_x = scale * (grad - mean(grad) - (x - mean) * inv_std * mean(grad * x_hat)), for the channels of a thread.
template <typename T, int WIDTH>
struct GradAffine {
    // 16 bits cannot tell x from the mean where float32's rounding of slope * x would: no need to subtract it first.
    static constexpr bool CENTERED = sizeof(T) > 2;
    typedef Sum<T> S;
    S center[WIDTH], scale[WIDTH], slope[WIDTH], shift[WIDTH];

    // total and grad_weight are sums over the rows: of grad, and of grad * x_hat.
    template <typename P>
    DEVICE void set(const S (&total)[WIDTH], const S (&grad_weight)[WIDTH], const S (&inv_std)[WIDTH],
                    const P* weight, const Column<WIDTH>& column) {
        load_vector(scale, weight, column, S(1));
        const S share = S(1) / S(column.rows);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            scale[i] *= inv_std[i];
            slope[i] = -scale[i] * inv_std[i] * grad_weight[i] * share;
            shift[i] = -scale[i] * total[i] * share;
            if (!CENTERED) shift[i] -= slope[i] * center[i];
        }
    }

    DEVICE S of(S grad, S x, int i) const {
        return fma(scale[i], grad, fma(slope[i], CENTERED ? x - center[i] : x, shift[i]));
    }
};
