"""Rows from made sources, folders and `datasets`; what goes wrong is said with file and line."""

import importlib.util
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from gkd_lab.tasks import SPLITS, TASKS, get_source_revision, get_task, load_rows
from gkd_lab.tasks.data import count_held_out_rows

TRANSLATION = get_task("translation")


def installed(name: str) -> bool:
    """Return whether the task's generator can run; `instruction` needs an extra."""
    return name != "instruction" or importlib.util.find_spec("reasoning_gym") is not None


def raw_rows(count: int, word: str = "w") -> list[dict[str, str]]:
    return [{"en": f"{word} {index}", "de": f"W {index}"} for index in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def prompts(path: Path, split: str, **options: object) -> list[str]:
    rows = load_rows(TRANSLATION, "folder", path=path, split=split, **options)  # type: ignore[arg-type]
    return [row.prompt for row in rows]


COUNTS = {"instruction": 250}  # its held-out kinds have some 600 different questions
MADE = [
    pytest.param(name, marks=pytest.mark.skipif(not installed(name), reason="reasoning-gym is not installed"))
    for name, task in TASKS.items()
    if task.generators
]


@pytest.mark.parametrize("name", MADE)
def test_made_splits_are_disjoint_for_all_seeds(name: str) -> None:
    seen = {
        split: {
            row.prompt
            for seed in (0, 1)
            for row in load_rows(TASKS[name], "made", split=split, count=COUNTS.get(name, 800), seed=seed)
        }
        for split in SPLITS
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("name", MADE)
def test_made_rows_are_distinct_and_depend_on_the_seed_alone(name: str) -> None:
    task = TASKS[name]
    rows = load_rows(task, "made", split="train", count=300, seed=3)
    assert load_rows(task, "made", split="train", count=100, seed=3) == rows[:100]
    assert load_rows(task, "made", split="train", count=300, seed=4) != rows
    assert len({row.prompt for row in rows}) == 300


def test_an_endless_made_source_needs_a_count() -> None:
    with pytest.raises(ValueError, match=r"endless.* rows"):
        load_rows(TRANSLATION, "made", split="train")


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "lines" / "test.jsonl", raw_rows(5))
    write_parquet(tmp_path / "columns" / "test.parquet", raw_rows(5))
    assert prompts(tmp_path / "lines", "test") == prompts(tmp_path / "columns", "test")
    assert prompts(tmp_path / "lines", "test", count=2) == ["w 0", "w 1"]
    assert len(prompts(tmp_path / "lines", "test", count=50)) == 5


def test_shards_are_read_in_order_also_below_data(tmp_path: Path) -> None:
    for number, word in ((1, "b"), (0, "a")):
        shard = tmp_path / "data" / f"train-{number:05}-of-00002.parquet"
        write_parquet(shard, raw_rows(2, word))
    write_jsonl(tmp_path / "validation.jsonl", raw_rows(1))
    assert prompts(tmp_path, "train") == ["a 0", "a 1", "b 0", "b 1"]
    (tmp_path / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"2 shards .*missing: \[0\]"):
        prompts(tmp_path, "train")


def test_a_config_is_a_subfolder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "main" / "test.jsonl", raw_rows(1))
    assert prompts(tmp_path, "test", config="main") == ["w 0"]


def test_without_validation_the_end_of_train_is_held_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "train.jsonl", raw_rows(30))
    with caplog.at_level(logging.INFO, logger="gkd_lab"):
        assert prompts(tmp_path, "validation") == ["w 27", "w 28", "w 29"]
    assert "3 of 30 train rows" in caplog.text
    assert prompts(tmp_path, "train")[-1] == "w 26"
    write_jsonl(tmp_path / "validation.jsonl", raw_rows(1, "v"))
    assert prompts(tmp_path, "validation") == ["v 0"]
    assert len(prompts(tmp_path, "train")) == 30


def test_the_number_of_held_out_rows_has_bounds() -> None:
    assert [count_held_out_rows(rows) for rows in (0, 1, 2, 9, 30, 100_000)] == [0, 0, 1, 1, 3, 500]


