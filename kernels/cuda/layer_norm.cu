// Layer normalization along rows, and its gradients: what is read again stays in cache.
#include <rows.cuh>

DEVICE float inverse_root(float x) { return 1 / sqrtf(x); }
DEVICE double inverse_root(double x) { return 1 / sqrt(x); }

// An element of a vector, or `otherwise` where there is none.
template <typename T, typename Value>
DEVICE Value element_or(const T* vector, long long i, Value otherwise) {
    return vector == nullptr ? otherwise : Value(to_float(vector[i]));
}

// x and out (rows, length); weight and bias (length,) or null; mean and inv_std (rows,).
template <typename T, int THREADS>
__global__ void layer_norm(const T* x, const T* weight, const T* bias, double eps,
                           typename Accumulator<T>::type* mean, typename Accumulator<T>::type* inv_std, T* out,
                           long long rows, long long length) {
    typedef typename Accumulator<T>::type Value;
    const Team<THREADS> team;
    if (team.row >= rows) return;  // a whole warp or a whole block
    const T* row = x + team.row * length;
    Value total = 0;
    for_row<THREADS>(row, length, team.thread, [&](long long, Value value) { total += value; });
    const Value center = row_sum<THREADS>(total) / Value(length);
    Value squares = 0, distances = 0;  // whose sum is what rounding did to the mean
    for_row<THREADS>(row, length, team.thread, [&](long long, Value value) {
        squares += (value - center) * (value - center);
        distances += value - center;
    });
    const Value off = row_sum<THREADS>(distances) / Value(length);
    const Value variance = row_sum<THREADS>(squares) / Value(length) - off * off;
    const Value scale = inverse_root((variance < 0 ? Value(0) : variance) + Value(eps));
    fill_row<THREADS>(out + team.row * length, row, length, team.thread, [&](long long i, Value value) {
        return (value - center) * scale * element_or(weight, i, Value(1)) + element_or(bias, i, Value(0));
    });
    if (team.thread != 0) return;
    mean[team.row] = center;
    inv_std[team.row] = scale;
}

// by_x is inv_std * (g - mean(g) - normal * mean(g * normal)), of g = grad * weight and normal = (x - mean) * inv_std.
template <typename T, int THREADS>
__global__ void layer_norm_grad(const T* grad, const T* x, const T* weight, const typename Accumulator<T>::type* mean,
                                const typename Accumulator<T>::type* inv_std, T* by_x, long long rows,
                                long long length) {
    typedef typename Accumulator<T>::type Value;
    const Team<THREADS> team;
    if (team.row >= rows) return;
    const long long start = team.row * length;
    const Value center = mean[team.row], scale = inv_std[team.row];
    Value total = 0, along = 0;
    for_row<THREADS>(grad + start, x + start, length, team.thread, [&](long long i, Value slope, Value value) {
        const Value weighted = slope * element_or(weight, i, Value(1));
        total += weighted;
        along += weighted * ((value - center) * scale);
    });
    total = row_sum<THREADS>(total) / Value(length);
    along = row_sum<THREADS>(along) / Value(length);
    fill_row<THREADS>(by_x + start, grad + start, x + start, length, team.thread,
                      [&](long long i, Value slope, Value value) {
                          const Value weighted = slope * element_or(weight, i, Value(1));
                          return scale * (weighted - total - (value - center) * scale * along);
                      });
}

constexpr int COLUMNS = 32;  // of a block, neighbours in memory
constexpr int LANES = 8;     // rows that a block adds at once

// parts (parts, 2, length): the sums over a part of the rows of grad * normal and of grad, the gradients by
// weight and bias.
template <typename T>
__global__ void layer_norm_sums(const T* grad, const T* x, const typename Accumulator<T>::type* mean,
                                const typename Accumulator<T>::type* inv_std, typename Accumulator<T>::type* parts,
                                long long rows, long long length) {
    typedef typename Accumulator<T>::type Value;
    __shared__ Value sums[2][LANES][COLUMNS];
    const int lane = threadIdx.x / COLUMNS, place = threadIdx.x % COLUMNS;
    const long long column = (long long)(blockIdx.x) * COLUMNS + place;
    const long long part = blockIdx.y, count = gridDim.y;
    Value by_weight = 0, by_bias = 0;
    if (column < length) {
        for (long long row = part * rows / count + lane; row < (part + 1) * rows / count; row += LANES) {
            const Value slope = to_float(grad[row * length + column]);
            by_weight += slope * ((to_float(x[row * length + column]) - mean[row]) * inv_std[row]);
            by_bias += slope;
        }
    }
    sums[0][lane][place] = by_weight;
    sums[1][lane][place] = by_bias;
    __syncthreads();
    if (lane >= 2 || column >= length) return;
    Value total = 0;
    for (int other = 0; other < LANES; ++other) total += sums[lane][other][place];
    parts[(part * 2 + lane) * length + column] = total;
}
