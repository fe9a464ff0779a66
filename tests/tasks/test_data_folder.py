"""Files of a data folder: which split each belongs to, and which ones are left alone."""

import json
import logging
from pathlib import Path

import pytest

from gkd_lab.tasks import TASKS, Split, get_task, load_rows
from gkd_lab.tasks.data_folder import DataFolder

WORDS: list[tuple[str, Split]] = [
    ("training", "train"),
    ("valid", "validation"),
    ("val", "validation"),
    ("dev", "validation"),
    ("testing", "test"),
    ("eval", "test"),
    ("evaluation", "test"),
]


def write_rows(path: Path, count: int, word: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"en": f"{word} {n}", "de": f"{word} {n}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("word", "split"), WORDS)
def test_a_split_may_have_any_of_its_words(tmp_path: Path, word: str, split: Split) -> None:
    write_rows(tmp_path / f"{word}.jsonl", 4, "mine")
    if split != "train":
        write_rows(tmp_path / "train.jsonl", 30)
    rows = load_rows(get_task("translation"), "folder", path=tmp_path, split=split)
    assert {row.prompt.split()[0] for row in rows} == {"mine"}
    assert DataFolder(tmp_path).row_counts[split] == 4


@pytest.mark.parametrize(("word", "split"), WORDS)
def test_the_words_are_those_of_datasets(tmp_path: Path, word: str, split: Split) -> None:
    from datasets.data_files import get_data_patterns

    write_rows(tmp_path / f"{word}.jsonl", 1)
    assert list(get_data_patterns(str(tmp_path))) == [split]


def test_validation_rows_of_ones_own_leave_the_training_rows_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 30)
    write_rows(tmp_path / "valid.jsonl", 2)
    assert len(load_rows(get_task("translation"), "folder", path=tmp_path, split="train")) == 30


def test_shards_may_end_in_hexadecimal_digits_of_their_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train-00001-of-00002-0a9d8e7f62000000.jsonl", 2, "b")
    write_rows(tmp_path / "data" / "train-00000-of-00002-5f3c1b0a9d8e7f62.jsonl", 2, "a")
    rows = list(DataFolder(tmp_path).read_rows("train"))
    assert [raw["en"] for _, raw in rows] == ["a 0", "a 1", "b 0", "b 1"]


def test_two_files_of_one_shard_are_refused(tmp_path: Path) -> None:
    for number, digits in ((0, "aa"), (0, "bb"), (1, "cc")):
        write_rows(tmp_path / f"train-0000{number}-of-00002-{digits}.jsonl", 2)
    with pytest.raises(ValueError, match=r"more than one form .*00000-of-00002-aa.*00000-of-00002-bb"):
        DataFolder(tmp_path)


def test_two_words_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "dev", "valid"):
        write_rows(tmp_path / f"{name}.jsonl", 3)
    with pytest.raises(ValueError, match=r"keep one: .*dev\.jsonl, .*valid\.jsonl"):
        DataFolder(tmp_path)


def test_files_of_rows_that_are_left_alone_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "train.jsonl", 3)
    for name in ("extra.jsonl", "test.csv", "data/more.parquet"):
        write_rows(tmp_path / name, 3)
    (tmp_path / "README.md").write_text("about the rows")
    with caplog.at_level(logging.WARNING, logger="gkd_lab"):
        for _ in range(2):
            folder = DataFolder(tmp_path)
    assert folder.list_unread_files() == ["data/more.parquet", "extra.jsonl", "test.csv"]
    (record,) = caplog.records
    assert "data/more.parquet, extra.jsonl, test.csv;" in record.getMessage()
    assert "README" not in record.getMessage()


def test_what_is_left_alone_is_no_part_of_the_content(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 3)
    before = DataFolder(tmp_path).compute_digest()
    write_rows(tmp_path / "extra.jsonl", 3)
    assert DataFolder(tmp_path).compute_digest() == before
    write_rows(tmp_path / "val.jsonl", 3)
    assert DataFolder(tmp_path).compute_digest() != before


def test_the_part_of_the_scales_own_data_set_is_no_part_of_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task, scale in (("arithmetic", "smol"), ("arithmetic", "paper"), ("translation", "paper")):
        defaults = TASKS[task].get_defaults
        data = defaults(scale, None)["data"]
        assert data["config"]
        assert defaults(scale, data["source"])["data"] == data
        for source in ("owner/name", str(tmp_path), "./nowhere"):
            assert "config" not in defaults(scale, source)["data"]
    monkeypatch.chdir(tmp_path)
    Path("openai/gsm8k").mkdir(parents=True)
    assert "config" not in TASKS["arithmetic"].get_defaults("smol", "openai/gsm8k")["data"]
    assert TASKS["arithmetic"].get_defaults("nano", "made")["data"]["source"] == "made"
