// Backward of chunk_encode for bins that one chunk fills, for operands of float16.
#include "cuda/chunk_encode/full_backward_impl.h"

template struct sne::FullBackward<sne::OpHalf>;
