"""Local models are looked at before any is loaded: their files, and whether they go together."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from gkd_lab import experiments
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.checkpoint_files import CheckpointFiles

from ..training.scripts import chat_tokenizer, llama, saved


def make_t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Teacher and student as a user has them, and their rows."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "student"):
        saved(llama(1), tmp_path / name, chat_tokenizer())
    for split in ("train", "test"):
        path = tmp_path / "rows" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text((json.dumps({"prompt": "a", "target": "b"}) + "\n") * 40)
    return tmp_path


def load(**fields: str) -> Grid:
    return experiments.load_single_cell(
        {
            "task": "text",
            "data.source": "rows",
            "teacher": "./teacher",
            "student": "./student",
            "max_input_tokens": "32",
            "max_output_tokens": "16",
            **fields,
        }
    )


def list_faults(**fields: str) -> list[str]:
    try:
        experiments.check_models_and_splits(load(**fields))
    except ConfigError as error:
        lines = str(error).splitlines()
        return lines[1:] if lines[0].endswith(" faults:") else lines
    return []


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_whole_pair_has_no_fault(pair: Path) -> None:
    assert list_faults() == []


BREAKAGES: dict[str, Callable[[Path], object]] = {
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "has no model_type": lambda folder: (folder / "config.json").write_text("{}"),
    "has no weights: model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "model.safetensors is cut short or damaged": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1]
    ),
    "has no tokenizer: tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer.json is damaged": lambda folder: (folder / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("message", BREAKAGES)
def test_each_missing_or_damaged_file_is_named(pair: Path, message: str) -> None:
    BREAKAGES[message](pair / "teacher")
    (fault,) = list_faults()
    assert message in fault
    assert str(pair / "teacher") in fault


@pytest.mark.parametrize("name", ["spiece.model", "source.spm", "vocab.json", "sentencepiece.bpe.model"])
def test_other_forms_of_a_tokenizer_are_no_fault(pair: Path, name: str) -> None:
    (pair / "teacher" / "tokenizer.json").rename(pair / "teacher" / name)
    assert list_faults() == []


def test_a_tokenizer_of_bytes_needs_no_file(pair: Path) -> None:
    (pair / "teacher" / "tokenizer.json").unlink()
    (pair / "teacher" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert list_faults() == []


def test_all_faults_are_listed_at_once_and_mended_ones_no_more(pair: Path) -> None:
    (pair / "teacher" / "config.json").rename(pair / "config.json")
    (pair / "student" / "tokenizer.json").unlink()
    assert len(list_faults()) == 2
    (pair / "config.json").rename(pair / "teacher" / "config.json")
    assert len(list_faults()) == 1


def test_a_missing_shard_is_named(pair: Path) -> None:
    folder = pair / "teacher"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert [Path(fault.split()[0]).name for fault in list_faults()] == ["model-00002-of-00002.safetensors"]


def test_families_that_do_not_go_together_are_one_fault(pair: Path) -> None:
    saved(make_t5(), pair / "t5", chat_tokenizer())
    (fault,) = list_faults(teacher="./t5")
    assert "t5 is encoder-decoder" in fault
    assert "student is decoder-only" in fault


def test_a_family_that_is_not_the_tasks_is_answered_with_the_setting(pair: Path) -> None:
    saved(make_t5(), pair / "t5", chat_tokenizer())
    faults = list_faults(teacher="./t5", student="./t5")
    assert all(fault.endswith("set `family: encoder-decoder`") for fault in faults)
    assert len(faults) == 2
    assert list_faults(teacher="./t5", student="./t5", family="encoder-decoder") == []


def write_other_tokenizer(folder: Path) -> None:
    words = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    names = sorted(words, key=lambda word: words[word])
    names[5], names[6] = names[6], names[5]
    other = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token=names[0]))
    other.save(str(folder / "tokenizer.json"))


def test_tokenizers_that_differ_are_refused_only_where_tokens_are_compared(pair: Path) -> None:
    write_other_tokenizer(pair / "teacher")
    (fault,) = list_faults()
    assert "2 ids differ: id 5 is" in fault
    assert list_faults(objectives="[{type: uld}, {type: cross_entropy}]", lmbda="0") == []


@pytest.mark.parametrize("owner", ["teacher", "student"])
def test_a_vocabulary_that_is_the_beginning_of_the_other_is_refused(owner: str, pair: Path) -> None:
    """Its student would write tokens that the teacher does not know, or the reverse; `run` refuses it too."""
    path = pair / owner / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {**chat_tokenizer().get_vocab(), "zebra": len(chat_tokenizer())}
    path.write_text(json.dumps(content))
    (fault,) = list_faults()
    assert f"different tokenizers: the {owner} alone has 1 of its tokens" in fault
    assert list_faults(objectives="[{type: uld}, {type: cross_entropy}]", lmbda="0") == []


def test_heads_of_several_sizes_are_padding_where_the_tokenizers_are_equal(pair: Path) -> None:
    saved(llama(1, vocabulary=64), pair / "teacher", chat_tokenizer())
    assert list_faults() == []


def test_a_head_without_a_row_for_each_token_is_refused(pair: Path) -> None:
    size = len(chat_tokenizer())
    change_config(pair / "teacher", vocab_size=size)
    assert list_faults() == []
    change_config(pair / "teacher", vocab_size=size - 1)
    (fault,) = list_faults()
    assert f"teacher has {size - 1} vocabulary entries, too few for the token " in fault
    assert f"id {size - 1}" in fault


def test_tokens_that_the_student_added_pass_beside_a_further_teacher(pair: Path) -> None:
    """As the trainer does; the cell's own teacher has to know every token of the student."""
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<call>"])
    saved(llama(1), pair / "student", tokenizer)
    saved(llama(1), pair / "other", tokenizer)
    teachers = {"teacher": "./other", "teachers": "{first: ./teacher}"}
    assert list_faults(**teachers, objectives="[{beta: 0, teachers: [first]}]") == []
    (fault,) = list_faults()
    assert "the student alone has 1 of its tokens, such as '<call>'" in fault


