// Softmax and its logarithm along rows, and their gradients: what is read again stays in cache.
#include <rows.cuh>

// The largest element of a row, and the sum of exp(x - the largest).
template <typename T, int THREADS>
struct Powers {
    typename Accumulator<T>::type peak, total;

    DEVICE Powers(const T* x, long long length, int thread) {
        typedef typename Accumulator<T>::type Value;
        peak = to_float(x[0]);
        for_row<THREADS>(x, length, thread, [&](long long, Value value) { peak = value > peak ? value : peak; });
        peak = combine_row<THREADS>(peak, [](Value a, Value b) { return b > a ? b : a; });
        total = 0;
        for_row<THREADS>(x, length, thread, [&](long long, Value value) { total += exponential(value - peak); });
        total = row_sum<THREADS>(total);
    }
};

// x and out (rows, length).
template <typename T, int THREADS>
__global__ void softmax(const T* x, T* out, long long rows, long long length) {
    typedef typename Accumulator<T>::type Value;
    const Team<THREADS> team;
    if (team.row >= rows) return;  // a whole warp or a whole block
    const T* row = x + team.row * length;
    const Powers<T, THREADS> powers(row, length, team.thread);
    fill_row<THREADS>(out + team.row * length, row, length, team.thread, [&](long long, Value value) {
        return exponential(value - powers.peak) / powers.total;
    });
}

template <typename T, int THREADS>
__global__ void log_softmax(const T* x, T* out, long long rows, long long length) {
    typedef typename Accumulator<T>::type Value;
    const Team<THREADS> team;
    if (team.row >= rows) return;
    const T* row = x + team.row * length;
    const Powers<T, THREADS> powers(row, length, team.thread);
    const Value log_total = logarithm(powers.total);
    fill_row<THREADS>(out + team.row * length, row, length, team.thread, [&](long long, Value value) {
        return value - powers.peak - log_total;
    });
}

// grad, out and by_x (rows, length); out is softmax's.
template <typename T, int THREADS>
__global__ void softmax_grad(const T* grad, const T* out, T* by_x, long long rows, long long length) {
    typedef typename Accumulator<T>::type Value;
    const Team<THREADS> team;
    if (team.row >= rows) return;
    const long long start = team.row * length;
    Value total = 0;
    for_row<THREADS>(grad + start, out + start, length, team.thread,
                     [&](long long, Value slope, Value share) { total += slope * share; });
    total = row_sum<THREADS>(total);
    fill_row<THREADS>(by_x + start, grad + start, out + start, length, team.thread,
                      [&](long long, Value slope, Value share) { return slope * share - share * total; });
}

// out is log_softmax's.
template <typename T, int THREADS>
__global__ void log_softmax_grad(const T* grad, const T* out, T* by_x, long long rows, long long length) {
    typedef typename Accumulator<T>::type Value;
    const Team<THREADS> team;
    if (team.row >= rows) return;
    const long long start = team.row * length;
    Value total = 0;
    for_row<THREADS>(grad + start, length, team.thread, [&](long long, Value slope) { total += slope; });
    total = row_sum<THREADS>(total);
    fill_row<THREADS>(by_x + start, grad + start, out + start, length, team.thread,
                      [&](long long, Value slope, Value log) { return slope - exponential(log) * total; });
}
