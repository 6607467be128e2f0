// A user's function of one element, applied to each: what `custom.py` puts before and after its text.
#pragma once
#include <elements.cuh>

// The i-th element of an array as its accumulator.
template <typename T> DEVICE typename Accumulator<T>::type element_of(const T* x, long long i) { return to_float(x[i]); }

// Defines the kernel `elementwise<T, T, ...>`: out[i] = function(x[i], ...), a T for out and one for each x.
#define ELEMENTWISE(function)                                                                        \
    template <typename T, typename... Inputs>                                                        \
    __global__ void elementwise(T* out, long long count, const Inputs*... inputs) {                  \
        const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;                        \
        if (i < count) out[i] = from_float<T>(function<typename Accumulator<T>::type>(element_of(inputs, i)...)); \
    }
