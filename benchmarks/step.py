"""Time an optimizer step at lmbda 0, 0.5 and 1: ours against TRL's GKDTrainer.

    python benchmarks/step.py [--small | --large | --smoke] [--steps N] [--turns N] [--out FILE.json]

Both get the same models, rows, precision and coin, and sample with a KV cache (gradient checkpointing off:
with it on TRL samples without). The two take turns, run by run, and each step is timed by itself; a ratio is
of medians. Target: ours is never slower.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from step_timing import (
    StepClock,
    build_arguments,
    build_chats,
    build_llama,
    build_tokenizer,
    describe_machine,
    merge_turns,
    time_trl_steps,
)
from transformers import LlamaForCausalLM

from gkd_lab import GKDConfig, GKDTrainer

LMBDAS = (0.0, 0.5, 1.0)
SEED = 42
"""Default of both configurations."""


@dataclass(frozen=True)
class Size:
    """Width and layers of student and teacher, vocabulary, rows of a step, prompt and answer tokens."""

    name: str
    student: tuple[int, int]
    teacher: tuple[int, int]
    vocabulary: int
    rows: int
    prompt: int
    answer: int
    dtype: torch.dtype = torch.float32


NANO = Size("nano", (64, 2), (128, 4), 600, 16, 24, 24)
SMALL_LM = Size("25 M, V = 32,768", (256, 4), (384, 6), 32_768, 4, 48, 32)
HALF_B = Size("0.5 B, T = 1,024", (896, 24), (1536, 28), 151_936, 4, 512, 512, torch.bfloat16)


def build_model(shape: tuple[int, int], size: Size, seed: int) -> LlamaForCausalLM:
    """Build the student or the teacher of a size, with random weights."""
    width, layers = shape
    model = build_llama(
        width=width,
        layers=layers,
        feed_forward=3 * width,
        heads=max(4, width // 64),
        vocabulary=size.vocabulary,
        positions=2048,
        seed=seed,
    )
    return model.to(size.dtype)


def build_rows(size: Size, steps: int) -> list[dict[str, Any]]:
    """Build the chats of `steps` timed steps and one before them."""
    return build_chats(size.rows * (steps + 1), prompt_words=size.prompt - 6, answer_words=size.answer - 1)


def get_settings(size: Size, steps: int, *, bf16: bool) -> dict[str, Any]:
    """Return the settings that both trainers get."""
    return {"steps": steps, "rows": size.rows, "answer_tokens": size.answer, "bf16": bf16}


def time_run(trainer_name: str, size: Size, lmbda: float, steps: int) -> list[float]:
    """Return the seconds of each step but the first, of `ours` or of `trl`."""
    student, teacher = build_model(size.student, size, 0), build_model(size.teacher, size, 1)
    chats = build_rows(size, steps)
    settings = get_settings(size, steps, bf16=size.dtype == torch.bfloat16)
    if trainer_name == "trl":
        return time_trl_steps(student, teacher, chats, lmbda=lmbda, seed=SEED, **settings)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=build_arguments(GKDConfig, folder, lmbda=lmbda, **settings),
            train_dataset=chats,
            processing_class=build_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock.step_seconds


def compare_trainers(size: Size, lmbda: float, steps: int, turns: int) -> dict[str, Any]:
    """Return medians over steps, and the range of the turns' ratios; steps at 0.5 are averaged."""
    average = statistics.median if lmbda in (0, 1) else statistics.fmean
    runs: dict[str, list[list[float]]] = {"ours": [], "trl": []}
    for turn in range(turns):
        for trainer_name in ("ours", "trl") if turn % 2 else ("trl", "ours"):
            runs[trainer_name].append(time_run(trainer_name, size, lmbda, steps))
    turn_ratios = [average(ours) / average(trl) for ours, trl in zip(runs["ours"], runs["trl"], strict=True)]
    # At 0.5 steps differ by kind, so turns are compared step by step before they are averaged.
    seconds = {
        trainer_name: average(merge_turns(turn_seconds)) for trainer_name, turn_seconds in runs.items()
    }
    return {
        "size": size.name,
        "lmbda": lmbda,
        "ours_ms": 1000 * seconds["ours"],
        "trl_ms": 1000 * seconds["trl"],
        "ratio": seconds["ours"] / seconds["trl"],
        "lowest": min(turn_ratios),
        "highest": max(turn_ratios),
    }


def build_table(rows: Sequence[dict[str, Any]], steps: int, turns: int) -> Table:
    """Build the table of all sizes and lmbdas."""
    table = Table(title=f"One optimizer step, {turns} turns of {steps} steps")
    for name in ("size", "lmbda", "ours, ms", "TRL, ms", "ours / TRL", "turns"):
        table.add_column(name, justify="left" if name == "size" else "right")
    for row in rows:
        table.add_row(
            row["size"],
            f"{row['lmbda']:g}",
            f"{row['ours_ms']:.0f}",
            f"{row['trl_ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['lowest']:.2f} to {row['highest']:.2f}",
        )
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="nano alone, in half a minute")
    parser.add_argument("--large", action="store_true", help="0.5 B alone; without a GPU 25 M alone")
    parser.add_argument("--smoke", action="store_true", help="nano alone, one turn of two steps")
    parser.add_argument("--steps", type=int, help="steps timed in a turn")
    parser.add_argument("--turns", type=int, help="how often each is run")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    large = HALF_B if torch.cuda.is_available() else SMALL_LM
    sizes = [NANO] if options.small or options.smoke else [large] if options.large else [NANO, large]
    steps, turns = (2, 1) if options.smoke else (6, 2) if options.small else (12, 3)
    steps, turns = options.steps or steps, options.turns or turns
    rows = [compare_trainers(size, lmbda, steps, turns) for size in sizes for lmbda in LMBDAS]
    Console().print(build_table(rows, steps, turns))
    if options.out is not None:
        options.out.write_text(json.dumps({**describe_machine(), "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
