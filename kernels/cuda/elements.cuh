// The element types of arrays, how they are added up, and short vectors of them.
#pragma once
#include <instructions.cuh>

struct float16 { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

// The type in which elements of type T are added up and computed with.
template <typename T> struct Accumulator { typedef float type; };
template <> struct Accumulator<double> { typedef double type; };

DEVICE float to_float(float16 x) { return float16_bits_to_float(x.bits); }
DEVICE float to_float(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(float x) { return x; }
DEVICE double to_float(double x) { return x; }  // "float" is the accumulator of its kind

// Round a value of T's accumulator to T: to nearest, ties to even.
template <typename T> DEVICE T from_float(typename Accumulator<T>::type x) { return x; }

template <> DEVICE float16 from_float<float16>(float x) { return {float_to_float16_bits(x)}; }

template <> DEVICE bfloat16 from_float<bfloat16>(float x) { return {float_to_bfloat16_bits(x)}; }

// COUNT neighbours in memory, loaded and stored by one access where they fill 2 to 16 bytes.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T values[COUNT];
};
