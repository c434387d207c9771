"""What engines work out on the host before a launch, in NumPy and PyTorch alone."""
