"""`gkd-lab train`: the student it makes, what it scores and writes, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from gkd_lab.metrics.text_metrics import Scorer
from gkd_lab.scripts.train_help import HELP_FILE, format_help

from ..training.scripts import config, t5, trainer, weights
from .user_pair import (
    RUN,
    read_yaml_block,
    run_command,
    write_own_answers,
    write_rows,
    write_run_file,
    write_user_folder,
)

EVALUATED = {
    "metrics": ["rouge1", "exact_match", "bleu"],
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "max_steps": 4,
}

CHOSEN_BY_THE_TEST = "The same split chose the checkpoint"


def read_log(checkpoint: str) -> list[dict[str, Any]]:
    """Return the log of a run from the Trainer's state in a checkpoint."""
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]


def load_weights(path: str) -> dict[str, torch.Tensor]:
    return weights(AutoModelForCausalLM.from_pretrained(path))


def assert_equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ---- the student ----


def test_a_file_and_flags_train_the_student_that_the_trainer_in_a_script_trains(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run_file(lmbda=0.5, beta=0.9)
    status, output, _ = run_command(capsys, "train", "--config", "run.yaml", "--beta", "0.1", "--seed=7")
    assert status == 0 and "student: out" in output
    rows = [json.loads(line) for line in Path("data/train.jsonl").read_text().splitlines()]
    arguments = {name: RUN[name] for name in ("max_new_tokens", "max_length", "max_steps")}
    args = config(folder / "direct", lmbda=0.5, beta=0.1, seed=7, **arguments)
    direct = trainer(folder, rows, model="student", teacher="teacher", arguments=None, args=args)
    direct.train()
    trained = load_weights("out")
    assert_equal_weights(trained, weights(direct.model))
    start = load_weights("student")
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert AutoTokenizer.from_pretrained("out").chat_template


def test_an_encoder_decoder_pair_is_distilled_on_a_parquet_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow
    import pyarrow.parquet

    write_user_folder(tmp_path, t5)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"what is {word} ?", "completion": word} for word in ("one", "two", "three", "four")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "mine.parquet")
    write_run_file(dataset_name="mine.parquet", test_split_size=0.5, metrics=["rouge1"])
    status, output, _ = run_command(capsys, "train", "--config", "run.yaml")
    assert status == 0 and re.search(r"test rouge1: \d+\.\d\d \[.*\], 2 examples", output)
    assert AutoModelForSeq2SeqLM.from_pretrained("out").config.is_encoder_decoder


