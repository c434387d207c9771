// Kernels of chunk_encode for float32 operands rounded to TF32.
#include "cuda/chunk_encode/operands_impl.h"

namespace sne {
SNE_CHUNK_OPERANDS(OpTf32)
}
