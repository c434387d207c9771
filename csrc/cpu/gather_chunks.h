#pragma once

#include "sne_fast/cpu_abi.h"

namespace sne {
int gather_chunks(int dtype, const sne_fast_gather_chunks_args &);
int gather_chunks_backward(int dtype, const sne_fast_gather_chunks_args &);
}  // namespace sne
