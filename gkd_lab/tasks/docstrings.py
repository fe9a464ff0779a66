"""Real text that every installation has: docstrings of installed packages as (body, first line) pairs.

Files are found without importing their package and read with `ast`. Only prose is used: a pair ends where a
section, a list, a directive or an example begins. The pairs depend on the installed versions, so the version
of the source contains these and the SHA-256 of the pairs. A pair:
    body        This is meant to be used for a homogeneous list of artists, so that they don't cause long,
                meaningless output.
    first line  A list with a short repr().
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version as package_version
from pathlib import Path

EXTRACTION_VERSION = "docstrings-1"
PACKAGES = ("numpy", "pandas", "torch", "transformers", "datasets", "matplotlib")
BODY_WORDS = (15, 120)
FIRST_LINE_WORDS = (4, 24)

DocstringPair = tuple[str, str]  # body, first line

_SKIPPED_FOLDERS = {"test", "tests", "_vendor", "testing"}
_NOT_PROSE = re.compile(
    r"""^\s*(>>>|\.\.\ |[-*+•]\s|\d+[.)]\s|\||```|@|:\w+|\#|<)  # an example, a list, a table
    |::\s*$|^\s*[-=~^]{3,}\s*$                              # a block follows, an underline
    |^\s*(Args?|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|See\ Also
         |References|Attributes|Inputs?|Outputs?|Shape|Usage|Warnings?|Keyword\ Arg\w*|Tips?
         )\b.{0,20}:?\s*$""",
    re.VERBOSE | re.IGNORECASE,
)
_STATEMENT_PARTS = (ast.stmt, ast.excepthandler, ast.match_case)
_STATEMENTS_WITHOUT_BODY = (
    ast.Expr,
    ast.Assign,
    ast.AnnAssign,
    ast.AugAssign,
    ast.Return,
    ast.Raise,
    ast.Assert,
)
_MARKUP = (
    (re.compile(r"\s*\[\d+\]_"), ""),  # a footnote
    (re.compile(r":[a-z:]+:`~?!?\.?([^`<]+?)(\s*<[^`]*>)?`"), r"\1"),  # :class:`~a.b <c>` -> a.b
    (re.compile(r"\[`~?([^`\]]+)`\](\([^)]*\))?"), r"\1"),  # [`a`](link) -> a
    (re.compile(r"`+([^`]*)`+_*"), r"\1"),
    (re.compile(r"\*\*?([^*]+)\*\*?"), r"\1"),
)


def _remove_markup(text: str) -> str:
    """Return the text on one line, without reStructuredText and Markdown markup."""
    for markup, replacement in _MARKUP:
        text = markup.sub(replacement, text)
    return " ".join(text.split())


def _is_prose(text: str) -> bool:
    """Return whether text looks like prose: ASCII, capital first, final . ! or ?, mostly letters, no code."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return (
        text.isascii()
        and text[0].isupper()
        and text.endswith((".", "!", "?"))
        and letters >= 0.88 * len(text)
        and not re.search(r"https?:|[\\{}=<>|$]|\.\.\.|TODO|\bFIXME|deprecated", text)
    )


def _parse_pair(docstring: str) -> DocstringPair | None:
    """Return (prose, first paragraph) of a docstring; None if either is too short, too long or no prose."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    body: list[str] = []
    for paragraph in paragraphs[1:]:
        if paragraph[0].isspace() or any(map(_NOT_PROSE.search, paragraph.splitlines())):
            break
        body.append(_remove_markup(paragraph))
    first_line, text = _remove_markup(paragraphs[0]), " ".join(body)
    if (
        BODY_WORDS[0] <= len(text.split()) <= BODY_WORDS[1]
        and FIRST_LINE_WORDS[0] <= len(first_line.split()) <= FIRST_LINE_WORDS[1]
        and _is_prose(text)
        and _is_prose(first_line)
    ):
        return text, first_line
    return None


def _list_source_files(package: str) -> list[Path]:
    """Return the sorted Python files of an installed package, tests and vendored code left out.

    The package is not imported. Raises ValueError if it is not installed.
    """
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        raise ValueError(f"the docstrings source reads the package {package!r}: install it")
    root = Path(spec.origin).parent
    return sorted(
        path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1])
    )


def _iterate_statements(module: ast.Module) -> Iterator[ast.AST]:
    """Yield a module's node and the nodes of all its statements, nested ones too, but no expressions."""
    nodes: deque[ast.AST] = deque([module])
    while nodes:
        node = nodes.popleft()
        yield node
        if not isinstance(node, _STATEMENTS_WITHOUT_BODY):
            children = ast.iter_child_nodes(node)
            nodes.extend(child for child in children if isinstance(child, _STATEMENT_PARTS))


def _read_docstrings(path: Path) -> Iterator[str]:
    """Yield the non-empty docstrings of a source file's module, classes and functions, uncleaned."""
    source = path.read_bytes()
    if b'"""' not in source:
        return
    for node in _iterate_statements(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and docstring.strip():
                yield docstring


def extract_pairs() -> list[DocstringPair]:
    """Return (body, first line) of all docstrings of `PACKAGES` that are prose, each text once.

    They are sorted by a hash of the body, which mixes the packages. Takes about half a minute; `load_pairs`
    caches.
    """
    by_body: dict[str, str] = {}
    first_lines: set[str] = set()
    for package in PACKAGES:
        for path in _list_source_files(package):
            for pair in filter(None, map(_parse_pair, _read_docstrings(path))):
                if pair[0] not in by_body and pair[1].lower() not in first_lines:
                    by_body[pair[0]] = pair[1]
                    first_lines.add(pair[1].lower())
    return sorted(by_body.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def _format_versions() -> str:
    """Return the versions of the extraction and of the packages as one text joined by `+`."""
    names = (f"{package}-{package_version(package)}" for package in PACKAGES)
    return "+".join((EXTRACTION_VERSION, *names))


@functools.cache
def load_pairs(cache: Path | None = None) -> tuple[DocstringPair, ...]:
    """Return the pairs of `extract_pairs`, cached in memory and, if given, in the folder `cache`."""
    if cache is None:
        return tuple(extract_pairs())
    key = hashlib.sha256(_format_versions().encode()).hexdigest()[:16]
    path = cache / f"docstrings-{key}.json"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(extract_pairs()))
        unfinished.replace(path)
    return tuple((body, first_line) for body, first_line in json.loads(path.read_text()))


def compute_version(cache: Path | None = None) -> str:
    """Return the packages' versions and the SHA-256 of all pairs as one text."""
    digest = hashlib.sha256(json.dumps(load_pairs(cache)).encode()).hexdigest()
    return f"{_format_versions()}/{digest}"
