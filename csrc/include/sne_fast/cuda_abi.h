/* The C interface of the CUDA library: device pointers and sizes in, a status code out, no torch and no Python.
 *
 * sne_fast/backends/cuda/library.py mirrors these structs with ctypes, field by field. Whoever changes one changes the
 * other and raises SNE_FAST_CUDA_ABI, which is checked at load. All arrays are contiguous and row-major. "real" is
 * float or a half type, as `precision` says; sums and softmax are float throughout. No function waits for the device,
 * allocates, or keeps state: the caller passes workspaces. */
#ifndef SNE_FAST_CUDA_ABI_H
#define SNE_FAST_CUDA_ABI_H

#include <stdint.h>

#define SNE_FAST_CUDA_ABI 4
#define SNE_FAST_CUDA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Type of arrays, and precision of float products. */
enum sne_fast_precision {
  SNE_FAST_PRECISION_FLOAT = 0, /* float32, three TF32 products for one */
  SNE_FAST_PRECISION_TF32 = 1,  /* float32, products rounded to TF32 */
  SNE_FAST_PRECISION_HALF = 2,
  SNE_FAST_PRECISION_BFLOAT = 3
};

/* 0 for success; positive numbers are a cudaError_t, or 999 from the emulator. */
enum sne_fast_cuda_status {
  SNE_FAST_CUDA_OK = 0,
  SNE_FAST_CUDA_BAD_ARGUMENT = -1, /* sizes that do not fit together */
  SNE_FAST_CUDA_BAD_VARIANT = -2   /* width, heads or type that has no kernel, or does not fit in shared memory */
};

SNE_FAST_CUDA_API int sne_fast_cuda_abi(void);
SNE_FAST_CUDA_API const char *sne_fast_cuda_status(int status);
/* Architectures of the build, such as "80+ptx 90a compute_120": a cubin and PTX for 80, a cubin for 90a, PTX alone for
 * 120. "emulated" for the host build. */
SNE_FAST_CUDA_API const char *sne_fast_cuda_architectures(void);
/* CUDA version of the build, and the newest that the driver here supports: 13000 for 13.0, 0 for none. */
SNE_FAST_CUDA_API int sne_fast_cuda_runtime_version(void);
SNE_FAST_CUDA_API int sne_fast_cuda_driver_version(void);
/* Sets the order in which emulated threads run: 0 as numbered, else drawn with this seed. Does nothing on a GPU. */
SNE_FAST_CUDA_API void sne_fast_cuda_emulated_schedule(uint64_t seed);

/* chunk_encode (docs/method.md 3.1). First the weights are prepared, then each class of chunk lengths has launches of
 * its own. h = hidden, H = heads, N chunks. */
typedef struct {
  int64_t hidden, heads, backward;      /* backward: 1 to prepare the transposes too */
  const void *w_qkv, *w_o, *pool_query; /* (3, 3h, h), (4, h, h), (H, h) */
  void *prepared;                       /* real, as many as sne_fast_cuda_chunk_weights_size says */
} sne_fast_chunk_weights_args;

SNE_FAST_CUDA_API int64_t sne_fast_cuda_chunk_weights_size(int64_t hidden, int64_t heads);
SNE_FAST_CUDA_API int sne_fast_cuda_chunk_weights(int precision, const sne_fast_chunk_weights_args *args, void *stream);

typedef struct {
  int64_t hidden, heads, layer_norm;
  int64_t slots, min_length, max_length, multi_chunk; /* the class: see csrc/cuda/chunk_encode/slots.h */
  int64_t bins, first_bin, count;        /* at least the bins of the class; the first and how many of this launch */
  int64_t multiprocessors, shared_limit; /* bytes of shared memory that a thread block may have */
  int64_t wgmma;                         /* 1 to use wgmma where there is such a kernel (compute capability 9.0) */
  const int64_t *chunk_ptr, *order, *owner, *table; /* (N+1), (N), (N), (274) */
  const void *values, *row_code, *element_code, *logit, *basis, *b_qkv, *b_o, *norm, *pool_query, *prepared;
} sne_fast_cuda_chunk_args;

