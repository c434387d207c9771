#pragma once

#include "cpu/interrupt.h"
#include "sne_fast/cpu_abi.h"

namespace sne {
int gather_chunks(int dtype, const sne_fast_gather_chunks_args &, Interrupt &);
int gather_chunks_backward(int dtype, const sne_fast_gather_chunks_args &, Interrupt &);
}  // namespace sne
