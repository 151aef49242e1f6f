"""The command line."""

from slug_lightning.cli.command import main

__all__ = ["main"]
