// Kernels of chunk_encode for float32 operands in full precision.
#include "cuda/chunk_encode/operands_impl.h"

namespace sne {
SNE_CHUNK_OPERANDS(OpFloat)
}
