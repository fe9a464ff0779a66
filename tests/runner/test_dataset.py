"""Rows as token ids: prompts and targets are truncated separately, and the counts are stored."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config.artifact_specs import Architecture, DataSpec, ModelSpec, SftModel, TokenizerSpec
from gkd_lab.models.build import train_tokenizer
from gkd_lab.runner.dataset import encode_examples, load_split, write_split_report

WORDS = TokenizerSpec(kind="word", vocab_size=32)


def create_data_spec(folder: Path, pairs: list[tuple[str, str]], **form: Any) -> DataSpec:
    lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in pairs]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "validation.jsonl").write_text(lines[0])
    return DataSpec(kind="folder", path=str(folder), revision="sha256:0", **form)


def create_model_spec(data: DataSpec, family: str = "encoder-decoder") -> SftModel:
    return SftModel(
        task="arithmetic",
        family=family,  # type: ignore[arg-type]
        data=data,
        tokenizer=WORDS,
        model=ModelSpec(name="x", architecture=Architecture(layers=1, width=8, heads=2, feed_forward=8)),
        sft=None,
        dropout=0.0,
        max_input_tokens=4,
        max_output_tokens=4,
        precision="fp32",
    )


PAIRS = [
    ("a b", "#### 1"),
    ("a b c d e", "#### 2"),
    ("a", "so a b c #### 3"),
    ("a b c d e f", "so a b #### 4"),
]


@pytest.mark.parametrize("family", ("encoder-decoder", "decoder-only"))
def test_prompt_and_target_are_truncated_separately_and_counted(family: str, tmp_path: Path) -> None:
    data = create_data_spec(tmp_path, PAIRS)
    rows = load_split("arithmetic", data, "train", tmp_path)
    tokenizer = train_tokenizer(WORDS, [text for pair in PAIRS for text in pair])
    examples, report = encode_examples(create_model_spec(data, family), tokenizer, rows)
    assert (report.rows, report.prompts, report.completions, report.dropped) == (4, 2, 2, {})
    assert [len(example.prompt_ids) for example in examples] == [2, 4, 1, 4]
    assert [len(example.completion_ids) for example in examples] == [3, 3, 4, 4]
    decoded_prompt = tokenizer.decode(examples[1].prompt_ids)
    assert decoded_prompt == ("a b c d" if family == "encoder-decoder" else "b c d e")
    end_flags = [example.completion_ids[-1] == tokenizer.eos_token_id for example in examples]
    assert end_flags == [True, True, False, False]  # a cut target does not teach to stop


def test_truncated_and_omitted_rows_are_reported_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [{"question": "a b c d e", "answer": "#### 1"}, {"question": "", "answer": "#### 2"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    (tmp_path / "validation.jsonl").write_text(json.dumps(lines[0]) + "\n")
    data = DataSpec(kind="hub", name=str(tmp_path), revision="1")  # `datasets` reads a folder in the same way
    rows = load_split("arithmetic", data.model_copy(update={"revision": None}), "train", tmp_path)
    _, report = encode_examples(create_model_spec(data), train_tokenizer(WORDS, ["a b c d e"]), rows)
    write_split_report(tmp_path, "train", report)
    stored_report = json.loads((tmp_path / "rows-train.json").read_text())
    assert stored_report == {"rows": 2, "prompts": 2, "completions": 0, "dropped": {"an empty field": 2}}


def test_document_of_100000_words_is_truncated(tmp_path: Path) -> None:
    data = create_data_spec(tmp_path, [("a b " * 50_000, "#### 1")])
    rows = load_split("arithmetic", data, "train", tmp_path)
    (example,), report = encode_examples(
        create_model_spec(data), train_tokenizer(WORDS, ["a b #### 1"]), rows
    )
    assert (len(example.prompt_ids), len(example.completion_ids), report.prompts) == (4, 3, 1)


def test_shots_and_calculator_marks_of_the_spec_are_in_the_rows(tmp_path: Path) -> None:
    pairs = [("a", "1 + 1 = <<1+1=2>>2\n#### 2")]
    (row,) = load_split(
        "arithmetic", create_data_spec(tmp_path, pairs, shots=1, calculator_marks=True), "train", tmp_path
    )
    assert row.prompt.startswith("Q: There are 15 trees")
    assert row.target == pairs[0][1]
