"""A user's folder: a tiny student and teacher, their data as jsonl, and the file of a run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gkd_lab.cli import main

from ..training.scripts import chat_tokenizer, conversations, llama, saved

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "data",
    "output_dir": "out",
    "max_new_tokens": 4,
    "max_length": 32,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
"""Two steps of two rows on the CPU in float32; everything else as TRL has it."""
RunCommand = Callable[..., tuple[int, str, str]]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_user_folder(folder: Path, build: Callable[..., PreTrainedModel] = llama) -> None:
    """Write student/, teacher/ and data/ with 12 rows to train on, 3 to validate and 5 to test."""
    tokenizer = chat_tokenizer()
    saved(build(4), folder / "student", tokenizer)  # of this seed the answers differ from row to row
    saved(build(1, width=24), folder / "teacher", tokenizer)
    rows = conversations(20)
    for split, part in (("train", rows[:12]), ("validation", rows[12:15]), ("test", rows[15:])):
        write_rows(folder / "data" / f"{split}.jsonl", part)


def write_run_file(**changes: Any) -> str:
    """Write run.yaml with these changes; None leaves an option out."""
    options = {name: value for name, value in {**RUN, **changes}.items() if value is not None}
    Path("run.yaml").write_text(yaml.safe_dump(options))
    return "run.yaml"


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run `gkd-lab` in this process; return (exit status, stdout, stderr)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def run_child(
    *words: str, launcher: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python [LAUNCHER] -m gkd_lab WORDS` with these environment variables, logged in by them alone."""
    command = [sys.executable, *launcher, "-m", "gkd_lab", *words]
    plain = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HOME")}
    environment = plain | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def write_own_answers(path: Path | None, model: str, wrong: int = 0) -> tuple[list[str], list[list[str]]]:
    """Let a model answer the validation or test rows greedily, by transformers' own `generate`.

    path: File whose rows, but the last `wrong` ones, get these answers as references; None: no file, and the
    rows are those of data/validation.jsonl. Returns (answers, references).
    """
    source = path or Path("data/validation.jsonl")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    tokenizer, student = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    answers = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = student.generate(**prompt, max_new_tokens=RUN["max_new_tokens"], do_sample=False)
        answers.append(
            tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
    for row, answer in list(zip(rows, answers, strict=True))[: len(rows) - wrong] if path else ():
        row["messages"][-1]["content"] = answer
    if path is not None:
        write_rows(path, rows)
    return answers, [[row["messages"][-1]["content"]] for row in rows]


def read_yaml_block(text: str, title: str) -> dict[str, Any]:
    """Return the YAML below a heading of a card."""
    return yaml.safe_load(text.partition(f"## {title}")[2].partition("```yaml\n")[2].partition("```")[0])
