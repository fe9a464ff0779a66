"""Rows as token ids: prompt and target are cut apart, and what is lost is counted beside the record."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.config.artifact_specs import Architecture, DataSpec, ModelSpec, SftModel, TokenizerSpec
from gkd_lab.models.build import train_tokenizer
from gkd_lab.runner.dataset import encode_examples, load_split, write_split_report

WORDS = TokenizerSpec(kind="word", vocab_size=32)


def data_in(folder: Path, pairs: list[tuple[str, str]], **form: Any) -> DataSpec:
    lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in pairs]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "validation.jsonl").write_text(lines[0])
    return DataSpec(kind="folder", path=str(folder), revision="sha256:0", **form)


def model(data: DataSpec, family: str = "encoder-decoder") -> SftModel:
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
def test_prompt_and_target_are_cut_apart_and_counted(family: str, tmp_path: Path) -> None:
    data = data_in(tmp_path, PAIRS)
    found = load_split("arithmetic", data, "train", tmp_path)
    tokenizer = train_tokenizer(WORDS, [text for pair in PAIRS for text in pair])
    encoded, cut = encode_examples(model(data, family), tokenizer, found)
    assert (cut.rows, cut.prompts, cut.completions, cut.dropped) == (4, 2, 2, {})
    assert [len(one.prompt_ids) for one in encoded] == [2, 4, 1, 4]
    assert [len(one.completion_ids) for one in encoded] == [3, 3, 4, 4]
    kept = tokenizer.decode(encoded[1].prompt_ids)
    assert kept == ("a b c d" if family == "encoder-decoder" else "b c d e")
    ends = [one.completion_ids[-1] == tokenizer.eos_token_id for one in encoded]
    assert ends == [True, True, False, False]  # a cut target does not teach to stop


def test_what_was_cut_and_left_out_is_told_beside_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [{"question": "a b c d e", "answer": "#### 1"}, {"question": "", "answer": "#### 2"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    (tmp_path / "validation.jsonl").write_text(json.dumps(lines[0]) + "\n")
    data = DataSpec(kind="hub", name=str(tmp_path), revision="1")  # `datasets` reads a folder alike
    found = load_split("arithmetic", data.model_copy(update={"revision": None}), "train", tmp_path)
    _, cut = encode_examples(model(data), train_tokenizer(WORDS, ["a b c d e"]), found)
    write_split_report(tmp_path, "train", cut)
    told = json.loads((tmp_path / "rows-train.json").read_text())
    assert told == {"rows": 2, "prompts": 2, "completions": 0, "dropped": {"an empty field": 2}}


def test_a_document_of_100000_words_is_cut_like_any_other(tmp_path: Path) -> None:
    data = data_in(tmp_path, [("a b " * 50_000, "#### 1")])
    found = load_split("arithmetic", data, "train", tmp_path)
    (one,), cut = encode_examples(model(data), train_tokenizer(WORDS, ["a b #### 1"]), found)
    assert (len(one.prompt_ids), len(one.completion_ids), cut.prompts) == (4, 3, 1)


def test_the_form_of_the_spec_reaches_the_rows(tmp_path: Path) -> None:
    pairs = [("a", "1 + 1 = <<1+1=2>>2\n#### 2")]
    (row,) = load_split(
        "arithmetic", data_in(tmp_path, pairs, shots=1, calculator_marks=True), "train", tmp_path
    )
    assert row.prompt.startswith("Q: There are 15 trees")
    assert row.target == pairs[0][1]
