// Which element a thread makes, and where it lies.
#pragma once
#include <instructions.cuh>

// The number of this thread in a grid of one dimension.
DEVICE long long thread_number() { return (long long)(blockIdx.x) * blockDim.x + threadIdx.x; }

// dividend / divisor, neither negative. Dividing 64-bit numbers takes long, and few indices need them.
DEVICE long long quotient(long long dividend, long long divisor) {
    if ((dividend | divisor) >> 32 == 0) return uint32_t(dividend) / uint32_t(divisor);
    return dividend / divisor;
}

// Division of 0 <= n < 2^31 by a divisor known at launch: n / divisor == n * multiplier >> shift.
struct Divisor {
    int divisor;
    uint32_t multiplier;
    int shift;
};

DEVICE int divide(int n, const Divisor& by) { return int((uint64_t(uint32_t(n)) * by.multiplier) >> by.shift); }

// Whether a pointer fits accesses of 16 bytes.
DEVICE bool is_aligned(const void* pointer) { return reinterpret_cast<uint64_t>(pointer) % 16 == 0; }
