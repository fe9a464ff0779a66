"""Made event reports, docstring pairs and real documents."""

import random
import re
from pathlib import Path

import pytest

from gkd_lab.tasks import docstrings, events, get_task, load_rows
from gkd_lab.tasks.summarization import parse_row

SUMMARIZATION = get_task("summarization")


def test_made_rows_are_golden() -> None:
    row = load_rows(SUMMARIZATION, "made", split="train", count=2)[1]
    assert row.prompt == (
        "On Saturday night a storm passed over the zoo in Graz. A nurse named Dubois counted 12 "
        "broken windows. The local radio talked about it for 34 minutes."
    )
    assert row.target == "Storm breaks 12 windows at Graz zoo on Saturday, nurse Dubois says."


def test_a_summary_uses_only_facts_of_its_report() -> None:
    copied = {*events.NAMES, *events.CITIES, *events.DAYS, *map(str, events.COUNTS)}
    for row in load_rows(SUMMARIZATION, "made", split="train", count=500):
        facts = copied & set(re.findall(r"\w+", row.target))
        assert len(facts) == 4  # a name, a city, a day and a number
        assert facts <= set(re.findall(r"\w+", row.prompt))


def test_reports_and_summaries_have_the_documented_lengths() -> None:
    rows = load_rows(SUMMARIZATION, "made", split="train", count=2000)
    words = {word for row in rows for word in re.findall(r"\w+", f"{row.prompt} {row.target}")}
    assert len(words) < 400
    assert {row.prompt.count(".") for row in rows} == {3, 4, 5}
    assert {len(row.target.split()) for row in rows} <= set(range(8, 15))
    assert not any("{" in row.prompt + row.target for row in rows)


def test_asides_never_repeat_a_fact_of_the_report() -> None:
    for seed in range(200):
        facts = events.draw_facts(random.Random(seed))
        for name in ("name", "city", "day", "count"):
            assert facts[name] != facts[f"other_{name}"]


def test_a_docstring_gives_its_prose_and_its_first_line(tmp_path: Path) -> None:
    good = '''
def f():
    """Return the :class:`~a.Thing` that holds ``x``.

    The thing is looked up by name in the current folder, and if there is none with that name
    then a new one is made first and kept for the next call.

    It is never a copy.

    Parameters
    ----------
    x : int
    """
'''
    path = tmp_path / "module.py"
    path.write_text(good)
    (text,) = docstrings._read_docstrings(path)
    assert docstrings._parse_pair(text) == (
        "The thing is looked up by name in the current folder, and if there is none with that "
        "name then a new one is made first and kept for the next call. It is never a copy.",
        "Return the a.Thing that holds x.",
    )


@pytest.mark.parametrize(
    "body",
    [
        ">>> f(1) and many more words follow here so that it is not the length that counts now.",
        "Args:\n    x: a number, and many more words follow here so that length does not count.",
        "- a list with many more words in it so that it is not the length that counts, is it.",
        "Too short.",
        "see https://example.org for many more words so that it is not the length that counts.",
        "no capital at the start but many more words so that it is not the length that counts.",
    ],
)
def test_a_body_without_prose_gives_no_pair(body: str) -> None:
    assert docstrings._parse_pair(f"Return the thing that holds x.\n\n{body}") is None


@pytest.mark.slow
def test_installed_docstrings_are_many_distinct_cached_and_split(tmp_path: Path) -> None:
    splits = {
        split: load_rows(SUMMARIZATION, "made", name="docstrings", split=split, cache=tmp_path)
        for split in ("train", "validation", "test")
    }
    assert len(splits["train"]) > 1500
    prompts = [row.prompt for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts))
    (cache_file,) = tmp_path.iterdir()
    docstrings.load_pairs.cache_clear()
    before = cache_file.stat().st_mtime_ns
    again = load_rows(SUMMARIZATION, "made", name="docstrings", split="test", cache=tmp_path, seed=5)
    assert again == splits["test"]  # the seed changes nothing
    assert cache_file.stat().st_mtime_ns == before
    version = docstrings.compute_version(tmp_path)
    assert re.fullmatch(r"docstrings-1\+numpy-.+\+matplotlib-[\d.]+/[0-9a-f]{64}", version)


def test_the_references_of_a_row_replace_its_summary() -> None:
    raw = {"document": " D ", "summary": "s", "references": ["s", "t"], "id": 3}
    assert (parse_row(raw).prompt, parse_row(raw).target) == ("D", "s")
    assert parse_row(raw).references == ("s", "t")
    assert parse_row({"document": "D", "summary": "s"}).references == ("s",)
    assert parse_row({"document": "D", "summary": "s", "references": None}).references == ("s",)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"document": "D", "abstract": "s"}, "no field 'summary'"),
        ({"document": "D", "summary": "s", "references": "s"}, "list of texts"),
        ({"document": "", "summary": "s"}, "field 'document' is empty"),
    ],
)
def test_an_invalid_row_is_refused_with_the_reason(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_row(raw)
