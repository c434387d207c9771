"""The CUDA backend: C++ kernels (csrc/cuda), their library and the calls into it."""
