"""The command line: a file for each command."""

from cutlayer.cli.entry import main

__all__ = ["main"]
