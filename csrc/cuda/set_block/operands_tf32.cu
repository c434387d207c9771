// Kernels of set_block for operands of TF32.
#include "cuda/set_block/operands_impl.h"

template struct sne::set_block::Kernels<sne::OpTf32>;
