// The table of kernels that each instruction set (portable, avx2, avx512, avx512_bf16, amx_bf16) offers to abi.cpp.
#pragma once

#include "cpu/interrupt.h"
#include "cpu/tile_plan.h"
#include "sne_fast/cpu_abi.h"

namespace sne {

struct Kernels {
  const char *name;
  int lanes[2], panel[2];  // of float and double, for the tile plan
  int (*chunk_encode)(int dtype, const sne_fast_chunk_encode_args &, const TilePlan &, void *out, Interrupt &);
  int (*chunk_encode_backward)(int dtype, const sne_fast_chunk_encode_args &, const TilePlan &,
                               const sne_fast_chunk_encode_grads &, Interrupt &);
  int (*set_attention)(int dtype, const sne_fast_set_attention_args &, Interrupt &);
  int (*set_attention_backward)(int dtype, const sne_fast_set_attention_args &, const sne_fast_set_attention_grads &,
                                Interrupt &);
  int (*segment_pool)(int dtype, const sne_fast_segment_pool_args &, Interrupt &);
  int (*segment_pool_backward)(int dtype, const sne_fast_segment_pool_args &, const sne_fast_segment_pool_grads &,
                               Interrupt &);
  int (*set_block)(int dtype, const sne_fast_set_block_args &, Interrupt &);
  int (*set_block_backward)(int dtype, const sne_fast_set_block_args &, const sne_fast_set_block_grads &, Interrupt &);
  int (*tensor_statistics)(int dtype, const sne_fast_tensor_statistics_args &, Interrupt &);
  int (*product_rate)(int dtype, long rows, long inner, long columns, long repeats, int threads);
  // The table for float and double where this one is for products of bfloat16, and lacks tensor_statistics.
  const Kernels *real;
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
int set_attention_forward(int dtype, const sne_fast_set_attention_args &, Interrupt &);
int set_attention_backward(int dtype, const sne_fast_set_attention_args &, const sne_fast_set_attention_grads &,
                           Interrupt &);
int segment_pool_forward(int dtype, const sne_fast_segment_pool_args &, Interrupt &);
int segment_pool_backward(int dtype, const sne_fast_segment_pool_args &, const sne_fast_segment_pool_grads &,
                          Interrupt &);
}  // namespace avx512_bf16
namespace amx_bf16 {
extern const Kernels kernels;
}

}  // namespace sne

#if defined(SNE_ISA_portable) || defined(SNE_ISA_avx2) || defined(SNE_ISA_avx512) || defined(SNE_ISA_avx512_bf16) || \
    defined(SNE_ISA_amx_bf16)
#include "sne_fast/isa.h"

namespace sne::SNE_ISA {
int chunk_encode_forward(int dtype, const sne_fast_chunk_encode_args &, const TilePlan &, void *out, Interrupt &);
int chunk_encode_backward(int dtype, const sne_fast_chunk_encode_args &, const TilePlan &,
                          const sne_fast_chunk_encode_grads &, Interrupt &);
int set_attention_forward(int dtype, const sne_fast_set_attention_args &, Interrupt &);
int set_attention_backward(int dtype, const sne_fast_set_attention_args &, const sne_fast_set_attention_grads &,
                           Interrupt &);
int segment_pool_forward(int dtype, const sne_fast_segment_pool_args &, Interrupt &);
int segment_pool_backward(int dtype, const sne_fast_segment_pool_args &, const sne_fast_segment_pool_grads &,
                          Interrupt &);
int set_block_forward(int dtype, const sne_fast_set_block_args &, Interrupt &);
int set_block_backward(int dtype, const sne_fast_set_block_args &, const sne_fast_set_block_grads &, Interrupt &);
int tensor_statistics(int dtype, const sne_fast_tensor_statistics_args &, Interrupt &);
int product_rate(int dtype, long rows, long inner, long columns, long repeats, int threads);
}  // namespace sne::SNE_ISA
#endif
