"""Files in stores elsewhere, by their URLs: paths, listings and reading of ranges, for the readers of checkpoints."""
