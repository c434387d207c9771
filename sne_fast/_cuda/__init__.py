"""The host side of the CUDA C++ engine (csrc/cuda): its library, and per op what to allocate and to launch."""
