// Rectifiers, elementwise on memory without gaps.
#include <elements.cuh>

constexpr int THREADS = 256;
constexpr int AT_ONCE = 4;  // packs of a thread, whose loads are under way together

// Calls visit(k, first element) for the packs of a thread; `packs` is how many there are in all.
template <int WIDTH, typename Visit>
DEVICE void for_each_pack(long long packs, Visit visit) {
    const long long first = (long long)(blockIdx.x) * (AT_ONCE * THREADS) + threadIdx.x;
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
        if (first + k * THREADS < packs) visit(k, (first + k * THREADS) * WIDTH);
    }
}

template <typename T, int WIDTH>
DEVICE Pack<T, WIDTH>& pack_at(T* array, long long element) {
    return *reinterpret_cast<Pack<T, WIDTH>*>(array + element);
}

template <typename T, int WIDTH>
DEVICE Pack<T, WIDTH> load_pack(const T* array, long long element) {
    return *reinterpret_cast<const Pack<T, WIDTH>*>(array + element);
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS) relu(const T* x, T* out, long long packs) {
    Pack<T, WIDTH> values[AT_ONCE];
    for_each_pack<WIDTH>(packs, [&](int k, long long at) { values[k] = load_pack<T, WIDTH>(x, at); });
    for_each_pack<WIDTH>(packs, [&](int k, long long at) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            if (to_float(values[k].values[i]) < 0) values[k].values[i] = from_float<T>(0);  // nan passes
        }
        pack_at<T, WIDTH>(out, at) = values[k];
    });
}

// grad where `out`, the result of relu, is not 0.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS) relu_grad(const T* grad, const T* out, T* grad_x, long long packs) {
    Pack<T, WIDTH> grads[AT_ONCE], gates[AT_ONCE];
    for_each_pack<WIDTH>(packs, [&](int k, long long at) {
        grads[k] = load_pack<T, WIDTH>(grad, at);
        gates[k] = load_pack<T, WIDTH>(out, at);
    });
    for_each_pack<WIDTH>(packs, [&](int k, long long at) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            if (to_float(gates[k].values[i]) == 0) grads[k].values[i] = from_float<T>(0);
        }
        pack_at<T, WIDTH>(grad_x, at) = grads[k];
    });
}
