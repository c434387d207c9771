// Kernels of set_block for operands of float32, in three products of TF32.
#include "cuda/set_block/operands_impl.h"

template struct sne::set_block::Kernels<sne::OpFloat>;