/* Writes out (N, H, h) or, if that is null, saved (4, count * slots, h): the inputs of blocks 1 to 3 and of the pool.
 *
 * A launch may have more bins than its chunks fill. It is full if both slots and min_length are 32: then one chunk of
 * 32 elements fills each bin, or none does and nothing is written for it. Its rows, and in the backward their
 * gradients, are 16 bits each, in pieces of 16 x 16 (csrc/cuda/chunk_encode/full_backward.h), and there must be such a
 * kernel for its backward.
 *
 * With count 0 this and the kernels of the backward only return whether they could run, and follow no pointer. */
SNE_FAST_CUDA_API int sne_fast_cuda_chunk_encode(int precision, const sne_fast_cuda_chunk_args *args, void *out,
                                                 void *saved, void *stream);

/* Workspace of the backward for the rows (count * slots) of one launch. Its kernels run in this order: the pool, then
 * for blocks 3, 2, 1 the block and its matrices (the codes after block 2), then block 0 and its matrix; in full
 * launches the kernels of blocks take their matrices along. Sums over chunks are added to tables (*_part) with a row
 * for each thread block, of which there are at most `multiprocessors`. */
typedef struct {
  void *saved;     /* real (4, rows, h), from sne_fast_cuda_chunk_encode */
  void *rows_grad; /* float (rows, h), in and out; real in full launches */
  void *products;  /* real (5, rows, h); not in full launches */
} sne_fast_cuda_chunk_space;

/* Gradients of a block; but for the first of them only full launches write here. */
typedef struct {
  void *norm_part;  /* float (multiprocessors, 4, h) */
  void *w_qkv_part; /* (multiprocessors, 3, h, h) */
  void *b_qkv_part; /* (multiprocessors, 3, h) */
  void *w_o_part;   /* (multiprocessors, h, h) */
  void *b_o_part;   /* (multiprocessors, h) */
} sne_fast_cuda_chunk_block_grads;

SNE_FAST_CUDA_API int sne_fast_cuda_chunk_block_backward(int precision, const sne_fast_cuda_chunk_args *args,
                                                         const sne_fast_cuda_chunk_space *space, int64_t block,
                                                         const sne_fast_cuda_chunk_block_grads *grads, void *stream);

/* Thread blocks per multiprocessor of the pool's backward, which is bound by memory. */
#define SNE_FAST_CUDA_POOL_BLOCKS 4
/* grad (N, H, h), real; query_part: float (SNE_FAST_CUDA_POOL_BLOCKS * multiprocessors, H, h). */
SNE_FAST_CUDA_API int sne_fast_cuda_chunk_pool_backward(int precision, const sne_fast_cuda_chunk_args *args,
                                                        const sne_fast_cuda_chunk_space *space, const void *grad,
                                                        float *query_part, void *stream);

/* Sums rows_grad: writes chunk_grad, float (N, h), and adds to element_part, float (multiprocessors, codes, h). */
SNE_FAST_CUDA_API int sne_fast_cuda_chunk_codes_backward(int precision, const sne_fast_cuda_chunk_args *args,
                                                         const sne_fast_cuda_chunk_space *space, int64_t codes,
                                                         float *chunk_grad, float *element_part, void *stream);

typedef struct {
  void *values;     /* real (V), written */
  void *logit_part; /* float (multiprocessors, 2, H), like the next two */
  void *basis_part; /* (multiprocessors, 3, h) */
  void *norm_part;  /* (multiprocessors, 4, h) */
  void *w_o_part;   /* (multiprocessors, h, h); this and the next one only in full launches */
  void *b_o_part;   /* (multiprocessors, h) */
} sne_fast_cuda_chunk_scalar_grads;

SNE_FAST_CUDA_API int sne_fast_cuda_chunk_scalar_backward(int precision, const sne_fast_cuda_chunk_args *args,
                                                          const sne_fast_cuda_chunk_space *space,
                                                          const sne_fast_cuda_chunk_scalar_grads *grads, void *stream);

