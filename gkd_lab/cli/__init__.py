"""The command line: parse, call, print."""

from gkd_lab.cli.commands import app, main

__all__ = ["app", "main"]
