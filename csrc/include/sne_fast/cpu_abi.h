/* The C interface of the CPU library: plain pointers and sizes in, a status code out, no torch and no Python.
 *
 * sne_fast/backends/cpu/library.py mirrors these structs with ctypes, field by field. Whoever changes one changes the
 * other and raises SNE_FAST_CPU_ABI, which is checked at load. All arrays are contiguous and row-major, of float or
 * double as `dtype` says. SNE_FAST_BF16 means operands of the large products rounded to bfloat16, with float sums,
 * where the instruction set is avx512_bf16 or amx_bf16: of arrays of float in chunk_encode, set_block and product_rate,
 * of arrays of bfloat16, but lse of float, in set_attention and segment_pool. Every call is reentrant, and its results
 * do not depend on `num_threads`. Sizes and pointers are checked before anything is read through them: what does not
 * fit is SNE_FAST_BAD_ARGUMENT, and nothing is written. The caller answers for the arrays having the sizes that it
 * states. */
#ifndef SNE_FAST_CPU_ABI_H
#define SNE_FAST_CPU_ABI_H

#include <stdint.h>

#define SNE_FAST_CPU_ABI 7

#if defined(_WIN32)
#define SNE_FAST_API __declspec(dllexport)
#else
#define SNE_FAST_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum sne_fast_dtype { SNE_FAST_F32 = 0, SNE_FAST_F64 = 1, SNE_FAST_F16 = 2, SNE_FAST_BF16 = 3 };

enum sne_fast_status {
  SNE_FAST_OK = 0,
  SNE_FAST_BAD_ARGUMENT = 1, /* sizes or pointers that do not fit together */
  SNE_FAST_NO_MEMORY = 2,
  SNE_FAST_BAD_DTYPE = 3,
  SNE_FAST_BAD_ISA = 4,    /* instruction set unknown, not compiled in, or not supported by this processor */
  SNE_FAST_INTERRUPTED = 5 /* `check` of the hooks has raised; results are not complete */
};

#define SNE_FAST_LONGEST_CHUNK 256

/* chunk_encode (docs/method.md 3.1): h = hidden, H = heads, N chunks, T tensors, V values. */
typedef struct {
  int64_t num_chunks, num_tensors, num_values, hidden, heads, element_rows, layer_norm, num_threads;
  const int64_t *chunk_ptr;  /* (N+1) */
  const int64_t *tensor_ptr; /* (T+1) */
  const void *values;        /* (V) */
  const void *row_code;      /* (T, h) */
  const void *element_code;  /* (element_rows, h) */
  const void *logit;         /* (2, H) */
  const void *basis;         /* (3, h) */
  const void *w_qkv;         /* (3, 3h, h) */
  const void *b_qkv;         /* (3, 3h) */
  const void *w_o;           /* (4, h, h) */
  const void *b_o;           /* (4, h) */
  const void *norm;          /* (4, 4, h), not read without layer_norm */
  const void *pool_query;    /* (H, h) */
} sne_fast_chunk_encode_args;

/* Gradients of the shapes of the inputs. All are written in full. */
typedef struct {
  const void *grad; /* (N, H, h) */
  void *values, *row_code, *element_code, *logit, *basis, *w_qkv, *b_qkv, *w_o, *b_o, *norm, *pool_query;
} sne_fast_chunk_encode_grads;

/* set_attention: set s has query rows q_ptr[s]:q_ptr[s+1] and key rows k_ptr[s]:k_ptr[s+1]. The backward does not read
 * `out` with SNE_FAST_BF16. */
typedef struct {
  int64_t num_sets, rows_q, rows_k, hidden, heads, num_threads;
  const int64_t *q_ptr, *k_ptr;
  const void *q, *k, *v; /* (rows, h) */
  void *out, *lse;       /* (rows_q, h), (rows_q, H); read by the backward */
} sne_fast_set_attention_args;

typedef struct {
  const void *grad; /* (rows_q, h) */
  void *q, *k, *v;  /* like the inputs */
} sne_fast_set_attention_grads;

/* segment_pool: out[s, a] = sum over rows i of segment s of softmax_i(logits[i, a]) x[i]. hidden is a multiple of 16,
 * of 32 with SNE_FAST_BF16. The backward does not read `out`. */
typedef struct {
  int64_t num_segments, rows, hidden, heads, num_threads;
  const int64_t *ptr;
  const void *x, *logits; /* (rows, h), (rows, A) */
  void *out, *lse;        /* (S, A, h), (S, A); the second is read by the backward */
} sne_fast_segment_pool_args;

typedef struct {
  const void *grad; /* (S, A, h) */
  void *x, *logits;
} sne_fast_segment_pool_grads;

#define SNE_FAST_WIDEST_ROW 1024

/* set_block: projections of rows of width dim_q and dim_k (multiples of 16, at most SNE_FAST_WIDEST_ROW), the attention
 * of set_attention, and a feed-forward layer (docs/method.md, Set blocks). The backward does not read `out`. With
 * SNE_FAST_BF16 products are of float where dim_q or dim_k is no multiple of 32, or rows are fewer than 256 in all. */
