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
/* What it was compiled for, such as "80+ptx 90a 100a compute_120": a cubin each, PTX besides, PTX alone; "emulated" for
 * the host build. */
SNE_FAST_CUDA_API const char *sne_fast_cuda_architectures(void);
/* CUDA that it was built with, and the newest that the driver here knows, as 13000 for 13.0; 0 for none. */
SNE_FAST_CUDA_API int sne_fast_cuda_runtime_version(void);
SNE_FAST_CUDA_API int sne_fast_cuda_driver_version(void);
/* Order in which emulated threads run: 0 as numbered, else drawn by this seed. Nothing on a GPU. */
SNE_FAST_CUDA_API void sne_fast_cuda_emulated_schedule(uint64_t seed);

#ifdef __cplusplus
}
#endif
#endif
