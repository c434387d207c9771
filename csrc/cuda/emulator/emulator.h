// CUDA's threads on a host: one fiber each, switched where threads of a warp or block meet.
//
// For tests. Nothing runs at once, so the order of threads between two meetings can be chosen: with a schedule other
// than 0 it is drawn anew every round, and warps run ahead of others: a missing barrier shows as another result.
// Shared memory starts as NaN and ends at a page that nothing may touch; asynchronous copies are made at the last
// moment, when a thread waits for them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

namespace sne::emulator {

int thread();
int threads();
int64_t block(int axis);
int64_t blocks(int axis);
void *shared();

// All members arrive with an item each; the last one to come runs `act` on the items, then all go on.
void meet_warp(const char *name, void *item, void (*act)(void **items));
// 128 threads from a multiple of 128 on.
void meet_warpgroup(const char *name, void *item, void (*act)(void **items));
void meet_block(const char *name);
void meet_named(int barrier, int threads);

void copy_async(void *to, const void *from);
void copies_done();

// Runs `kernel` in every thread of every block, one block after the other. 0, or kFailed: see error().
constexpr int kFailed = 999;
int run(int64_t x, int64_t y, int threads, size_t shared, const std::function<void()> &kernel);
const char *error();
void schedule(uint64_t seed);

}  // namespace sne::emulator
