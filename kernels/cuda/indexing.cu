// Adding and writing at positions that may repeat, always in one order. positions (count,) are sorted;
// order (count,) says which of the values (count,) belongs to each, in rising order within a position.
#include <indices.cuh>

// The first thread of a run, of equal positions, adds up all of it: in the order of the values, as a CPU does.
template <typename T>
__global__ void add_runs(T* out, const long long* positions, const long long* order, const T* values, long long count) {
    const long long first = thread_number();
    if (first >= count) return;
    const long long position = positions[first];
    if (first > 0 && positions[first - 1] == position) return;
    T sum = out[position];
    for (long long i = first; i < count && positions[i] == position; ++i) sum += values[order[i]];
    out[position] = sum;
}

// The last thread of a run writes.
template <typename Word>
__global__ void put_runs(Word* out, const long long* positions, const long long* order, const Word* values,
                         long long count) {
    const long long i = thread_number();
    if (i >= count || (i + 1 < count && positions[i + 1] == positions[i])) return;
    out[positions[i]] = values[order[i]];
}
