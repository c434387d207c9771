"""The CPU backend: C++ kernels (csrc/cpu), their library and the calls into it."""
