"""English of some length that every install has: docstrings of the standard library."""

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


def pairs(most: int = 150) -> list[tuple[str, str]]:
    """(rest of a docstring, its first line): some with several lines, some long, some with code."""
    found: dict[str, str] = {}
    for module in MODULES:
        for _, member in inspect.getmembers(module, callable):
            first, _, rest = (inspect.getdoc(member) or "").partition("\n")
            if first.strip() and rest.strip():
                found.setdefault(rest.strip()[:600], first.strip())
    return list(found.items())[:most]
