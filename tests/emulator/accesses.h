// Watches the accesses of a kernel that was built to be watched: for races, and for how many pieces the
// memory system cuts a warp's accesses into. Shared memory read before it is written is no error by itself:
// loops load ahead of their end. What is made of it is NaN.
#pragma once
#include "runtime.h"

namespace emulator {

void watch_launch();  // before the first block
void watch_block();   // before each block
void finish_block();  // after it

// Of asynchronous copies, which write shared memory at any time from being issued to being waited for.
void watch_issued_copy(void* destination, const void* source, int bytes, bool valid, const void* caller);
void watch_landed_copy(void* destination, int bytes, const void* caller);

// A row of 16 bytes that a warp loads as a part of a matrix.
void watch_row(const void* row, const void* caller);

// An access that others may make at the same time.
void watch_atomic(void* pointer, int bytes, const void* caller);

// ---- what runtime.cpp tells ----------------------------------------------------------------------------

extern uint32_t block_number;  // of the running block, from 0 on in the order they run
extern uint32_t block_epoch;   // how many barriers the block has passed
extern const Launch& running();

// Fails the launch; "@0x..." in the message are places in the kernel's library.
[[noreturn]] void fail_at(const void* caller, const char* format, ...) __attribute__((format(printf, 2, 3)));
size_t place(const void* caller);  // what follows the "@" for a return address

}  // namespace emulator
