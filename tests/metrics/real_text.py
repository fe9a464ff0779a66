"""Real English text of every installation: docstrings of the standard library."""

import argparse
import asyncio
import collections
import functools
import inspect
import itertools
import logging
import os
import pathlib
import random
import shutil
import statistics
import string
import subprocess
import tempfile
import textwrap

MODULES = (
    argparse,
    asyncio,
    collections,
    functools,
    itertools,
    logging,
    os,
    pathlib,
    random,
    shutil,
    statistics,
    string,
    subprocess,
    tempfile,
    textwrap,
)


def list_docstrings(limit: int = 150) -> list[tuple[str, str]]:
    """Return (body, first line) of docstrings: some of several lines, some long, some with code."""
    first_lines: dict[str, str] = {}
    for module in MODULES:
        for _, member in inspect.getmembers(module, callable):
            first_line, _, body = (inspect.getdoc(member) or "").partition("\n")
            if first_line.strip() and body.strip():
                first_lines.setdefault(body.strip()[:600], first_line.strip())
    return list(first_lines.items())[:limit]
