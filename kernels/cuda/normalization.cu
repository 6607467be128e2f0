// Batch normalization of channels-last images; normalization.cuh says how the work is shared.
#include <normalization.cuh>

// ---- a batch's moments ---------------------------------------------------------------------------------

// Count, mean and sum of squared deviations from it: where a mean is far from 0, sums of squares would drown the
// deviations in rounding.
template <typename S>
struct Moments {
    S count, mean, squares;

    // Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983.
    DEVICE void merge(const Moments& other) {
        if (other.count == 0) return;
        const S total = count + other.count;
        const S share = other.count / total;
        const S distance = other.mean - mean;
        mean += distance * share;
        squares += other.squares + distance * distance * count * share;
        count = total;
    }
};

// Merge a channel's parts (blocks, channels), a thread every blockDim.y-th of them, then what the threads have.
template <typename Part>
DEVICE Part merge_blocks(const Part* parts, long long blocks, long long channels, int channel) {
    __shared__ Part shared[1][THREADS];
    Part mine[1] = {};
    if (channel < channels) {
#pragma unroll 4
        for (long long block = threadIdx.y; block < blocks; block += blockDim.y) {
            mine[0].merge(parts[block * channels + channel]);
        }
    }
    merge_rows(mine, shared);
    return mine[0];
}

// The moments of x - x[0] over the thread's rows. Sums are taken about the first value that the thread meets, so
// that they keep their digits whatever x[0] is.
template <typename T, int WIDTH>
DEVICE void gather_moments(Moments<Sum<T>> (&moments)[WIDTH], const T* x, const Column<WIDTH>& column) {
    constexpr int AT_ONCE = 4;
    typedef Sum<T> S;
    const long long first_row = column.template first_row<AT_ONCE>();
    const bool idle = !column.inside || first_row >= column.rows;
    S origin[WIDTH], total[WIDTH] = {}, squares[WIDTH] = {}, count = 0;
    load_vector(origin, idle ? nullptr : x + first_row * column.channels, column, S(0));
    for_each_share<AT_ONCE, false>(column, [&](const auto& share) {
        Pack<T, WIDTH> packs[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (share.has(k)) packs[k] = share.load(x, k);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
            count += 1;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const S value = to_float(packs[k].values[i]) - origin[i];
                total[i] += value;
                squares[i] = fma(value, value, squares[i]);
            }
        }
    });
    S base[WIDTH];
    load_vector(base, x, column, S(0));
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const S offset = idle ? S(0) : total[i] / count;
        const S rest = squares[i] - total[i] * offset;
        moments[i] = {count, idle ? S(0) : origin[i] - base[i] + offset, rest < 0 ? S(0) : rest};
    }
}

// Leave a block's moments of x - x[0] in parts (gridDim.y, channels).
template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS, resident(WIDTH))
batch_norm_moments(const T* x, Moments<Sum<T>>* parts, long long rows, long long channels) {
    __shared__ Moments<Sum<T>> shared[WIDTH][THREADS];
    const Column<WIDTH> column(rows, channels);
    Moments<Sum<T>> moments[WIDTH];
    gather_moments(moments, x, column);
    merge_rows(moments, shared);
    if (threadIdx.y != 0 || !column.inside) return;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) parts[blockIdx.y * channels + column.channel + i] = moments[i];
}

// Make mean and biased variance of all blocks' parts.
template <typename T>
__global__ void __launch_bounds__(THREADS)
batch_norm_merge_moments(const Moments<Sum<T>>* parts, const T* x, Sum<T>* mean, Sum<T>* var, long long blocks,
                         long long channels) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    const Moments<Sum<T>> moments = merge_blocks(parts, blocks, channels, channel);
    if (threadIdx.y != 0 || channel >= channels) return;
    mean[channel] = to_float(x[channel]) + moments.mean;
    var[channel] = moments.squares / moments.count;
}

// ---- forward -------------------------------------------------------------------------------------------------

// out = affine(x) + residual, with relu at least 0. Bit i of a pack's byte in `passed`, if there is one, says that
// relu let channel i through. Rows are taken from the last one on: those that were written last may still be in
// the L2 cache, and those that are written last are what a next kernel begins with.
template <bool RESIDUAL, typename T, int WIDTH>
DEVICE void apply_affine(const Affine<Sum<T>, WIDTH>& affine, const T* x, const T* residual, T* out,
                         unsigned char* passed, bool relu, const Column<WIDTH>& column) {
    constexpr int AT_ONCE = RESIDUAL ? 2 : 4;
    typedef Sum<T> S;
    for_each_share<AT_ONCE, true>(column, [&](const auto& share) {
        Pack<T, WIDTH> packs[AT_ONCE], added[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
            packs[k] = share.load(x, k);
            if (RESIDUAL) added[k] = share.load(residual, k);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
            unsigned bits = 0;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                S value = affine.of(to_float(packs[k].values[i]), i);
                if (RESIDUAL) value += to_float(added[k].values[i]);
                if (relu && value < 0) value = 0;  // nan passes
                const T rounded = from_float<T>(value);
                packs[k].values[i] = rounded;
                bits |= unsigned(to_float(rounded) != 0) << i;
            }
            share.store(out, k, packs[k]);
            if (passed != nullptr) share.byte(passed, k) = bits;
        }
    });
}

