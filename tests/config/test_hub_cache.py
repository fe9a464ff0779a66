"""Models and data of the hub are looked at as far as the local cache has them, without a network."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from gkd_lab import experiments
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.hub_cache import find_cached_snapshot

from ..training.scripts import chat_tokenizer, llama, saved
from .test_model_checks import make_t5

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of this test, and the commits of the names that are asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commits = {
        "models": dict.fromkeys(("own/teacher", "own/student"), COMMIT),
        "datasets": {"own/rows": COMMIT},
    }
    Path("outputs").mkdir()
    Path("outputs/revisions.json").write_text(json.dumps(commits))
    return tmp_path / "hub"


def get_snapshot(cache: Path, kind: str, name: str) -> Path:
    return cache / f"{kind}s--own--{name}" / "snapshots" / COMMIT


def load() -> Grid:
    fields = {
        "task": "text",
        "data.source": "own/rows",
        "teacher": "own/teacher",
        "student": "own/student",
        "max_input_tokens": "32",
        "max_output_tokens": "16",
    }
    return experiments.load_single_cell(fields)


def list_faults() -> list[str]:
    try:
        experiments.check_models_and_splits(load())
    except ConfigError as error:
        lines = str(error).splitlines()
        return [line.strip() for line in (lines[1:] if lines[0].endswith(" faults:") else lines)]
    return []


def write_rows(folder: Path, split: str, row: str) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / f"{split}.jsonl").write_text(row * 40)


def test_what_is_not_cached_is_said_to_be_unchecked(cache: Path) -> None:
    assert list_faults() == []
    (note,) = experiments.list_unchecked_sources(load())
    assert note.endswith("nothing of it: models own/teacher, own/student; data own/rows")
    saved(llama(1), get_snapshot(cache, "model", "student"), chat_tokenizer())
    write_rows(get_snapshot(cache, "dataset", "rows"), "train", '{"prompt": "a", "target": "b"}\n')
    (note,) = experiments.list_unchecked_sources(load())
    assert note.endswith("nothing of it: models own/teacher")
    assert find_cached_snapshot("model", "own/student", "b" * 40) is None, "another commit"


def test_cached_models_that_do_not_go_together_are_refused(cache: Path) -> None:
    saved(make_t5(), get_snapshot(cache, "model", "teacher"), chat_tokenizer())
    saved(llama(1), get_snapshot(cache, "model", "student"), chat_tokenizer("more"))
    families, *_ = list_faults()
    assert families.startswith("teacher own/teacher is encoder-decoder, student own/student is decoder-only")


def test_cached_tokenizers_that_differ_are_refused(cache: Path) -> None:
    saved(llama(1), get_snapshot(cache, "model", "teacher"), chat_tokenizer("aardvark"))
    saved(llama(1), get_snapshot(cache, "model", "student"), chat_tokenizer("zebra"))
    (fault,) = list_faults()
    assert fault.startswith("teacher own/teacher and student own/student have different tokenizers: ")


def test_a_damaged_cached_file_is_a_fault_and_one_that_is_not_fetched_is_none(cache: Path) -> None:
    folder = get_snapshot(cache, "model", "teacher")
    saved(llama(1), folder, chat_tokenizer())
    (folder / "model.safetensors").unlink()
    assert list_faults() == []
    (folder / "tokenizer_config.json").write_text("{")
    assert list_faults() == [f"{folder}/tokenizer_config.json:1 is not valid JSON; copy the file again"]


def test_cached_data_without_a_column_or_a_split_are_refused(cache: Path) -> None:
    folder = get_snapshot(cache, "dataset", "rows")
    write_rows(folder, "train", '{"question": "a", "target": "b"}\n')
    split, column = list_faults()
    assert split == f"{folder} has no split 'test'; it has: train"
    assert column.startswith(f"{folder}/data/train.jsonl:1: no field 'prompt'")
