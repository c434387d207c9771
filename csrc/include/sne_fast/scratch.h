// Scratch memory: one buffer, handed out front to back, with every piece aligned to a cache line.
#pragma once

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "sne_fast/isa.h"

namespace sne::SNE_ISA {

// Run the same sequence of take() calls twice: without memory to learn the size, then with memory to get the pieces.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(char *base) : base_(base) {}
  template <class T>
  T *take(long count) {
    const size_t at = size_;
    // One more line between pieces, as pieces of multiples of 4 KiB would all start in the same cache set otherwise.
    size_ += (size_t(count) * sizeof(T) + 63) / 64 * 64 + 64;
    return base_ ? reinterpret_cast<T *>(base_ + at) : nullptr;
  }
  size_t size() const { return size_ + 64; }

 private:
  char *base_ = nullptr;
  size_t size_ = 0;
};

// A buffer that lives as long as its thread, as small calls would spend their time in page faults otherwise.
struct ThreadBuffer {
  char *data = nullptr;
  size_t size = 0;
  ~ThreadBuffer() { free(data); }
  // Returns null if there is no memory. The contents are undefined.
  char *reserve(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = 0;
      data = static_cast<char *>(aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (data) size = bytes;
    }
    return data;
  }
  // Reserves what work.take(scratch, args...) asks for and lets it take that. Returns null if there is no memory.
  template <class Work, class... Args>
  char *lay_out(Work &work, const Args &...args) {
    Scratch need;
    work.take(need, args...);
    char *base = reserve(need.size());
    if (base) {
      Scratch scratch(base);
      work.take(scratch, args...);
    }
    return base;
  }
  // Gives a large buffer back to the system.
  void trim() {
    if (size > (size_t(32) << 20)) {
      free(data);
      data = nullptr;
      size = 0;
    }
  }
};

SNE_INLINE long min_of(long a, long b) { return a < b ? a : b; }
SNE_INLINE long max_of(long a, long b) { return a > b ? a : b; }

}  // namespace sne::SNE_ISA
