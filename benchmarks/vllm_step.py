"""Time a step at lmbda 1 whose text vLLM samples, against one that the trainer samples itself.

    python benchmarks/vllm_step.py [--smoke] [--steps N] [--out FILE.json]

Where vllm is not installed, and with --smoke, the second alone is timed.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from grid import GPU, SMALL, Grid, build_model, build_rows, get_settings
from rich.console import Console
from rich.table import Table
from step_timing import StepClock, build_arguments, build_tokenizer, describe_machine
from transformers import AutoModelForCausalLM

from gkd_lab import GKDConfig, GKDTrainer


def save_student(grid: Grid, folder: Path) -> None:
    """Write the grid's student in bfloat16, and the tokenizer: vLLM reads a checkpoint, in its dtype."""
    build_model(grid.student, grid, 0).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def measure(grid: Grid, steps: int, student: Path, *, use_vllm: bool) -> dict[str, float]:
    """Return the median milliseconds of a step, and of its sampling."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = get_settings(grid, steps, bf16=torch.cuda.is_available())
        settings |= {"use_vllm": use_vllm, "vllm_max_model_length": 2 * (grid.prompt + grid.answer)}
        trainer = GKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(student),
            teacher_model=build_model(grid.teacher, grid, 1),
            args=build_arguments(GKDConfig, folder, lmbda=1.0, **settings),
            train_dataset=build_rows(grid, steps),
            processing_class=build_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        clock.time_method(trainer, "sample_completions", "sampling")
        trainer.train()
    return {
        "step_ms": 1000 * statistics.median(clock.step_seconds),
        "sampling_ms": 1000 * statistics.median(parts["sampling"] for parts in clock.part_seconds),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small models, one step, without vLLM")
    parser.add_argument("--steps", type=int, help="steps timed of each way")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    grid = GPU if torch.cuda.is_available() and not options.smoke else SMALL
    has_vllm = importlib.util.find_spec("vllm") is not None and not options.smoke
    ways = {"own sampling": False, **({"vLLM": True} if has_vllm else {})}
    with tempfile.TemporaryDirectory() as folder:
        save_student(grid, Path(folder))
        figures = {
            name: measure(grid, options.steps or (1 if options.smoke else 6), Path(folder), use_vllm=use_vllm)
            for name, use_vllm in ways.items()
        }
    table = Table("", "step, ms", "sampling, ms", title=f"{grid.name}, {grid.rows} rows, lmbda 1")
    for name, way in figures.items():
        table.add_row(name, f"{way['step_ms']:,.0f}", f"{way['sampling_ms']:,.0f}")
    Console().print(table)
    if not has_vllm:
        print("vLLM was not timed: " + ("--smoke" if options.smoke else "it is not installed"))
    if options.out is not None:
        facts = {**describe_machine(), "grid": grid.name, "has_vllm": has_vllm, "steps": figures}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
