"""Readers of checkpoints, one file per format; none of them runs code of a file or keeps it mapped."""
