"""The reference backend: the ops in plain PyTorch, for any device and floating dtype."""
