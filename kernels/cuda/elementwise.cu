// Elementwise formulas, in one pass over memory without gaps.
#include <elements.cuh>
#include <indices.cuh>

constexpr int THREADS = 256;
// The 1 in __launch_bounds__ lets the compiler take registers; else it spills some for full occupancy.
constexpr int AT_ONCE = 4;  // packs of a thread, of all inputs together, whose loads are under way together

// Fills out with formula(x, y) of `count` elements, a thread PACKS times 16 bytes of them.
template <int PACKS, typename T, typename Formula>
DEVICE void for_pairs(const T* x, const T* y, T* out, long long count, Formula formula) {
    constexpr int WIDTH = 16 / sizeof(T);
    typedef Pack<T, WIDTH> Elements;
    const bool aligned = is_aligned(x) && is_aligned(y) && is_aligned(out);
    const long long packs = aligned ? count / WIDTH : 0;
    const long long first = (long long)(blockIdx.x) * (PACKS * THREADS) + threadIdx.x;
    Elements xs[PACKS], ys[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
        if (first + k * THREADS >= packs) continue;
        xs[k] = reinterpret_cast<const Elements*>(x)[first + k * THREADS];
        ys[k] = reinterpret_cast<const Elements*>(y)[first + k * THREADS];
    }
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
        if (first + k * THREADS >= packs) continue;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            T& value = xs[k].values[i];
            value = from_float<T>(formula(to_float(value), to_float(ys[k].values[i])));
        }
        reinterpret_cast<Elements*>(out)[first + k * THREADS] = xs[k];
    }
    // What fills no pack, or all of it.
    const long long threads = (long long)(gridDim.x) * THREADS;
    const long long thread = (long long)(blockIdx.x) * THREADS + threadIdx.x;
#pragma unroll 1
    for (long long i = packs * WIDTH + thread; i < count; i += threads) {
        out[i] = from_float<T>(formula(to_float(x[i]), to_float(y[i])));
    }
}

template <typename T, typename Formula>
DEVICE void of_one(const T* x, T* out, long long count, Formula formula) {
    for_pairs<AT_ONCE>(x, x, out, count, [=](auto x, auto) { return formula(x); });
}

template <typename T, typename Formula>
DEVICE void of_two(const T* x, const T* y, T* out, long long count, Formula formula) {
    for_pairs<AT_ONCE / 2>(x, y, out, count, formula);
}

DEVICE float exponential(float x) { return expf(x); }
DEVICE double exponential(double x) { return exp(x); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
DEVICE double hyperbolic_tangent(double x) { return tanh(x); }
DEVICE float error_function(float x) { return erff(x); }
DEVICE double error_function(double x) { return erf(x); }

// The standard normal distribution's function, and its density.
DEVICE float normal_below(float x) { return 0.5f * erfcf(x * -0.70710678f); }
DEVICE double normal_below(double x) { return 0.5 * erfc(x * -0.7071067811865476); }

template <typename Number>
DEVICE Number normal_density(Number x) {
    return Number(0.3989422804014327) * exponential(Number(-0.5) * x * x);
}

// 1 / (1 + exp(-x)), in terms of exp(-|x|), which does not overflow.
template <typename Number>
DEVICE Number logistic(Number x) {
    const Number decay = exponential(x < 0 ? x : -x);
    return (x < 0 ? decay : Number(1)) / (1 + decay);
}

template <typename Number>
DEVICE Number gelu_inner(Number x) {
    return Number(0.7978845608028654) * (x + Number(0.044715) * (x * x * x));
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) relu_elements(const T* x, T* out, long long count) {
    of_one(x, out, count, [](auto x) { return x < 0 ? decltype(x)(0) : x; });  // nan passes
}

// grad where `out`, the result of relu, is not 0.
template <typename T>
__global__ void __launch_bounds__(THREADS, 1) relu_grad_elements(const T* grad, const T* out, T* by_x, long long count) {
    of_two(grad, out, by_x, count, [](auto grad, auto out) { return out == 0 ? decltype(grad)(0) : grad; });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) erf_elements(const T* x, T* out, long long count) {
    of_one(x, out, count, [](auto x) { return error_function(x); });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) sigmoid_elements(const T* x, T* out, long long count) {
    of_one(x, out, count, [](auto x) { return logistic(x); });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) sigmoid_grad_elements(const T* grad, const T* out, T* by_x, long long count) {
    of_two(grad, out, by_x, count, [](auto grad, auto out) { return grad * (out - out * out); });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) tanh_grad_elements(const T* grad, const T* out, T* by_x, long long count) {
    of_two(grad, out, by_x, count, [](auto grad, auto out) { return grad - grad * out * out; });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) silu_elements(const T* x, T* out, long long count) {
    of_one(x, out, count, [](auto x) { return x * logistic(x); });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) silu_grad_elements(const T* grad, const T* x, T* by_x, long long count) {
    of_two(grad, x, by_x, count, [](auto grad, auto x) {
        const auto share = logistic(x);
        return grad * (share * (1 + x * (1 - share)));
    });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) gelu_elements(const T* x, T* out, long long count) {
    of_one(x, out, count, [](auto x) { return x * normal_below(x); });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) gelu_grad_elements(const T* grad, const T* x, T* by_x, long long count) {
    of_two(grad, x, by_x, count, [](auto grad, auto x) {
        return grad * (normal_below(x) + x * normal_density(x));
    });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) gelu_tanh_elements(const T* x, T* out, long long count) {
    of_one(x, out, count, [](auto x) {
        return decltype(x)(0.5) * x * (1 + hyperbolic_tangent(gelu_inner(x)));
    });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) gelu_tanh_grad_elements(const T* grad, const T* x, T* by_x, long long count) {
    of_two(grad, x, by_x, count, [](auto grad, auto x) {
        typedef decltype(x) Number;
        const Number curve = hyperbolic_tangent(gelu_inner(x));
        const Number slope = Number(0.7978845608028654) * (1 + Number(3 * 0.044715) * (x * x));
        return grad * (Number(0.5) * (1 + curve) + Number(0.5) * x * ((1 - curve * curve) * slope));
    });
}
