// Softmax cross entropy of rows of scores, and what their targets count for.
#include <rows.cuh>

// x (rows, classes), target and losses (rows,), shifts (rows, 2): maximum, logarithm of the sum of powers.
template <typename T, typename Target, int THREADS>
__global__ void softmax_cross_entropy(const T* x, const Target* target, T* losses,
                                      typename Accumulator<T>::type* shifts, long long rows,
                                      long long classes) {
    typedef typename Accumulator<T>::type Value;
    const Team<THREADS> team;
    if (team.row >= rows) return;  // a whole warp or a whole block
    const T* scores = x + team.row * classes;
    Value peak = to_float(scores[0]);
    for (long long i = team.thread; i < classes; i += THREADS) {
        const Value score = to_float(scores[i]);
        peak = score > peak ? score : peak;
    }
    peak = combine_row<THREADS>(peak, [](Value a, Value b) { return b > a ? b : a; });
    Value total = 0;
    for (long long i = team.thread; i < classes; i += THREADS) {
        total += exponential(to_float(scores[i]) - peak);
    }
    total = row_sum<THREADS>(total);
    if (team.thread != 0) return;
    const Value log_sum = logarithm(total);
    shifts[2 * team.row] = peak;
    shifts[2 * team.row + 1] = log_sum;
    losses[team.row] = from_float<T>(log_sum - (to_float(scores[target[team.row]]) - peak));
}

// grad and target (rows,), x and out (rows, classes), shifts (rows, 2).
template <typename T, typename Target, int THREADS>
__global__ void softmax_cross_entropy_grad(const T* grad, const T* x, const Target* target,
                                           const typename Accumulator<T>::type* shifts, T* out,
                                           long long rows, long long classes) {
    typedef typename Accumulator<T>::type Value;
    const Team<THREADS> team;
    if (team.row >= rows) return;
    const Value share = to_float(grad[team.row]);
    const Value peak = shifts[2 * team.row], log_sum = shifts[2 * team.row + 1];
    const long long hit = target[team.row];
    const T* scores = x + team.row * classes;
    for (long long i = team.thread; i < classes; i += THREADS) {
        const Value power = exponential(to_float(scores[i]) - peak - log_sum);
        out[team.row * classes + i] = from_float<T>(share * (power - Value(i == hit)));
    }
}

// What each target counts for: by its class's weight, or 1 where weight is null; not at all if it is ignore_index;
// nan where it is no class. Of the last two `safe` has class 0, of the others the target.
template <typename T, typename Target>
__global__ void class_scale(const Target* target, const T* weight, Target* safe, T* scale, long long count,
                            long long classes, long long ignore_index) {
    typedef typename Accumulator<T>::type Value;
    const long long i = (long long)(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const long long found = (long long)(target[i]);
    const bool ignored = found == ignore_index;
    const bool known = !ignored && found >= 0 && found < classes;
    safe[i] = Target(known ? found : 0);
    const Value zero = 0;
    const Value counted = weight == nullptr ? Value(1) : Value(to_float(weight[known ? found : 0]));
    scale[i] = from_float<T>(known ? counted : ignored ? zero : zero / zero);
}
