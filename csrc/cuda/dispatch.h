// From the numbers of a call to the template that serves it.
#pragma once

#include <type_traits>

#include "cuda/tiles/fragments.h"
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

// run(Op{}) for operands of 16 bits.
template <class Run>
int with_half_operands(int precision, Run run) {
  switch (precision) {
    case SNE_FAST_PRECISION_HALF: return run(OpHalf{});
    case SNE_FAST_PRECISION_BFLOAT: return run(OpBfloat{});
  }
  return SNE_FAST_CUDA_BAD_VARIANT;
}

// run(T{}) for their type in memory.
template <class Run>
int with_storage(int precision, Run run) {
  return with_operands(precision, [&](auto op) { return run(typename decltype(op)::Storage{}); });
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

// run(Constant<d>{}) for the width of a head.
template <class Run>
int with_head_width(int64_t d, Run run) {
  switch (d) {
    case 8: return run(Constant<8>{});
    case 16: return run(Constant<16>{});
    case 32: return run(Constant<32>{});
    case 64: return run(Constant<64>{});
  }
  return SNE_FAST_CUDA_BAD_VARIANT;
}

// run(Constant<width>{}, Constant<width of a head>{}).
template <class Run>
int with_heads(int64_t width, int64_t heads, Run run) {
  return with_width(width, [&](auto w) {
    return with_head_width(width / heads, [&](auto d) {
      if constexpr (d.value <= w.value)
        return run(w, d);
      else
        return int(SNE_FAST_CUDA_BAD_VARIANT);
    });
  });
}

}  // namespace sne