def test_a_mixture_of_files_is_trained_on_and_named_in_the_card(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [{"path": "json", "data_files": str(folder / f"data/{name}.jsonl")} for name in ("train", "test")]
    write_run_file(dataset_name=None, datasets=parts, test_split_size=4, metrics=["rouge1"])
    assert run_command(capsys, "train", "--config", "run.yaml")[0] == 0
    text = Path("out/README.md").read_text()
    assert "trained on: 13 rows of `train`; scored: 4 rows of `test`" in text
    settings = read_yaml_block(text, "Settings, as `gkd-lab train` takes them")
    names = [part["data_files"] for part in settings["datasets"]]
    assert names == ["train.jsonl", "test.jsonl"] and str(folder) not in text


def test_a_lora_student_is_saved_as_an_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run_file(use_peft=True, lora_target_modules=["q_proj"], lora_r=2)
    assert run_command(capsys, "train", "--config", "run.yaml")[0] == 0
    assert Path("out/adapter_model.safetensors").is_file() and not Path("out/model.safetensors").exists()
    assert ModelCard(Path("out/README.md").read_text()).data.library_name == "peft"


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run_file(save_strategy="steps", save_steps=2, max_steps=4)
    assert run_command(capsys, "train", "--config", "run.yaml")[0] == 0
    straight = load_weights("out")
    for path in Path("out").glob("checkpoint-4/*"):
        path.unlink()
    Path("out/checkpoint-4").rmdir()
    Path("out/model.safetensors").unlink()
    words = ("train", "--config", "run.yaml", "--resume_from_checkpoint", "true")
    assert run_command(capsys, *words)[0] == 0
    assert_equal_weights(load_weights("out"), straight)


# ---- evaluation during training ----


def test_evaluations_report_the_scores_of_the_students_own_greedy_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The student's own answers are the references of two of the three rows, and the third has another one.
    write_own_answers(Path("data/validation.jsonl"), "student", wrong=1)
    write_run_file(**EVALUATED, eval_on_start=True, dataset_eval_split="validation", learning_rate=0.1)
    status, output, _ = run_command(capsys, "train", "--config", "run.yaml")
    assert status == 0 and "'eval_rouge1'" in output
    evaluations = [row for row in read_log("out/checkpoint-4") if "eval_rouge1" in row]
    assert [row["step"] for row in evaluations] == [0, 1, 2, 3, 4]
    assert evaluations[0]["eval_exact_match"] == pytest.approx(200 / 3)
    assert all({"eval_loss", "eval_bleu", "eval_mean_length"} < row.keys() for row in evaluations)
    assert len({row["eval_rouge1"] for row in evaluations}) > 1
    for row in evaluations[1:]:
        texts, references = write_own_answers(None, f"out/checkpoint-{row['step']}")
        scores = Scorer().score_many(EVALUATED["metrics"], texts, references)
        for name, score in scores.items():
            assert row[f"eval_{name}"] == pytest.approx(score.value), (row["step"], name)


def test_the_saved_student_is_the_checkpoint_with_the_best_score(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The references are what the student wrote before it was trained, so that training loses them.
    write_own_answers(Path("data/validation.jsonl"), "student")
    write_run_file(
        **EVALUATED,
        dataset_eval_split="validation",
        learning_rate=0.1,
        load_best_model_at_end=True,
        metric_for_best_model="rouge1",
    )
    assert run_command(capsys, "train", "--config", "run.yaml")[0] == 0
    state = json.loads(Path("out/checkpoint-4/trainer_state.json").read_text())
    scores = [row["eval_rouge1"] for row in state["log_history"] if "eval_rouge1" in row]
    best = Path(state["best_model_checkpoint"]).name
    assert state["best_metric"] == max(scores) and best != "checkpoint-4"
    assert_equal_weights(load_weights("out"), load_weights(f"out/{best}"))
    assert CHOSEN_BY_THE_TEST not in Path("out/README.md").read_text()


def test_training_stops_early_when_the_score_no_longer_grows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run_file(
        **{**EVALUATED, "max_steps": 12},
        learning_rate=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rouge1",
        early_stopping_patience=2,
    )
    assert run_command(capsys, "train", "--config", "run.yaml")[0] == 0
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]
    # No other rows were named to choose the checkpoint by, and the card says so beside the scores.
    assert CHOSEN_BY_THE_TEST in Path("out/README.md").read_text()


# ---- the card ----


def test_the_card_has_scores_with_intervals_and_provenance_and_nothing_private(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "secret0123456789abcdef"
    monkeypatch.setenv("HF_TOKEN", token)
    write_own_answers(Path("data/test.jsonl"), "teacher", wrong=2)
    write_run_file(
        model_name_or_path=str(folder / "student"),
        teacher_model_name_or_path=str(folder / "teacher"),
        dataset_name=str(folder / "data"),
        output_dir=str(folder / "out"),
        hub_token=token,
        metrics=["rouge1", "accuracy"],
        lmbda=1.0,
        beta=0.0,
        seed=5,
    )
    assert run_command(capsys, "train", "--config", "run.yaml")[0] == 0
    text = Path("out/README.md").read_text()
    scores = json.loads(Path("out/test_scores.json").read_text())["scores"]
    results = {result.metric_name: result for result in ModelCard(text).data.eval_results}
    for name in ("rouge1", "accuracy"):
        result, score = results[f"{name} (greedy)"], scores[name]
        assert (result.metric_value, result.dataset_split) == (score["value"], "test")
        ends = {"low": score["low"], "high": score["high"], "interval": "95 %", "examples": 5}
        assert result.metric_args == ends
        assert f"[{score['low']:.2f}, {score['high']:.2f}] | 5 |" in text
    provenance = read_yaml_block(text, "Provenance")
    assert provenance["seed"] == 5 and provenance["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{16}", provenance["code"])
    assert provenance["rows"].keys() == {"train", "test"} and provenance["weights"]["teacher"].startswith(
        "sha256:"
    )
    assert "forward KL" in text and "lmbda = 1: on-policy" in text
    for private in (token, str(folder), str(Path.home()), "/tmp"):
        assert private not in text


def test_the_hash_of_the_rows_in_the_card_changes_with_the_rows_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run_file(max_steps=1)
    hashes = []
    for change in (None, None, {"prompt": "what is one ?", "completion": "two"}):
        if change is not None:
            rows = [json.loads(line) for line in Path("data/train.jsonl").read_text().splitlines()]
            write_rows(Path("data/train.jsonl"), [change, *rows[1:]])
        assert run_command(capsys, "train", "--config", "run.yaml", f"--output_dir=out{len(hashes)}")[0] == 0
        text = Path(f"out{len(hashes)}/README.md").read_text()
        hashes.append(read_yaml_block(text, "Provenance")["rows"]["train"])
    assert hashes[0] == hashes[1] != hashes[2]


# ---- requests that are refused ----

REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "an unknown flag": (("--learing_rate", "1"), {}, "did you mean '--learning_rate'?"),
    "an unknown line": ((), {"lambda": 0.5}, "run.yaml: unknown option 'lambda'; did you mean 'lmbda'?"),
    "a word": (("fast",), {}, "unexpected 'fast'"),
    "a padded number": ((), {"seed": "010"}, "seed: '010' is not valid: must have no leading zeros"),
    "text for a number": (
        (),
        {"learning_rate": "fast"},
        "learning_rate: 'fast' is not valid: must be a number",
    ),
    "a flag's text for a number": (("--max_steps", "x"), {}, "--max_steps: invalid int value: 'x'"),
    "a flag's padded number": (("--max_steps", "010"), {}, "--max_steps: '010' is not valid"),
    "a flag's number with _": (("--learning_rate=1_000",), {}, "did you mean 1000?"),
    "an infinite number": (
        ("--logging_steps", "1e400"),
        {},
        "--logging_steps: '1e400' is not valid: must be a",
    ),
    "a choice": (("--optim", "adamm"), {}, "--optim: 'adamm' is not valid"),
    "a list for a number": ((), {"beta": [0.1, 0.2]}, "must be one value, not a list"),
    "no student": ((), {"model_name_or_path": None}, "model_name_or_path is missing"),
    "no teacher": ((), {"teacher_model_name_or_path": None}, "teacher_model_name_or_path is missing"),
    "no data": ((), {"dataset_name": None}, "dataset_name is missing"),
    "a student that is not here": ((), {"model_name_or_path": "studnet"}, "did you mean 'student'?"),
    "a folder that is not here": ((), {"teacher_model_name_or_path": "./teachre"}, "no folder './teachre'"),
    "data that is not here": ((), {"dataset_name": "dta"}, "did you mean 'data'?"),
    "data of the hub, offline": (
        (),
        {"dataset_name": "some/rows"},
        "'some/rows' is neither a file nor a folder",
    ),
    "a model of the hub, offline": (
        (),
        {"model_name_or_path": "some/model"},
        "'some/model' cannot be loaded",
    ),
    "a split": ((), {"dataset_train_split": "trian"}, "unknown split 'trian'; did you mean 'train'?"),
    "a metric": ((), {"metrics": ["rouge7"]}, "unknown metric 'rouge7'"),
    "a choice by no score": (
        (),
        {"metric_for_best_model": "bleu", "eval_strategy": "epoch"},
        "'bleu' is not reported (name it in `metrics`)",
    ),
    "patience without evaluations": ((), {"early_stopping_patience": 1}, "needs evaluations"),
    "lmbda above 1": ((), {"lmbda": 1.5}, "lmbda"),
    "no tokens": (("--max_new_tokens", "0"), {}, "max_new_tokens: 0 is not valid: must be at least 1"),
    "an empty batch": (("--per_device_train_batch_size", "0"), {}, "must be at least 1"),
    "no checkpoint": (("--resume_from_checkpoint", "true"), {}, "there is no checkpoint in 'out'"),
    "a file as the folder": ((), {"output_dir": "run.yaml"}, "'run.yaml' is a file"),
    "an option that does not fit": ((), {"packing": True}, "packing=True does not fit GKD"),
    "a push, offline": ((), {"push_to_hub": True}, "HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize(("words", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_request_gives_one_message_and_exit_status_2(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
) -> None:
    write_run_file(**changes)
    status, output, error = run_command(capsys, "train", "--config", "run.yaml", *words)
    assert (status, output) == (2, "") and message in error
    assert error.startswith("gkd-lab: ") and error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "what is one ?"}], "has the columns question"),
        ([{"prompt": "what is one ?"}], "set `lmbda: 1`"),
        ([], "is empty"),
        (
            [{"prompt": [{"role": "user", "content": 3}], "completion": "one"}],
            "the first row of the split 'train'",
        ),
    ],
    ids=["columns", "no completion", "no rows", "content"],
)
def test_rows_that_do_not_fit_are_refused_before_the_models_are_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], message: str
) -> None:
    write_rows(Path("rows.jsonl"), rows)
    write_run_file(dataset_name="rows.jsonl")
    for model in ("student", "teacher"):
        Path(model, "model.safetensors").unlink()
    status, _, error = run_command(capsys, "train", "--config", "run.yaml")
    assert status == 2 and message in error


