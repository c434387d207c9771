"""Launch plans shared by the GPU backends."""
