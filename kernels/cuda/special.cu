// Special functions, element by element, in the order of memory.
#include <elements.cuh>
#include <indices.cuh>

DEVICE float error_function(float x) { return erff(x); }
DEVICE double error_function(double x) { return erf(x); }
DEVICE float exponential(float x) { return expf(x); }
DEVICE double exponential(double x) { return exp(x); }

// x and out hold `count` elements; a thread makes 16 bytes of them.
template <typename T, typename Function>
DEVICE void for_elements(const T* x, T* out, long long count, Function function) {
    constexpr int COUNT = 16 / sizeof(T);
    const long long first = thread_number() * COUNT;
    if (first + COUNT <= count && is_aligned(x) && is_aligned(out)) {
        Pack<T, COUNT> pack = *reinterpret_cast<const Pack<T, COUNT>*>(x + first);
#pragma unroll
        for (T& value : pack.values) value = from_float<T>(function(to_float(value)));
        *reinterpret_cast<Pack<T, COUNT>*>(out + first) = pack;
        return;
    }
    for (long long i = first; i < min(first + COUNT, count); ++i) out[i] = from_float<T>(function(to_float(x[i])));
}

template <typename T>
__global__ void erf_elements(const T* x, T* out, long long count) {
    for_elements(x, out, count, [](auto value) { return error_function(value); });
}

// In terms of exp(-|x|), which does not overflow.
template <typename T>
__global__ void sigmoid_elements(const T* x, T* out, long long count) {
    for_elements(x, out, count, [](auto value) {
        const auto decay = exponential(value < 0 ? value : -value);
        return (value < 0 ? decay : decltype(value)(1)) / (1 + decay);
    });
}
