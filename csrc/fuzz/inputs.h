// Sizes, pointers and values taken from bytes, results that show whether they were written, and promises to keep.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>

#include "sne_fast/cpu_abi.h"

namespace fuzz {

inline void require(bool good, const char *what) {
  if (good) return;
  fprintf(stderr, "broken promise: %s\n", what);
  abort();
}

class Bytes {
 public:
  Bytes(const uint8_t *data, size_t size) : data_(data), left_(size) {}
  uint8_t next() { return left_ ? --left_, *data_++ : 0; }
  int64_t below(int64_t n) { return next() % n; }

 private:
  const uint8_t *data_;
  size_t left_;
};

// An array of exactly its size, so that AddressSanitizer sees the first access beyond it.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size), data_(new T[size_t(size)]) {}
  T *data() { return data_.get(); }
  int64_t size() const { return size_; }
  T &operator[](int64_t i) { return data_[size_t(i)]; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

template <class T>
T nan_of_all_bits() {
  T value;
  memset(&value, 0xff, sizeof(T));
  reinterpret_cast<uint8_t *>(&value)[sizeof(T) - 1] = 0x7f;
  return value;
}

template <class T>
T value_of(uint8_t byte) {
  switch (byte) {
    case 255: return nan_of_all_bits<T>();
    case 254: return T(NAN);
    case 253: return T(INFINITY);
    case 252: return -T(INFINITY);
    case 251: return T(1e6);
    case 250: return T(-1e6);
    case 249: return T(1e30);
    case 248: return T(1e-38);
    case 247: return T(1e4);
    default: return T(byte - 123) / 64;
  }
}

template <class T>
Array<T> values(Bytes &bytes, int64_t size) {
  Array<T> to(size);
  for (int64_t i = 0; i < size; ++i) to[i] = value_of<T>(bytes.next());
  return to;
}

// Moderate numbers drawn from a seed: bytes are better spent elsewhere.
template <class T>
Array<T> drawn(uint32_t seed, int64_t size, double spread, double mean = 0) {
  Array<T> to(size);
  for (int64_t i = 0; i < size; ++i) {
    seed = seed * 1664525u + 1013904223u;
    to[i] = T(mean + spread * (double(seed >> 8) / (1 << 23) - 1));
  }
  return to;
}

// Results before a call: a number that no kernel computes.
template <class T>
Array<T> unwritten(int64_t size) {
  Array<T> to(size);
  for (int64_t i = 0; i < size; ++i) to[i] = T(-12345.678);
  return to;
}
template <class T>
int64_t written(Array<T> &array) {
  int64_t count = 0;
  for (int64_t i = 0; i < array.size(); ++i) count += array[i] != T(-12345.678);
  return count;
}

// Pointers of sets of lengths below `limit`; with `raw`, some entries are replaced.
struct Pointers {
  Array<int64_t> ptr;
  int64_t rows;
  bool good = true;

  Pointers(Bytes &bytes, int64_t sets, int64_t limit, bool raw) : ptr(sets + 1), rows(0) {
    ptr[0] = 0;
    for (int64_t s = 0; s < sets; ++s) ptr[s + 1] = rows += bytes.below(limit);
    if (!raw) return;
    constexpr int64_t hostile[] = {-1, 1, INT64_MAX, INT64_MIN, int64_t(1) << 62, int64_t(1) << 32, 7, 1000000};
    for (int64_t k = bytes.below(3) + 1; k > 0; --k) ptr[bytes.below(sets + 1)] = hostile[bytes.below(8)];
    good = ptr[0] == 0 && ptr[sets] == rows;
    for (int64_t s = 0; s < sets; ++s) good = good && ptr[s] <= ptr[s + 1];
  }
  int64_t sets() const { return ptr.size() - 1; }
};

struct Shape {
  int64_t h, heads;
  bool known;  // whether there are kernels
  explicit Shape(Bytes &bytes) {
    constexpr int64_t widths[] = {32, 64, 32, 128, 48, 0, -32, 33};
    constexpr int64_t all_heads[] = {1, 2, 4, 8, 3, 0, -1, 16};
    h = widths[bytes.below(8)];
    heads = all_heads[bytes.below(8)];
    known = (h == 32 || h == 64 || h == 128) && heads > 0 && h % heads == 0 && h / heads >= 8 && h / heads <= 64 &&
            heads != 3;
  }
};

// Requires the status that an input deserves; returns whether it was computed.
inline bool judge(int status, bool good, int64_t results_written, const char *op) {
  require(status == (good ? SNE_FAST_OK : SNE_FAST_BAD_ARGUMENT), op);
  if (!good) require(results_written == 0, "a refused call writes nothing");
  return good;
}

template <class T>
bool moderate(T value) {
  return fabs(double(value)) <= 2;
}

}  // namespace fuzz
