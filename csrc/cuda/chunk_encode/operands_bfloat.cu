// Kernels of chunk_encode for operands of bfloat16.
#include "cuda/chunk_encode/operands_impl.h"

namespace sne {
SNE_CHUNK_OPERANDS(OpBfloat)
}
