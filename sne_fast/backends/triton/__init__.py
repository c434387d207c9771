"""The Triton backend: kernels and their launchers."""
