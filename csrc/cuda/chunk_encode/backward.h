// Shared by the backward kernels of chunk_encode: what they pass to each other.
//
// A warp holds 16 rows. Gradients of rows are passed between kernels as floats, in the workspace `rows_grad`. The
// factors of the matrices' gradients are stored in `products (5, rows, h)`.
#pragma once

#include "cuda/chunk_encode/launch.h"
#include "cuda/tiles/feed_forward_backward.h"

namespace sne {

struct ChunkSpace {
  void *saved;       // real (4, rows, h): inputs of blocks 1 to 3 and of the pool
  float *rows_grad;  // (rows, h)
  void *products;    // real (5, rows, h)
};

inline ChunkSpace space_of(const sne_fast_cuda_chunk_space &s) { return {s.saved, (float *)s.rows_grad, s.products}; }

// Address of a warp's rows of the products, null if it has none.
template <class T>
struct ProductRows {
  T *at;
  int64_t plane;
  SNE_MEMBER T *of(int which) const { return at + which * plane; }
};

template <class T>
SNE_DEVICE ProductRows<T> product_rows(const ChunkSpace &space, bool there, int64_t row, int64_t rows, int width) {
  return {there ? (T *)space.products + row * width : nullptr, rows * width};
}

// Returns what stores factors, if there are rows.
template <class Op, class Shape>
SNE_DEVICE auto saving(const ProductRows<typename Op::Storage> &products) {
  return [=](Factor factor, const Rows16<Op>(&rows)[1][Shape::KT]) {
    if (products.at) save_rows<Op, Shape>(products.of(factor), rows);
  };
}

// Loads the gradient of a warp's rows, zeros where the warp has no bin.
template <int NT>
SNE_DEVICE void load_grad(Tile (&grad)[NT], const ChunkSpace &space, bool there, int64_t row) {
  SNE_UNROLL
  for (int j = 0; j < NT; ++j) grad[j] = there ? load_tile(space.rows_grad + row * 8 * NT + 8 * j, 8 * NT) : Tile{};
}

}  // namespace sne