typedef struct {
  int64_t num_sets, rows_q, rows_k, dim_q, dim_k, hidden, heads, layer_norm, num_threads;
  const int64_t *q_ptr, *k_ptr;
  const void *q, *k;                 /* (rows_q, dim_q), (rows_k, dim_k) */
  const void *w_q, *b_q;             /* (h, dim_q), (h) */
  const void *w_k, *b_k, *w_v, *b_v; /* (h, dim_k), (h) */
  const void *w_o, *b_o;             /* (h, h), (h) */
  const void *norm;                  /* (4, h), not read without layer_norm */
  void *out;                         /* (rows_q, h) */
} sne_fast_set_block_args;

/* Gradients of the shapes of the inputs. All are written in full; norm not without layer_norm. */
typedef struct {
  const void *grad; /* (rows_q, h) */
  void *q, *k, *w_q, *b_q, *w_k, *b_k, *w_v, *b_v, *w_o, *b_o, *norm;
} sne_fast_set_block_grads;

/* gather_chunks: matrix t, of shape (shapes[2t], shapes[2t+1]) row-major of its own dtype, is written transposed,
 * divided by scale[t]. The backward writes the matrices' gradients (`matrices` in their dtypes) and scale_grad from
 * grad. */
typedef struct {
  int64_t num_matrices, num_values, num_threads;
  const int64_t *shapes; /* (T, 2) */
  const int32_t *dtypes; /* (T) sne_fast_dtype of every matrix */
  void *const *matrices; /* (T) read by the forward, written by the backward */
  const double *scale;   /* (T) */
  void *values;          /* (V) written by the forward, read by the backward */
  const void *grad;      /* (V) backward only */
  double *scale_grad;    /* (T) backward only */
} sne_fast_gather_chunks_args;

#define SNE_FAST_STATISTICS 23

/* tensor_statistics: tensor t has the values start[t]:start[t+1], which times scale[t] are its weights. A row of dims
 * holds out, in and kernel positions k, fan-in and fan-out, and 1 where kernel positions are outermost; in is 0 and k
 * is 1 for a tensor of fewer than two dimensions. */
typedef struct {
  int64_t num_tensors, num_values, num_threads;
  const int64_t *start; /* (T+1) */
  const int64_t *dims;  /* (T, 6) */
  const double *scale;  /* (T) */
  const void *values;   /* (V) */
  void *out;            /* (T, SNE_FAST_STATISTICS) */
} sne_fast_tensor_statistics_args;

SNE_FAST_API int sne_fast_cpu_abi(void);
SNE_FAST_API const char *sne_fast_cpu_status(int status);
/* Instruction set in use: "portable", "avx2", "avx512", "avx512_bf16" or "amx_bf16". Null or "" selects the best that
 * this processor runs. */
SNE_FAST_API const char *sne_fast_cpu_isa(void);
SNE_FAST_API int sne_fast_cpu_select_isa(const char *name);
/* Returns 1 if this processor and this build can run the instruction set. */
SNE_FAST_API int sne_fast_cpu_has_isa(const char *name);

/* Hooks into the caller's interpreter, all three or (null) none. With them, a function is to be called holding the
 * interpreter's lock: it gives the lock back with `release` while it computes and takes it with `acquire` before it
 * returns. The calling thread takes it about every 50 ms between tiles to call `check`, which runs handlers of signals;
 * where that returns anything but 0, the function returns SNE_FAST_INTERRUPTED. They are Python's PyEval_SaveThread,
 * PyEval_RestoreThread and PyErr_CheckSignals. */
typedef struct {
  void *(*release)(void);
  void (*acquire)(void *);
  int (*check)(void);
} sne_fast_cpu_hooks;
SNE_FAST_API void sne_fast_cpu_set_hooks(const sne_fast_cpu_hooks *hooks);

SNE_FAST_API int sne_fast_cpu_chunk_encode(int dtype, const sne_fast_chunk_encode_args *args, void *out);
SNE_FAST_API int sne_fast_cpu_chunk_encode_backward(int dtype, const sne_fast_chunk_encode_args *args,
                                                    const sne_fast_chunk_encode_grads *grads);
SNE_FAST_API int sne_fast_cpu_set_attention(int dtype, const sne_fast_set_attention_args *args);
SNE_FAST_API int sne_fast_cpu_set_attention_backward(int dtype, const sne_fast_set_attention_args *args,
                                                     const sne_fast_set_attention_grads *grads);
SNE_FAST_API int sne_fast_cpu_segment_pool(int dtype, const sne_fast_segment_pool_args *args);
SNE_FAST_API int sne_fast_cpu_segment_pool_backward(int dtype, const sne_fast_segment_pool_args *args,
                                                    const sne_fast_segment_pool_grads *grads);
SNE_FAST_API int sne_fast_cpu_set_block(int dtype, const sne_fast_set_block_args *args);
SNE_FAST_API int sne_fast_cpu_set_block_backward(int dtype, const sne_fast_set_block_args *args,
                                                 const sne_fast_set_block_grads *grads);
/* dtype is that of `values`: SNE_FAST_F32 or SNE_FAST_F64. */
SNE_FAST_API int sne_fast_cpu_gather_chunks(int dtype, const sne_fast_gather_chunks_args *args);
SNE_FAST_API int sne_fast_cpu_gather_chunks_backward(int dtype, const sne_fast_gather_chunks_args *args);
SNE_FAST_API int sne_fast_cpu_tensor_statistics(int dtype, const sne_fast_tensor_statistics_args *args);
SNE_FAST_API int sne_fast_cpu_product_rate(int dtype, int64_t rows, int64_t inner, int64_t columns, int64_t repeats,
                                           int64_t num_threads);

#ifdef __cplusplus
}
#endif
#endif