def test_a_missing_split_is_refused_with_the_existing_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", raw_rows(3))
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=f"no split '{split}'.* test"):
            prompts(tmp_path, split)


GOOD_LINE = b'{"en": "a", "de": "b"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"en": "a", "de": \n', "expecting value"),
        (b'["a", "b"]\n', "got \"['a', 'b']\""),
        (b'{"en": "a"}\n', "no field 'de'"),
        (b'{"en": "a", "de": ""}\n', "field 'de' is empty"),
        ('{"en": "a", "de": "ä"}\n'.encode("latin-1"), "byte 19 is b'\\xe4'"),
    ],
)
def test_a_broken_line_is_reported_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes(GOOD_LINE + b"\n" + line + GOOD_LINE)  # an empty line is no row
    with pytest.raises(ValueError, match=re.escape(f"{path}:3: ") + ".*" + re.escape(message)):
        prompts(tmp_path, "test")


def test_a_broken_parquet_row_is_reported_with_its_number(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [*raw_rows(2), {"en": "a", "de": " "}])
    with pytest.raises(ValueError, match=r"test.parquet:3: .*'de' is empty"):
        prompts(tmp_path, "test")
    (tmp_path / "test.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"test.parquet: .*parquet file"):
        prompts(tmp_path, "test")


def test_a_missing_folder_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "tatoeba").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"Did you mean {tmp_path / 'tatoeba'}")):
        prompts(tmp_path / "tatoebe", "test")


