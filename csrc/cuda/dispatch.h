// From the numbers of a call to the template that serves it.
#pragma once

#include <type_traits>

#include "cuda/fragments.h"
#include "sne_fast/cuda_abi.h"

namespace sne {

// run(Op{}) for the operands that a precision stands for.
template <class Run>
int with_operands(int precision, Run run) {
  switch (precision) {
    case SNE_FAST_PRECISION_FLOAT: return run(OpFloat{});
    case SNE_FAST_PRECISION_TF32: return run(OpTf32{});
    case SNE_FAST_PRECISION_HALF: return run(OpHalf{});
    case SNE_FAST_PRECISION_BFLOAT: return run(OpBfloat{});
  }
  return SNE_FAST_CUDA_BAD_VARIANT;
}

template <int value>
using Constant = std::integral_constant<int, value>;

// run(Constant<d>{}) for a head's width d of a layer `width` wide.
template <int width, class Run>
int with_head_width(int64_t d, Run run) {
  if (d == 8) return run(Constant<8>{});
  if (d == 16) return run(Constant<16>{});
  if (d == 32) return run(Constant<32>{});
  if constexpr (width >= 64)
    if (d == 64) return run(Constant<64>{});
  return SNE_FAST_CUDA_BAD_VARIANT;
}

}  // namespace sne
