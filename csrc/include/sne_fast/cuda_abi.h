/* The C interface of the CUDA engine: device pointers and sizes in, a status code out, no torch and no Python.
 *
 * The structs are mirrored with ctypes in sne_fast/_cuda/library.py, field by field: change one and you change the other
 * and raise SNE_FAST_CUDA_ABI, which is checked at load. All arrays are contiguous and row-major. "real" is float or a
 * half type, as `precision` says; sums and softmax are float throughout. Nothing here waits for the device, allocates,
 * or keeps state: what a call needs besides its results is a workspace of the caller's. */
#ifndef SNE_FAST_CUDA_ABI_H
#define SNE_FAST_CUDA_ABI_H

#include <stdint.h>

#define SNE_FAST_CUDA_ABI 1
#define SNE_FAST_CUDA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Type of arrays, and how exact products of float are. */
enum sne_fast_precision {
  SNE_FAST_PRECISION_FLOAT = 0, /* float32, three TF32 products for one */
  SNE_FAST_PRECISION_TF32 = 1,  /* float32, products rounded to TF32 */
  SNE_FAST_PRECISION_HALF = 2,
  SNE_FAST_PRECISION_BFLOAT = 3
};

/* 0: done; above: a cudaError_t, or 999 from the emulator. */
enum sne_fast_cuda_status {
  SNE_FAST_CUDA_OK = 0,
  SNE_FAST_CUDA_BAD_ARGUMENT = -1, /* sizes that do not fit together */
  SNE_FAST_CUDA_BAD_VARIANT = -2   /* width, heads or type that this build has no kernel for */
};

SNE_FAST_CUDA_API int sne_fast_cuda_abi(void);
SNE_FAST_CUDA_API const char *sne_fast_cuda_status(int status);
/* What it was compiled for, such as "80 90a 100a 120+ptx"; "emulated" for the host build. */
SNE_FAST_CUDA_API const char *sne_fast_cuda_architectures(void);
/* Order in which emulated threads run: 0 as numbered, else drawn by this seed. Nothing on a GPU. */
SNE_FAST_CUDA_API void sne_fast_cuda_emulated_schedule(uint64_t seed);

/* gather_chunks: matrices (R, K), each written as its transpose (K, R) over its scale, one behind another.
 *
 * `table` (fields, stride) int64 on the device describes T matrices that are not empty, a row for each field below. A
 * tile is a block of tile_rows x tile_columns of a matrix, at most 4096 values, at most 64 of them side by side in one
 * direction, or all of one direction; tiles are counted row by row of tiles, matrix after matrix. */
enum sne_fast_gather_field {
  SNE_FAST_GATHER_FIRST_TILE = 0,
  SNE_FAST_GATHER_ADDRESS = 1, /* of the matrix (backward: of its gradient), a multiple of its type's size */
  SNE_FAST_GATHER_TYPE = 2,
  SNE_FAST_GATHER_ROWS = 3,
  SNE_FAST_GATHER_COLUMNS = 4,
  SNE_FAST_GATHER_START = 5, /* in values */
  SNE_FAST_GATHER_PLACE = 6, /* in scale */
  SNE_FAST_GATHER_TILE_ROWS = 7,
  SNE_FAST_GATHER_TILE_COLUMNS = 8
};
enum sne_fast_gather_type {
  SNE_FAST_GATHER_FLOAT = 0,
  SNE_FAST_GATHER_DOUBLE = 1,
  SNE_FAST_GATHER_HALF = 2,
  SNE_FAST_GATHER_BFLOAT = 3
};
typedef struct {
  int64_t type;       /* of values and grad: a sne_fast_gather_type */
  int64_t wide_scale; /* 1: scale, parts and grad_scale are double, and backward computes in double */
  int64_t tensors, stride, tiles;
  const void *table, *scale;
  void *values;       /* result of the forward call, input of the backward call */
  const void *grad;   /* backward, like the rest; as far from a multiple of 16 bytes as values */
  void *parts;        /* (tiles,) workspace */
  void *grad_scale;   /* (T,), by place */
} sne_fast_cuda_gather;
SNE_FAST_CUDA_API int sne_fast_cuda_gather_chunks(const sne_fast_cuda_gather *, void *stream);
SNE_FAST_CUDA_API int sne_fast_cuda_gather_chunks_backward(const sne_fast_cuda_gather *, void *stream);

/* segment_pool: softmax over the rows of each segment, and weighted sums of them.
 *
 * A segment counts as its rows and `queries` more; a block has per_block such items (at most 16320), so that
 * blocks = ceil((rows + queries sets) / per_block). x (rows, width) real, width a multiple of 16, logits (rows,
 * queries) real, ptr (sets + 1,) int64, out (sets, queries, width) real, lse (sets, queries) float. Arrays begin at
 * multiples of 16 bytes. part (2 blocks, queries, width) and part_state (2 blocks, queries, 2) float: workspace of the
 * forward call.
 * Backward: grad as out, grad_x and grad_logits as x and logits, weights_grad (rows, queries) and part_mean
 * (2 blocks, queries) float workspace. */
typedef struct {
  int64_t rows, sets, width, queries, precision, per_block, blocks;
  const void *x, *logits;
  const int64_t *ptr;
  void *out;
  float *lse, *part, *part_state;
  const void *grad;
  void *grad_x, *grad_logits;
  float *weights_grad, *part_mean;
} sne_fast_cuda_pool;
SNE_FAST_CUDA_API int sne_fast_cuda_segment_pool(const sne_fast_cuda_pool *, void *stream);
SNE_FAST_CUDA_API int sne_fast_cuda_segment_pool_backward(const sne_fast_cuda_pool *, void *stream);

#ifdef __cplusplus
}
#endif
#endif
