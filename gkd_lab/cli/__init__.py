"""Command line: parse the request, call one function, print its result."""

from gkd_lab.cli.app import app, main

__all__ = ["app", "main"]
