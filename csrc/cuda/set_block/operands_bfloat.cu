// Kernels of set_block for operands of bfloat16.
#include "cuda/set_block/operands_impl.h"

template struct sne::set_block::Kernels<sne::OpBfloat>;