/* Gradients of the matrices of the block whose backward has just run, of launches that are not full, and of set_block
 * as block 1 with its rows as `saved`; of block 0 of fc_o alone. */
typedef struct {
  int64_t hidden, rows, block, multiprocessors;
  const void *saved, *products;
  void *w_qkv_part; /* float (multiprocessors, 3, h, h), like the next three */
  void *b_qkv_part; /* (multiprocessors, 3, h) */
  void *w_o_part;   /* (multiprocessors, h, h) */
  void *b_o_part;   /* (multiprocessors, h) */
} sne_fast_cuda_chunk_weight_grad_args;

SNE_FAST_CUDA_API int sne_fast_cuda_chunk_weight_grad(int precision, const sne_fast_cuda_chunk_weight_grad_args *args,
                                                      void *stream);

/* out[s] = sum of the rows of x in segment s, all float. partial: workspace (rows / 256 + segments, width). width must
 * divide 256. */
typedef struct {
  int64_t rows, segments, width;
  const int64_t *ptr; /* (segments + 1) */
  const void *x;
  void *partial, *out;
} sne_fast_segment_sum_args;

SNE_FAST_CUDA_API int sne_fast_cuda_segment_sum(const sne_fast_segment_sum_args *args, void *stream);

/* Attention between packed sets. A kernel's own rows are those its warps keep in registers, its inner rows those they
 * loop over: queries and keys in the forward and for the gradient of q, keys and queries for the gradients of k and v.
 */
struct sne_fast_cuda_set_attention_args {
  int64_t sets, width, heads, precision;
  int64_t warps;            /* 1, 2 or 4 warps that work on a tile of 16 * warps own rows of a set and head together */
  int64_t one_tile_per_set; /* 1: no set has more own rows than a tile, so that pieces are sets */
  int64_t split_rows;       /* 0, or a power of two: pieces are splits of so many inner rows, with all own rows */
  int64_t pieces; /* sets if one_tile_per_set, else rows / size + sets: own rows by tile, or inner rows by split */
  int64_t aligned_splits;       /* with split_rows: inner rows / split_rows, rounded down */
  int64_t max_own_rows;         /* own rows of the largest set */
  const void *q, *k, *v;        /* real (queries, width) and (keys, width), aligned to 16 bytes like all below */
  const int64_t *q_ptr, *k_ptr; /* (sets + 1) */
  void *out;                    /* real (queries, width): written by the forward */
  float *lse;                   /* (queries, heads): likewise */
  const void *grad;             /* real (queries, width), of out */
  float *mean; /* (queries, heads): subtracted from the gradient of weights; written with dq, read for dk, dv */
  void *grad_q, *grad_k, *grad_v; /* real */
  /* With split_rows: (2 (aligned_splits + 1), max_own_rows, width), the same (not in the forward), and
   * (2 (aligned_splits + 1), max_own_rows, heads). */
  float *partial, *partial_second, *partial_rows;
};

SNE_FAST_CUDA_API int sne_fast_cuda_set_attention(const struct sne_fast_cuda_set_attention_args *args, void *stream);
/* Writes mean and grad_q. */
SNE_FAST_CUDA_API int sne_fast_cuda_set_attention_query_grad(const struct sne_fast_cuda_set_attention_args *args,
                                                             void *stream);
/* Reads mean; writes grad_k and grad_v. */
SNE_FAST_CUDA_API int sne_fast_cuda_set_attention_key_grad(const struct sne_fast_cuda_set_attention_args *args,
                                                           void *stream);

/* set_block: whole attention blocks of rows that attend to each other inside sets, of width 32 or 64. Keys and values
 * of a set are computed again for every 64 of its rows, so sets should be short.
 *
 * Arrays are aligned to 16 bytes. With rows 0 the functions only return whether they could run, and follow no pointer.
 */
