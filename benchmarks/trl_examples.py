"""Run scripts of TRL's own repository with the import of trainer and configuration changed, and nothing else.

    python benchmarks/trl_examples.py [CHECKOUT] [--steps N | --smoke]

The scripts of the installed package (`trl/scripts`) are read where they are, and with a CHECKOUT of TRL its
`examples/scripts/gkd.py` too. A copy with the changed import runs in a temporary folder, and one as it is,
each in a process of its own on the CPU, with tiny local models and rows made here.
Exit status: 0; 1 if a script fails with the changed import; 2 if the request is wrong.
"""

import argparse
import ast
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import trl
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl_tests import OFFLINE, build_byte_tokenizer, make_rows

PACKAGED = ("sft.py", "distillation.py")
"""Scripts of the installed package that train a language model on texts."""
EXAMPLE = Path("examples/scripts/gkd.py")
REPLACED = {
    "GKDTrainer": "GKDTrainer",
    "SFTTrainer": "GKDTrainer",
    "DistillationTrainer": "GKDTrainer",
    "GKDConfig": "GKDConfig",
    "SFTConfig": "GKDConfig",
    "DistillationConfig": "GKDConfig",
}
"""TRL's trainers and configurations, and ours."""
ARGUMENTS = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "rows",
    "output_dir": "trained",
    "per_device_train_batch_size": "2",
    "learning_rate": "1e-3",
    "max_length": "128",
    "logging_steps": "1",
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
}
"""Arguments of every script, as a user gives them on the command line."""
UNKNOWN_TO_TRL = {"sft.py": "teacher_model_name_or_path", "distillation.py": "max_length"}
"""The argument that TRL's own configuration of a script has not."""


@dataclass(frozen=True)
class Outcome:
    """Result of running one script."""

    passed: bool
    seconds: float
    losses: tuple[float, ...]
    reason: str = ""


def main() -> int:
    """Run each script as it is and with the changed import, print a table, return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, nargs="?", help="folder of a TRL checkout")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each script")
    parser.add_argument("--smoke", action="store_true", help="one step, changed import only")
    options = parser.parse_args()
    if options.checkout and not (options.checkout / EXAMPLE).is_file():
        print(f"{options.checkout} is no checkout of TRL: it has no {EXAMPLE}", file=sys.stderr)
        return 2
    scripts = [Path(trl.__file__).parent / "scripts" / name for name in PACKAGED]
    scripts += [options.checkout.resolve() / EXAMPLE] if options.checkout else []
    versions = {"gkd_lab": importlib.metadata.version("gkd-lab"), "trl": importlib.metadata.version("trl")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{'script':20} {'import':8} {'result':8} {'seconds':>7}  losses")
    failed = 0
    for script in scripts:
        for package in ("gkd_lab",) if options.smoke else ("trl", "gkd_lab"):
            outcome = run_script(script, package, 1 if options.smoke else options.steps)
            failed += package == "gkd_lab" and not outcome.passed
            print_outcome(script.name, package, outcome)
    return 1 if failed else 0


def run_script(script: Path, package: str, steps: int) -> Outcome:
    """Run a script with the import of `package` ("trl": as it is) in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        source = script.read_text(encoding="utf-8")
        (folder / "script.py").write_text(change_imports(source) if package == "gkd_lab" else source, "utf-8")
        arguments = {**ARGUMENTS, "max_steps": str(steps)}
        if package == "trl":
            arguments.pop(UNKNOWN_TO_TRL.get(script.name, ""), None)
        start = time.perf_counter()
        finished = subprocess.run(
            [sys.executable, "script.py", *(f"--{name}={value}" for name, value in arguments.items())],
            cwd=folder,
            env={**os.environ, **OFFLINE, "HF_HOME": str(folder / "cache"), "TRL_EXPERIMENTAL_SILENCE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if finished.returncode:
            return Outcome(False, seconds, (), get_error(finished.stderr))
        return judge_training(folder, seconds, steps)


def get_error(text: str) -> str:
    """Return the last line of standard error that names an error, or the last of all."""
    lines = text.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])


def change_imports(source: str) -> str:
    """Return a script that takes TRL's trainers and configurations (`REPLACED`) from gkd_lab.

    Raises ValueError if it imports none.
    """
    lines = source.splitlines()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    changed = False
    for node in sorted(imports, key=lambda node: -node.lineno):
        ours = [alias for alias in node.names if alias.name in REPLACED]
        if not (node.module or "").startswith("trl") or not ours:
            continue
        others = [alias.name for alias in node.names if alias not in ours]
        parts = [f"from {node.module} import {', '.join(others)}"] if others else []
        for alias in ours:
            parts.append(f"from gkd_lab import {REPLACED[alias.name]} as {alias.asname or alias.name}")
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + part for part in parts]
        changed = True
    if not changed:
        raise ValueError(f"the script imports none of {', '.join(REPLACED)} from trl")
    return "\n".join(lines) + "\n"


def judge_training(folder: Path, seconds: float, steps: int) -> Outcome:
    """Return whether every step logged a finite loss and the saved model's weights moved."""
    (state,) = (folder / "trained").glob(f"checkpoint-{steps}/trainer_state.json")
    history: Sequence[Mapping[str, float]] = json.loads(state.read_text())["log_history"]
    losses = tuple(float(row["loss"]) for row in history if "loss" in row)
    start, end = (load_file(folder / name / "model.safetensors") for name in ("student", "trained"))
    moved = start.keys() == end.keys() and any(not torch.equal(start[name], end[name]) for name in start)
    if not moved:
        return Outcome(False, seconds, losses, "no weight moved")
    if len(losses) != steps or not all(map(math.isfinite, losses)):
        return Outcome(False, seconds, losses, "a step has no finite loss")
    return Outcome(True, seconds, losses)


def make_inputs(folder: Path) -> None:
    """Write two tiny models with their tokenizer, and rows of the form `messages`."""
    tokenizer = build_byte_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_rows(folder / "rows")


def print_outcome(script: str, package: str, outcome: Outcome) -> None:
    """Print a row of the table: first and last loss, or the reason of a failure."""
    losses = " ".join(f"{loss:.4f}" for loss in outcome.losses) if outcome.passed else outcome.reason
    result = "trains" if outcome.passed else "fails"
    print(f"{script:20} {package:8} {result:8} {outcome.seconds:7.1f}  {losses}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
