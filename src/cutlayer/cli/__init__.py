"""The command line: commands, which `entry` names, and what they share."""

from cutlayer.cli.entry import main

__all__ = ["main"]
