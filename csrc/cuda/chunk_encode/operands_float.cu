// The kernels of chunk_encode for operands of float32 in full precision.
#include "cuda/chunk_encode/operands_impl.h"

namespace sne {
SNE_CHUNK_OPERANDS(OpFloat)
}