def test_texts_longer_than_the_positions_are_refused(pair: Path) -> None:
    assert list_faults(max_output_tokens="4000") == []  # rotary positions have no last one
    change_config(pair / "student", rope_parameters=None, rope_theta=None, max_position_embeddings=47)
    (fault,) = list_faults()
    assert "student has 47 positions, too few for max_input_tokens 32 and max_output_tokens 16" in fault
    assert list_faults(max_output_tokens="15") == []


def test_an_evaluations_length_counts(pair: Path) -> None:
    change_config(pair / "student", rope_parameters=None, rope_theta=None, max_position_embeddings=48)
    (fault,) = list_faults(evaluations="[{decoding: greedy, max_output_tokens: 17}]")
    assert "max_output_tokens 17" in fault


def test_a_split_that_is_needed_and_not_there_is_a_fault(pair: Path) -> None:
    (pair / "rows" / "test.jsonl").unlink()
    (fault,) = list_faults()
    assert "has no split 'test'; it has: train" in fault
    assert list_faults(evaluations="[{decoding: greedy, split: validation}]") == []


def test_faults_of_data_and_models_come_together(pair: Path) -> None:
    (pair / "teacher" / "config.json").unlink()
    faults = list_faults(**{"data.columns.prompt": "question", "student": "./studnt"})
    assert len(faults) == 3
    text = "\n".join(faults)
    assert "no column 'question'" in text
    assert "did you mean the folder ./student?" in text
    assert "config.json is missing" in text


def test_an_adapter_without_weights_and_damaged_settings_are_named(pair: Path) -> None:
    (pair / "teacher/generation_config.json").write_text('{\n  "a": 1,\n')
    (pair / "teacher/tokenizer_config.json").write_bytes(b"\xff\xfe")
    (pair / "student/adapter_config.json").write_text("{}")
    assert list_faults() == [
        f"  {pair}/teacher/generation_config.json:3 is not valid JSON; copy the file again",
        f"  {pair}/teacher/tokenizer_config.json cannot be read as text; copy the file again",
        f"  {pair}/student has no weights of its adapter: adapter_model.safetensors is missing",
    ]


def test_an_adapter_and_a_gguf_file_are_left_to_their_loaders(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"weights")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        files = CheckpointFiles(path)
        assert (list(files.list_faults()), files.family, files.max_positions) == ([], None, None)


def test_plan_checks_a_pair_without_torch_and_exits_with_2(pair: Path) -> None:
    (pair / "teacher" / "tokenizer.json").unlink()
    Path("mine.yaml").write_text(
        "description: d\ntask: text\ndata: {source: rows}\nteacher: ./teacher\nstudent: ./student\n"
        "max_input_tokens: 32\nmax_output_tokens: 16\n"
    )
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "from gkd_lab.cli import main; main(['plan', 'mine.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_plan_shows_the_papers_cells_and_all_missing_revisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gkd_lab.cli import main

    monkeypatch.chdir(tmp_path)
    words = [
        "plan",
        "lambda_beta_arithmetic",
        "--scale",
        "paper",
        "--set",
        "student=small",
        "--set",
        "seed=0",
    ]
    with pytest.raises(SystemExit) as stop:
        main(words)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    rows = [line.split() for line in printed.out.splitlines() if " arithmetic " in line]
    assert len(rows) == 15
    assert {row[0] for row in rows} == {"?"}  # no fingerprint without commits
    assert "unknown" not in printed.out  # the sizes of standard T5s are known
    missing = json.loads(printed.err.partition("outputs/revisions.json: ")[2])
    assert missing == {
        "datasets": {"openai/gsm8k": "COMMIT"},
        "models": {"google/flan-t5-small": "COMMIT", "google/flan-t5-xl": "COMMIT"},
    }
    with pytest.raises(SystemExit) as stop:
        main(["run", *words[1:]])
    assert stop.value.code == 2
    assert "3 hub names are unknown" in capsys.readouterr().err
