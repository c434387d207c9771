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

// run(Constant<width>{}).
template <class Run>
int with_width(int64_t width, Run run) {
  switch (width) {
    case 32: return run(Constant<32>{});
    case 64: return run(Constant<64>{});
    case 128: return run(Constant<128>{});
    case 256: return run(Constant<256>{});
  }
  return SNE_FAST_CUDA_BAD_VARIANT;
}

// run(Constant<width>{}, Constant<width of a head>{}).
template <class Run>
int with_heads(int64_t width, int64_t heads, Run run) {
  return with_width(width, [&](auto w) {
    switch (width / heads) {
      case 8: return run(w, Constant<8>{});
      case 16: return run(w, Constant<16>{});
      case 32: return run(w, Constant<32>{});
      case 64:
        if constexpr (w.value >= 64) return run(w, Constant<64>{});
    }
    return int(SNE_FAST_CUDA_BAD_VARIANT);
  });
}

}  // namespace sne
