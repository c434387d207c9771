"""Planning of launches that the GPU engines share: sizes from the host's pointers, no device and no Triton."""
