// Weighted sums of pixels along one axis of x (images, length, inner), into out (images, places, inner).
#include <elements.cuh>
#include <indices.cuh>

// positions and weights (places, taps), -1 where there is no pixel. A thread makes COUNT neighbours.
template <typename T, int COUNT>
__global__ void weigh(const T* x, const int* positions, const typename Accumulator<T>::type* weights,
                      T* out, long long length, long long places, long long taps, long long inner,
                      long long size) {
    typedef typename Accumulator<T>::type Sum;
    const long long element = thread_number() * COUNT;
    if (element >= size) return;
    const long long line = quotient(element, inner), image = quotient(line, places);
    const long long first = (line - image * places) * taps;
    const T* source = x + image * length * inner + (element - line * inner);
    Sum sums[COUNT] = {};
    for (int tap = 0; tap < int(taps); ++tap) {
        const int position = positions[first + tap];
        if (position < 0) continue;
        const Sum weight = weights[first + tap];
        const auto pack = *reinterpret_cast<const Pack<T, COUNT>*>(source + position * inner);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] += weight * to_float(pack.values[i]);
    }
    Pack<T, COUNT> rounded;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) rounded.values[i] = from_float<T>(sums[i]);
    *reinterpret_cast<Pack<T, COUNT>*>(out + element) = rounded;
}

// The same for pixels that are copied, not added up: positions (places,), inner and size in words.
template <typename Word>
__global__ void take_pixels(const Word* x, const int* positions, Word* out, long long length,
                            long long places, long long inner, long long size) {
    const long long element = thread_number();
    if (element >= size) return;
    const long long line = quotient(element, inner), image = quotient(line, places);
    const int position = positions[line - image * places];
    const Word* source = x + image * length * inner + (element - line * inner);
    out[element] = position < 0 ? Word{} : source[position * inner];
}
