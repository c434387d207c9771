"""Triton kernels and their launch tables; nothing here knows of torch.library, :mod:`sne_fast.backends.triton` does."""