// Normalize by mean and variance. Without them, null, x * weight + bias is what is made: weight is a scale then.
// passed is null where nobody asks what relu let through, kept_mean where mean may be kept as it is.
template <typename T, typename P, typename Moment, int WIDTH, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS, resident(WIDTH))
batch_norm_apply(const T* x, const T* residual, T* out, unsigned char* passed, const Moment* mean, const Moment* var,
                 Sum<T>* kept_mean, const P* weight, const P* bias, Sum<T>* inv_std, P* running_mean, P* running_var,
                 long long* batches, long long rows, long long channels, double eps, double momentum,
                 long long relu) {
    const Column<WIDTH> column(rows, channels);
    Affine<Sum<T>, WIDTH> affine;
    Sum<T> variance[WIDTH];
    load_vector(affine.center, mean, column, Sum<T>(0));
    load_vector(variance, var, column, Sum<T>(0));
    if (var != nullptr) {
        const Statistics<Sum<T>, P> statistics{kept_mean, inv_std, running_mean, running_var, batches, momentum};
        normalize(affine, variance, weight, bias, eps, statistics, column);
    } else {
        load_vector(affine.scale, weight, column, Sum<T>(1));
        load_vector(affine.shift, bias, column, Sum<T>(0));
    }
    apply_affine<RESIDUAL>(affine, x, residual, out, passed, relu != 0, column);
}

// All of it where rows are few: one block for its channels.
template <typename T, typename P, int WIDTH, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS, 2)
batch_norm_whole(const T* x, const T* residual, T* out, unsigned char* passed, Sum<T>* mean, const P* weight,
                 const P* bias, Sum<T>* inv_std, P* running_mean, P* running_var, long long* batches, long long rows,
                 long long channels, double eps, double momentum, long long relu) {
    __shared__ Moments<Sum<T>> shared[WIDTH][THREADS];
    const Column<WIDTH> column(rows, channels);
    Moments<Sum<T>> moments[WIDTH];
    gather_moments(moments, x, column);
    merge_rows(moments, shared);
    Affine<Sum<T>, WIDTH> affine;
    Sum<T> variance[WIDTH];
    load_vector(affine.center, x, column, Sum<T>(0));  // the first row
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        affine.center[i] += moments[i].mean;
        variance[i] = moments[i].squares / moments[i].count;
    }
    const Statistics<Sum<T>, P> statistics{mean, inv_std, running_mean, running_var, batches, momentum};
    normalize(affine, variance, weight, bias, eps, statistics, column);
    apply_affine<RESIDUAL>(affine, x, residual, out, passed, relu != 0, column);
}

// ---- backward --------------------------------------------------------------------------------------------------

// Set to 0 what relu did not let through.
template <bool RELU, typename T, int WIDTH>
DEVICE void gate(Pack<T, WIDTH>& pack, unsigned bits) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        if (RELU && !(bits >> i & 1)) pack.values[i] = from_float<T>(0);
    }
}

// Add up the thread's rows, from the last one on: what was written last may still be in the L2 cache. With relu
// grad counts where it passed; what counts is written to `gated`, unless that is null.
template <bool RELU, typename T, int WIDTH>
DEVICE void gather_grad_sums(GradSums<Sum<T>> (&sums)[WIDTH], const Sum<T> (&center)[WIDTH], const T* grad, const T* x,
                             const unsigned char* passed, T* gated, const Column<WIDTH>& column) {
    constexpr int AT_ONCE = 2;
    for_each_share<AT_ONCE, true>(column, [&](const auto& share) {
        Pack<T, WIDTH> grads[AT_ONCE], packs[AT_ONCE];
        unsigned bits[AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
            grads[k] = share.load(grad, k);
            packs[k] = share.load(x, k);
            if (RELU) bits[k] = share.byte(passed, k);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
            gate<RELU>(grads[k], bits[k]);
            if (RELU && gated != nullptr) share.store(gated, k, grads[k]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                sums[i].add(to_float(grads[k].values[i]), to_float(packs[k].values[i]) - center[i]);
            }
        }
    });
}

