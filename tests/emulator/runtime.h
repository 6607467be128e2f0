// What emulated device code asks of the GPU it believes to run on. runtime.cpp answers.
//
// A CUDA thread is a fiber: a stack of its own, all fibers on one thread of the CPU. Fibers change places
// only where threads must wait for each other, so a run can be repeated exactly.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace emulator {

// A place in the device source. As a default argument `Site::here()` is the caller's place.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Thread {
    uint3 index;  // in its block
    int rank;     // the same in one number
    int lane;     // in its warp
    int warp;
    uint32_t warp_epoch;  // how many __syncwarp of its warp were done when it last took part in one
};

extern Thread* current;
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern unsigned char* dynamic_shared;

// Ends the launch with this message; the first failure of a launch counts.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

void synchronize_block(Site site);
int count_block(bool predicate, Site site);  // waits as well; how many threads say true
void synchronize_warp(uint32_t mask, Site site);

// Replaces `size` bytes at value by those of lane `source`, when all lanes of mask have come; outside of
// 0..31 the value stays. A source that is not in mask is an error.
void shuffle(uint32_t mask, void* value, size_t size, int source, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);

// An atomic access is to come: for kernels whose accesses are watched.
void watch_atomic(void* pointer, int bytes, const void* caller);

void copy_async(void* destination, const void* source, int bytes, bool valid, Site site);
void commit_copies();
void wait_copies(int pending);

void load_matrices(uint32_t* fragment, const void* row, bool transposed, Site site);
void multiply_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site);
void multiply_float16(float* d, const uint32_t* a, const uint32_t* b, Site site);
void multiply_bfloat16(float* d, const uint32_t* a, const uint32_t* b, Site site);

// Products of a warpgroup. They are done when they are waited for where copies land at once, else at once:
// of work that overlaps wrongly one of the two shows. d has `blocks` of 8 columns.
enum class Elements { TF32, FLOAT16, BFLOAT16 };
void show_to_products();
void multiply_warpgroup(Elements elements, int blocks, float* d, const uint32_t* a_registers, uint64_t a,
                        uint64_t b, bool panels_b, Site site);
void commit_products(Site site);
void wait_products(int pending, Site site);

float float16_bits_to_float(uint16_t bits);
uint16_t float_to_float16_bits(float value);
uint16_t float_to_bfloat16_bits(float value);

uint32_t shared_address(const void* pointer);

// ---- what the generated source of one kernel hands over ------------------------------------------------

struct Launch {
    dim3 grid, block;
    size_t dynamic_bytes;
    unsigned char *static_begin, *static_end;  // the kernel's __shared__ variables
    bool watched;                              // the kernel was built to have its accesses watched
    void (*body)(void* context);               // runs one thread
    void* context;
};

// Returns whether the grid ran to its end; else `emulator_error()` says why not.
bool run(const Launch& launch);

// What a parameter of a kernel is: 'p' pointer, 'f' floating point, 'i' integer, 's' struct; its size; of
// a pointer also what it points to ('v' anything) and whether it may be written.
struct Parameter {
    char kind;
    int bytes;
    char target_kind;
    int target_bytes;
    bool target_is_const;
};

}  // namespace emulator