def test_invalid_folders_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it holds: nothing"):
        prompts(tmp_path, "test")
    (tmp_path / "rows.csv").write_text("en,de\n")
    with pytest.raises(ValueError, match=r"it holds: rows\.csv"):
        prompts(tmp_path, "test")
    with pytest.raises(ValueError, match=r"rows\.csv is a file"):
        prompts(tmp_path / "rows.csv", "test")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"test\.jsonl: .*empty"):
        prompts(tmp_path, "test")
    write_jsonl(tmp_path / "test.jsonl", raw_rows(1))
    write_parquet(tmp_path / "test.parquet", raw_rows(1))
    with pytest.raises(ValueError, match="more than one form"):
        prompts(tmp_path, "test")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"kind": "made", "split": "validaton"},
            "mean 'validation'?",
        ),
        (
            {"kind": "foldr", "split": "test"},
            "data 'foldr'",
        ),
        ({"kind": "made", "split": "test", "count": 0}, "1, got 0"),
        (
            {"kind": "made", "split": "test", "name": "mad"},
            "source 'mad'",
        ),
        ({"kind": "folder", "split": "test"}, "needs a path"),
        ({"kind": "hub", "split": "test"}, "wmt/wmt14"),
    ],
)
def test_an_invalid_request_is_refused_with_what_to_do(request_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rows(TRANSLATION, **request_)  # type: ignore[arg-type]


def test_an_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'arithmetics'; .*'arithmetic'\? .*arithmetic,"):
        get_task("arithmetics")


def test_a_folder_revision_depends_on_content_not_path(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "test.jsonl", raw_rows(3))
    write_jsonl(tmp_path / "b" / "test.jsonl", raw_rows(3))
    (tmp_path / "b" / "SOURCE.txt").write_text("not data")
    first = get_source_revision(TRANSLATION, "folder", path=tmp_path / "a")
    assert first == get_source_revision(TRANSLATION, "folder", path=tmp_path / "b")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", first)
    write_jsonl(tmp_path / "b" / "test.jsonl", raw_rows(3, "v"))
    assert first != get_source_revision(TRANSLATION, "folder", path=tmp_path / "b")
    (tmp_path / "a" / "test.jsonl").rename(tmp_path / "a" / "train.jsonl")
    assert first != get_source_revision(TRANSLATION, "folder", path=tmp_path / "a")


def test_a_cached_digest_is_used_until_the_file_changes(tmp_path: Path) -> None:
    data, cache = tmp_path / "data" / "test.jsonl", tmp_path / "cache"
    write_jsonl(data, raw_rows(3))

    def revision() -> str:
        return get_source_revision(TRANSLATION, "folder", path=data.parent, cache=cache)

    first, time = revision(), data.stat().st_mtime_ns
    assert revision() == first == get_source_revision(TRANSLATION, "folder", path=data.parent)
    write_jsonl(data, raw_rows(3, "v"))  # same size
    os.utime(data, ns=(time, time))
    assert revision() == first  # same size and time: not read again
    os.utime(data, ns=(time, time + 1))
    assert revision() != first


def test_made_and_hub_sources_have_revisions() -> None:
    arithmetic = get_task("arithmetic")
    assert get_source_revision(arithmetic, "made") == "arithmetic-made-1"
    assert get_source_revision(arithmetic, "hub", name="openai/gsm8k", revision="e53f048") == "e53f048"
    with pytest.raises(ValueError, match="needs a revision"):
        get_source_revision(arithmetic, "hub", name="openai/gsm8k")


def test_a_hub_data_set_follows_the_rules_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [*raw_rows(20), {"en": "empty", "de": ""}]  # the 21 give 2 to validation
    write_jsonl(tmp_path / "set" / "train.jsonl", rows)
    place = str(tmp_path / "set")  # `load_dataset` reads a folder as it reads a hub name

    def load_prompts(split: str) -> list[str]:
        rows = load_rows(TRANSLATION, "hub", name=place, split=split)  # type: ignore[arg-type]
        return [row.prompt for row in rows]

    assert load_prompts("train") == [f"w {index}" for index in range(19)]
    assert load_prompts("validation") == ["w 19"]
    assert "1 rows with an empty field" in caplog.text
    with pytest.raises(ValueError, match=r"no split 'test'.* train"):
        load_prompts("test")


@pytest.fixture
def separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("separate_cache")
def test_dropped_hub_rows_are_counted_by_reason(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "set" / "test.jsonl", [{"en": "", "de": "a"}, *raw_rows(3), {"en": "b", "de": " "}]
    )
    place = str(tmp_path / "set")
    rows = load_rows(TRANSLATION, "hub", name=place, split="test")
    assert (len(rows), rows.dropped_counts) == (3, {"an empty field": 2})
    first = load_rows(TRANSLATION, "hub", name=place, split="test", count=2)
    assert (len(first), first.dropped_counts) == (2, {"an empty field": 1})  # of the rows that were read


# Format of each real data set on the hub and in a folder.
REAL_FORMS = {
    "EdinburghNLP/xsum": ("summarization", {"document": "D", "summary": "s", "id": "1"}, ("D", "s")),
    "wmt/wmt14": (
        "translation",
        {"translation": {"de": "ein Haus", "en": "a house"}},
        ("a house", "ein Haus"),
    ),
    "openai/gsm8k": (
        "arithmetic",
        {"question": "Q", "answer": "1+1=<<1+1=2>>2\n#### 2"},
        ("Q", "1+1=2\n#### 2"),
    ),
    "Muennighoff/flan": ("instruction", {"inputs": "I", "targets": "t", "task": "rte"}, ("I", "t")),
}


@pytest.mark.usefixtures("separate_cache")
@pytest.mark.parametrize("name", REAL_FORMS)
def test_the_papers_data_gives_equal_rows_from_jsonl_parquet_and_datasets(name: str, tmp_path: Path) -> None:
    task, raw, expected = REAL_FORMS[name]
    write_jsonl(tmp_path / "lines" / "test.jsonl", [raw] * 2)
    write_parquet(tmp_path / "columns" / "test-00000-of-00001.parquet", [raw] * 2)
    for kind, place in (("folder", "lines"), ("folder", "columns"), ("hub", "lines"), ("hub", "columns")):
        where = {"name" if kind == "hub" else "path": str(tmp_path / place)}
        rows = load_rows(get_task(task), kind, split="test", **where)  # type: ignore[arg-type]
        assert [(row.prompt, row.target) for row in rows] == [expected] * 2
    assert get_task(task).hub_name == name
