"""Run the command line: ``python -m sne_fast``."""

from .cli.commands import main

main()