typedef struct {
  int64_t rows, width, heads, layer_norm;
  int64_t multiprocessors, shared_limit; /* bytes of shared memory that a thread block may have */
  const void *x;                         /* real (rows, h) */
  const int64_t *ptr, *owner;            /* (sets + 1), and the set of each row (rows) */
  /* real (h, h) and (h); the bias of the keys is constant in the softmax */
  const void *w_q, *b_q, *w_k, *w_v, *b_v, *w_o, *b_o;
  const void *norm; /* (4, h) */
  void *out;        /* real (rows, h): written by the forward */
  const void *grad; /* real (rows, h), of out */
  /* Written by the first kernel of the backward but for two planes of the factors, which the second one writes. */
  void *factors;    /* real (5, rows, h): `products` of sne_fast_cuda_chunk_weight_grad */
  void *sum_grad;   /* real (rows, h), of the residual sum */
  float *numbers;   /* (rows, heads, 2): lse in base 2 and mean of the weights' gradients */
  float *norm_part; /* (SNE_FAST_CUDA_SET_BLOCKS * multiprocessors, 4, h): a row for each thread block, added to */
  void *x_grad;     /* real (rows, h): written by the second kernel */
} sne_fast_cuda_set_block_args;

/* Thread blocks per multiprocessor of the backward, at most. */
#define SNE_FAST_CUDA_SET_BLOCKS 2
SNE_FAST_CUDA_API int sne_fast_cuda_set_block(int precision, const sne_fast_cuda_set_block_args *args, void *stream);
SNE_FAST_CUDA_API int sne_fast_cuda_set_block_query_grad(int precision, const sne_fast_cuda_set_block_args *args,
                                                         void *stream);
SNE_FAST_CUDA_API int sne_fast_cuda_set_block_key_grad(int precision, const sne_fast_cuda_set_block_args *args,
                                                       void *stream);

/* out[i] = part[0][i] + part[1][i] + ..., rounded to real: up to SNE_FAST_CUDA_TABLES tables by one launch. */
typedef struct {
  int64_t rows, stride, size;
  const float *part; /* rows of `size` values, `stride` apart */
  void *out;         /* real (size) */
} sne_fast_cuda_table;
#define SNE_FAST_CUDA_TABLES 9
SNE_FAST_CUDA_API int sne_fast_cuda_sum_tables(int precision, int64_t count, const sne_fast_cuda_table *tables,
                                               void *stream);

/* gather_chunks: writes matrices (R, K), each as its transpose (K, R) divided by its scale, one behind another.
 *
 * `table` (fields, stride), int64 on the device, describes T matrices that are not empty, with a row for each field
 * below. A tile is tile_rows x tile_columns of a matrix: at most 4096 values, at most 64 in one direction or all of it.
 * Tiles are counted row by row of tiles, matrix after matrix. */
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
  void *values;     /* result of the forward call, input of the backward call */
  const void *grad; /* backward, like the rest; as far from a multiple of 16 bytes as values */
  void *parts;      /* (tiles,) workspace */
  void *grad_scale; /* (T,), by place */
} sne_fast_cuda_gather;
SNE_FAST_CUDA_API int sne_fast_cuda_gather_chunks(const sne_fast_cuda_gather *, void *stream);
SNE_FAST_CUDA_API int sne_fast_cuda_gather_chunks_backward(const sne_fast_cuda_gather *, void *stream);

/* segment_pool: softmax over the rows of each segment, and weighted sums of them.
 *
 * A segment counts as one item per row and `queries` more. A thread block has per_block items (at most 16320), so
 * blocks = ceil((rows + queries sets) / per_block). x (rows, width) real, width a multiple of 16; logits (rows,
 * queries) real; ptr (sets + 1,) int64; out (sets, queries, width) real; lse (sets, queries) float. Arrays are aligned
 * to 16 bytes. Workspace of the forward: part (2 blocks, queries, width) and part_state (2 blocks, queries, 2), float.
 * Backward: grad like out, grad_x and grad_logits like x and logits; workspace weights_grad (rows, queries) and
 * part_mean (2 blocks, queries), float. */
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
