"""Listings in a terminal and in a pipe."""

import io

import pytest
from rich.console import Console
from rich.text import Text
from tabulate import tabulate

from gkd_lab.status.render import Listing, format_listing, print_listing
from gkd_lab.status.terminal import print_table

LISTING = Listing(
    columns=["cell", "task", "lmbda", "beta", "seed", "status", "owner", "step", "loss", "left"],
    rows=[
        ["e208257d", "summarization", "0.5", "0.1", "0", "running", "node:1234567", "12/400", "0.2", "4 min"],
        ["ab84e798", "summarization", "0.5", "1", "0", "missing", "", "0/400", "", ""],
    ],
    styles=["yellow", ""],
)


def print_in_terminal(listing: Listing) -> list[str]:
    out = io.StringIO()
    print_table(listing, Console(file=out, force_terminal=True, width=70))
    return [Text.from_ansi(line).plain for line in out.getvalue().splitlines()]


def test_a_pipe_gets_a_line_for_each_row_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    print_listing(LISTING)
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == LISTING.columns
    assert first.split(maxsplit=9) == LISTING.rows[0]
    assert second.split() == [text for text in LISTING.rows[1] if text]
    assert "\x1b" not in header + first + second


@pytest.mark.parametrize(
    "texts",
    [
        ["e208257d", " summarization ", "0.5", "", "1e-05", "True"],
        ["", "-", "1,000", "  ", "7", "x" * 40],
        ["größer", "模型", "0.5", "-", "\ttab", "\x1b[1mbold\x1b[0m"],
    ],
)
def test_a_listing_is_aligned_as_by_tabulate(texts: list[str]) -> None:
    listing = Listing(["cell", "task", "lmbda", "owner", "loss", "status"], [texts, [*"abcdef"], [""] * 6])
    alignment = [*("left", "left", "right", "left", "right", "left")]
    rows = [listing.columns, *listing.rows]
    expected = tabulate(rows, tablefmt="plain", colalign=alignment, disable_numparse=True)
    assert format_listing(listing) == expected


def test_a_narrow_terminal_gets_folded_columns_and_whole_fingerprints() -> None:
    lines = print_in_terminal(LISTING)
    assert len(lines) > 3
    assert max(map(len, lines)) <= 70
    assert all(any({row[0], row[5], row[7]} <= set(line.split()) for line in lines) for row in LISTING.rows)


def test_only_a_pipe_gets_empty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    listing = Listing(["cell", "owner"], [["e208257d", ""]])
    print_listing(listing)
    assert "owner" in capsys.readouterr().out
    assert "owner" not in "".join(print_in_terminal(listing))