def test_a_damaged_line_of_the_data_is_named_by_file_and_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("data/train.jsonl").open("a") as file:
        file.write("{broken\n")
    write_run_file()
    status, _, error = run_command(capsys, "train", "--config", "run.yaml")
    assert status == 2 and "train.jsonl:13" in error


def test_training_that_diverges_ends_with_status_1_and_names_the_log(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run_file(learning_rate=1e12, max_grad_norm=0.0, max_steps=5)
    status, _, error = run_command(capsys, "train", "--config", "run.yaml")
    assert status == 1 and "out/_error.txt" in error and error.count("\n") == 1
    assert "Traceback" in Path("out/_error.txt").read_text()


# ---- help ----


def test_the_help_is_todays_and_needs_no_torch() -> None:
    assert HELP_FILE.read_text() == format_help(), "run `python -m gkd_lab.scripts.train_help`"
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'trl', 'datasets')))\n"
        "from gkd_lab.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    helped = [
        subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        ).stdout
        for words in (("train", "--help"), ("--help",), ("push", "--help"))
    ]
    assert "--teacher_model_name_or_path" in helped[0] and "--repo" in helped[2]
    commands = re.findall(r"^  ([a-z]+)  ", helped[1], re.MULTILINE)
    assert {"train", "push"} <= set(commands)
