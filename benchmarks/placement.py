"""Time a step and its peak memory with the teacher on the device, parked, and both models under FSDP2.

    python benchmarks/placement.py [--smoke] [--steps N] [--out FILE.json]

One rank each. The first two ways run in this process, those under FSDP2 in one that `accelerate launch`
starts with `docs/accelerate/fsdp2.yaml`. All must log the same losses. On a CPU, where accelerate never
chooses FSDP, the second process is told to, the models are small, no memory is reported and no sharded
teacher is parked, for which torch asks for pinned memory.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from rich.console import Console
from rich.table import Table
from step import HALF_B, NANO, Size, build_model, build_rows, get_settings
from step_timing import StepClock, build_arguments, build_tokenizer, describe_machine

from gkd_lab import GKDConfig, GKDTrainer

CONFIGURATION = Path(__file__).parents[1] / "docs/accelerate/fsdp2.yaml"
GPU = replace(HALF_B, name="0.5 B, T = 512", prompt=256, answer=256, dtype=torch.float32)
"""Weights in float32, computed with in bfloat16, as FSDP2 wants the weights that it trains."""
WAYS = {False: ("whole", "teacher parked"), True: ("FSDP2", "FSDP2, teacher parked")}
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}
"""Of a loss; under FSDP2 bfloat16 rounds at other places than under autocast."""


class ShardedOnCpu(GKDTrainer):
    """As accelerate would have it by `fsdp2.yaml` if it ever chose FSDP on a CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def measure(size: Size, steps: int, *, parked: bool, sharded: bool) -> dict[str, Any]:
    """Train on fixed text; return the median milliseconds of a step, the losses, and on a GPU the peak."""
    cuda = torch.cuda.is_available()
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = StepClock()
    trainer_class = ShardedOnCpu if sharded and not cuda else GKDTrainer
    teacher = build_model(size.teacher, size, 1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = get_settings(size, steps, bf16=cuda)
        args = build_arguments(GKDConfig, folder, lmbda=0.0, park_teacher=parked, **settings)
        args.logging_steps = 1
        trainer = trainer_class(
            model=build_model(size.student, size, 0),
            teacher_model=teacher.cpu() if parked else teacher,
            args=args,
            train_dataset=build_rows(size, steps),
            processing_class=build_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    figures = {"step_ms": 1000 * statistics.median(clock.step_seconds), "losses": losses}
    return {**figures, **({"peak_mib": torch.cuda.max_memory_allocated() / 2**20} if cuda else {})}


def measure_sharded(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the ways under FSDP2 in a process that accelerate starts."""
    out = folder / "sharded.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATION)]
    command += ["--num_processes", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "bf16" if torch.cuda.is_available() else "no"]
    command += [str(Path(__file__)), "--sharded", "--steps", str(options.steps), "--out", str(out)]
    command += ["--smoke"] if options.smoke else []
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    return dict(json.loads(out.read_text())["placement"])


def check_losses(figures: dict[str, Any]) -> None:
    """Raise SystemExit if a way's losses differ from those of the first."""
    tolerance = TOLERANCE["cuda" if torch.cuda.is_available() else "cpu"]
    (_, first), *others = figures.items()
    for name, way in others:
        for loss, expected in zip(way["losses"], first["losses"], strict=True):
            if not abs(loss / expected - 1) <= tolerance:
                raise SystemExit(f"{name}: losses {way['losses']} instead of {first['losses']}")


def print_figures(figures: dict[str, Any], size: Size) -> None:
    """Print a row a way."""
    table = Table(title=f"{size.name}, lmbda 0, one rank")
    for name in ("", "step, ms", "of the first", "peak, MiB", "first loss"):
        table.add_column(name, justify="left" if not name else "right")
    first = next(iter(figures.values()))
    for name, way in figures.items():
        peak = f"{way['peak_mib']:,.0f}" if "peak_mib" in way else ""
        ratio = f"{way['step_ms'] / first['step_ms']:.2f} x"
        table.add_row(name, f"{way['step_ms']:,.0f}", ratio, peak, f"{way['losses'][0]:.4f}")
    Console().print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="nano models, two steps")
    parser.add_argument("--steps", type=int, help="steps timed of each way")
    parser.add_argument("--sharded", action="store_true", help="the ways under FSDP2; set by this script")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    options = parser.parse_args()
    options.steps = options.steps or (2 if options.smoke else 5)
    transformers.logging.set_verbosity_error()
    size = GPU if torch.cuda.is_available() and not options.smoke else NANO
    names = WAYS[options.sharded][: None if torch.cuda.is_available() else 2 - options.sharded]
    figures: dict[str, Any] = {
        name: measure(size, options.steps, parked="parked" in name, sharded=options.sharded) for name in names
    }
    if not options.sharded:
        gc.collect()
        with tempfile.TemporaryDirectory() as folder:
            figures |= measure_sharded(options, Path(folder))
        print_figures(figures, size)
    if options.out is not None:
        facts = {**describe_machine(), "size": size.name, "placement": figures}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
    if not options.sharded:
        check_losses(figures)


if __name__ == "__main__":
    main()
