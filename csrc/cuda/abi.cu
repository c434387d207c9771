// Facts about the library: its ABI number, the architectures in it, its status codes in words.
#include "cuda/ptx/simt.h"
#include "sne_fast/cuda_abi.h"

extern "C" {

int sne_fast_cuda_abi(void) { return SNE_FAST_CUDA_ABI; }

const char *sne_fast_cuda_status(int status) {
  switch (status) {
    case SNE_FAST_CUDA_OK: return "ok";
    case SNE_FAST_CUDA_BAD_ARGUMENT: return "sizes or pointers that do not fit together";
    case SNE_FAST_CUDA_BAD_VARIANT:
      return "no kernel for this width, number of heads or type, or too little shared memory for it";
  }
#if defined(SNE_EMULATED)
  return sne::emulator::error();
#else
  return cudaGetErrorString(cudaError_t(status));
#endif
}

const char *sne_fast_cuda_architectures(void) {
#if defined(SNE_EMULATED)
  return "emulated";
#else
#define SNE_TEXT_(x) #x
#define SNE_TEXT(x) SNE_TEXT_(x)
  return SNE_TEXT(SNE_CUDA_ARCHS);
#endif
}

int sne_fast_cuda_runtime_version(void) {
#if defined(SNE_EMULATED)
  return 0;
#else
  return CUDART_VERSION;
#endif
}

int sne_fast_cuda_driver_version(void) {
  int version = 0;
#if !defined(SNE_EMULATED)
  if (cudaDriverGetVersion(&version) != cudaSuccess) return 0;
#endif
  return version;
}

void sne_fast_cuda_emulated_schedule(uint64_t seed) {
#if defined(SNE_EMULATED)
  sne::emulator::schedule(seed);
#else
  (void)seed;
#endif
}

}  // extern "C"
