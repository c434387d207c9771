"""The command line, `sne-fast`."""
