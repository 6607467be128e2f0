// Time on the device for the host: see CupyRuntime.seconds.
#include <instructions.cuh>

// Keeps the device busy for so many cycles of a multiprocessor.
__global__ void hold(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {
    }
}
