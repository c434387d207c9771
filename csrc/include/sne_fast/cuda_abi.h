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

/* Attention between packed sets. A kernel's "own" rows are those its warps keep in registers, "inner" rows those they
 * loop over: queries and keys in the forward and for the gradient of q, keys and queries for those of k and v. */
struct sne_fast_cuda_set_attention_args {
  int64_t sets, width, heads, precision;
  int64_t warps;  /* 1, 2 or 4 that work on 16 * warps own rows of a set and head together */
  int64_t single; /* 1: no set has more own rows than those, so that pieces are sets */
  int64_t split;  /* 0, or a power of two: so many inner rows a piece, and all own rows of a set are in one */
  int64_t pieces; /* sets if single, else rows / size + sets, where size is 16 * warps own or `split` inner rows */
  int64_t pages;  /* with split: inner rows / split, rounded down */
  int64_t most;   /* own rows of the largest set */
  const void *q, *k, *v; /* real (queries, width) and (keys, width), aligned to 16 bytes like all below */
  const int64_t *q_ptr, *k_ptr; /* (sets + 1) */
  void *out;                    /* real (queries, width): written by the forward */
  float *lse;                   /* (queries, heads): likewise */
  const void *grad;             /* real (queries, width), of out */
  float *mean;                  /* (queries, heads): what dq subtracts from the gradient of weights; dk, dv read it */
  void *grad_q, *grad_k, *grad_v; /* real */
  /* With split: (2 (pages + 1), most, width), the same (not in the forward), and (2 (pages + 1), most, heads). */
  float *partial, *partial_second, *partial_rows;
};

SNE_FAST_CUDA_API int sne_fast_cuda_set_attention(const struct sne_fast_cuda_set_attention_args *args, void *stream);
/* Writes mean and grad_q. */
SNE_FAST_CUDA_API int sne_fast_cuda_set_attention_query_grad(const struct sne_fast_cuda_set_attention_args *args,
                                                             void *stream);
/* Reads mean; writes grad_k and grad_v. */
SNE_FAST_CUDA_API int sne_fast_cuda_set_attention_key_grad(const struct sne_fast_cuda_set_attention_args *args,
                                                           void *stream);

#ifdef __cplusplus
}
#endif
#endif
