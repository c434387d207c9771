"""The command line, `sne-fast`: a file for each command; `commands.py` is the program."""