template <bool RELU, typename T, int WIDTH>
DEVICE void apply_grad(const GradAffine<T, WIDTH>& affine, const T* grad, const T* x, const unsigned char* passed,
                       T* grad_x, const Column<WIDTH>& column) {
    constexpr int AT_ONCE = 2;
    for_each_share<AT_ONCE, false>(column, [&](const auto& share) {
        Pack<T, WIDTH> grads[AT_ONCE], packs[AT_ONCE];
        unsigned bits[AT_ONCE] = {};
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
            grads[k] = share.load(grad, k);
            packs[k] = share.load(x, k);
            if (RELU) bits[k] = share.byte(passed, k);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (!share.has(k)) continue;
            gate<RELU>(grads[k], bits[k]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                packs[k].values[i] = from_float<T>(
                    affine.of(to_float(grads[k].values[i]), to_float(packs[k].values[i]), i));
            }
            share.store(grad_x, k, packs[k]);
        }
    });
}

// Leave a block's sums in parts (gridDim.y, channels).
template <typename T, int WIDTH, bool RELU>
__global__ void __launch_bounds__(THREADS, resident(WIDTH))
batch_norm_grad_sums(const T* grad, const T* x, const unsigned char* passed, T* gated, const Sum<T>* mean,
                     GradSums<Sum<T>>* parts, long long rows, long long channels) {
    __shared__ GradSums<Sum<T>> shared[WIDTH][THREADS];
    const Column<WIDTH> column(rows, channels);
    Sum<T> center[WIDTH];
    load_vector(center, mean, column, Sum<T>(0));
    GradSums<Sum<T>> sums[WIDTH] = {};
    gather_grad_sums<RELU>(sums, center, grad, x, passed, gated, column);
    merge_rows(sums, shared);
    if (threadIdx.y != 0 || !column.inside) return;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) parts[blockIdx.y * channels + column.channel + i] = sums[i];
}

// Make the gradients by weight and bias of all blocks' parts: in S to go on with, and in the parameters' type.
template <typename S, typename P>
__global__ void __launch_bounds__(THREADS)
batch_norm_grad_merge(const GradSums<S>* parts, const S* inv_std, S* sums, P* grad_weight, P* grad_bias,
                      long long blocks, long long channels) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    const GradSums<S> found = merge_blocks(parts, blocks, channels, channel);
    if (threadIdx.y != 0 || channel >= channels) return;
    const S by_weight = found.products * inv_std[channel];
    sums[channel] = found.total;
    sums[channels + channel] = by_weight;
    grad_weight[channel] = from_float<P>(Sum<P>(by_weight));
    grad_bias[channel] = from_float<P>(Sum<P>(found.total));
}

// sums (2, channels) are those of batch_norm_grad_merge.
template <typename T, typename P, int WIDTH, bool RELU>
__global__ void __launch_bounds__(THREADS, resident(WIDTH))
batch_norm_grad_apply(const T* grad, const T* x, const unsigned char* passed, const P* weight, const Sum<T>* mean,
                      const Sum<T>* inv_std, const Sum<T>* sums, T* grad_x, long long rows, long long channels) {
    const Column<WIDTH> column(rows, channels);
    GradAffine<T, WIDTH> affine;
    Sum<T> total[WIDTH], grad_weight[WIDTH], scale[WIDTH];
    load_vector(affine.center, mean, column, Sum<T>(0));
    load_vector(scale, inv_std, column, Sum<T>(0));
    load_vector(total, sums, column, Sum<T>(0));
    load_vector(grad_weight, sums + channels, column, Sum<T>(0));
    affine.set(total, grad_weight, scale, weight, column);
    apply_grad<RELU>(affine, grad, x, passed, grad_x, column);
}

// All of it where rows are few: one block for its channels.
template <typename T, typename P, int WIDTH, bool RELU>
__global__ void __launch_bounds__(THREADS, 2)
batch_norm_grad_whole(const T* grad, const T* x, const unsigned char* passed, T* gated, const P* weight,
                      const Sum<T>* mean, const Sum<T>* inv_std, P* grad_weight, P* grad_bias, T* grad_x,
                      long long rows, long long channels) {
    __shared__ GradSums<Sum<T>> shared[WIDTH][THREADS];
    const Column<WIDTH> column(rows, channels);
    GradAffine<T, WIDTH> affine;
    Sum<T> total[WIDTH], by_weight[WIDTH], scale[WIDTH];
    load_vector(affine.center, mean, column, Sum<T>(0));
    load_vector(scale, inv_std, column, Sum<T>(0));
    GradSums<Sum<T>> sums[WIDTH] = {};
    gather_grad_sums<RELU>(sums, affine.center, grad, x, passed, gated, column);
    merge_rows(sums, shared);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        total[i] = sums[i].total;
        by_weight[i] = sums[i].products * scale[i];
        if (threadIdx.y != 0 || !column.inside) continue;
        grad_weight[column.channel + i] = from_float<P>(Sum<P>(by_weight[i]));
        grad_bias[column.channel + i] = from_float<P>(Sum<P>(total[i]));
    }
    affine.set(total, by_weight, scale, weight, column);
    apply_grad<RELU>(affine, grad, x, passed, grad_x, column);
}
