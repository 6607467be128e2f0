// Sums of products that blocks have computed in slices, each of a part of the depth.
#include <elements.cuh>
#include <indices.cuh>

// A sum over slices is (lines, taps, channels), of which out takes used_taps taps from first_tap on, and of each
// the first used_channels channels: the others were filled up with zeros.
struct Part {
    long long taps, channels;
    long long first_tap, used_taps, used_channels;
};

// out (lines, used_taps, used_channels) = the sum of partials (slices, lines, taps, channels), always in the same
// order: ROWS threads add every ROWS-th slice, then their sums are added in turn. Blocks have 256 threads.
template <typename Sum, typename T, int ROWS>
__global__ void __launch_bounds__(256)
add_slices(const Sum* __restrict__ partials, T* __restrict__ out, const __grid_constant__ Part part, long long lines,
           long long slices) {
    constexpr int LANES = 256 / ROWS;
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    const long long element = (long long)blockIdx.x * LANES + lane;
    const long long tap = quotient(element, part.used_channels), line = quotient(tap, part.used_taps);
    const long long source = (line * part.taps + part.first_tap + tap - line * part.used_taps) * part.channels +
                             element - tap * part.used_channels;
    const long long pitch = lines * part.taps * part.channels;
    Sum sum = 0;
    if (line < lines) {
#pragma unroll 4
        for (long long slice = row; slice < slices; slice += ROWS) sum += partials[slice * pitch + source];
    }
    if constexpr (ROWS > 1) {
        Sum* const sums = dynamic_shared_memory<Sum>();  // (ROWS, LANES)
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (row != 0) return;
#pragma unroll
        for (int i = 1; i < ROWS; ++i) sum += sums[i * LANES + lane];
    }
    if (line < lines) out[element] = from_float<T>(sum);
}
