"""Time a grid of 15 cells as one pack, against a loop over TRL's GKDTrainer and the arithmetic it must do.

    python benchmarks/grid.py [--small | --smoke] [--steps N] [--turns N] [--precisions fp32 bf16]
        [--curve FILE.png] [--only comparison|curve] [--out FILE.json]
    python benchmarks/grid.py --curve FILE.png --redraw FILE.json

Same models (random weights, no end of sequence), rows, coin, steps and precision; TRL samples with its KV
cache (gradient checkpointing off). All take turns in one process and each step is timed by itself; a
trainer's set-up and first step are left out. The floor is the matrix products that the grid cannot do
without, at the rate that this machine reaches on one large product. `--curve` measures the cost against K,
in the first of the precisions, up to the K that memory holds; with `--redraw` it draws what `--out` has
written, and measures nothing.
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import warnings
from collections import defaultdict
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
    read_clock,
    time_trl_steps,
)
from transformers import LlamaForCausalLM, TrainerCallback

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.encoding.batches import Example
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import is_on_policy

LMBDAS, BETAS = (0.0, 0.5, 1.0), (0.0, 0.1, 0.5, 0.9, 1.0)
PACK_SIZES = (1, 3, 5, 15, 45)
"""Values of K that `--curve` measures."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like model without its embeddings."""

    layers: int
    width: int
    feed_forward: int
    heads: int

    def count_weights(self) -> int:
        """Count the entries of the matrices of all layers."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.feed_forward)

    def count_flops(self, rows: int, first: int, last: int, projected: int, vocabulary: int) -> int:
        """Count the products of a forward pass over the positions [first, last) of `rows` rows.

        A multiply-add counts 2. A position attends to itself and to those before it; the head is applied at
        `projected` positions a row.
        """
        tokens = last - first
        attended = (last * (last + 1) - first * (first + 1)) // 2
        attention = 4 * self.layers * self.width * attended
        return rows * (
            2 * self.count_weights() * tokens + attention + 2 * self.width * vocabulary * projected
        )


@dataclass(frozen=True)
class Grid:
    """Models, rows of a step, prompt and answer tokens."""

    name: str
    student: Shape
    teacher: Shape
    vocabulary: int
    rows: int
    prompt: int
    answer: int


QUICKSTART = Grid("quickstart-like", Shape(4, 128, 344, 4), Shape(8, 256, 688, 8), 600, 16, 24, 48)
SMALL = Grid("small", Shape(2, 64, 172, 4), Shape(4, 128, 344, 4), 600, 8, 12, 12)
GPU = Grid("67 M from 437 M", Shape(12, 512, 2048, 8), Shape(24, 1024, 4096, 16), 16_384, 16, 64, 64)
PRECISIONS = ("fp32", "bf16")


# ---- models and data ----


def build_model(shape: Shape, grid: Grid, seed: int) -> LlamaForCausalLM:
    """Build the student or the teacher of a grid, with random weights."""
    return build_llama(
        width=shape.width,
        layers=shape.layers,
        feed_forward=shape.feed_forward,
        heads=shape.heads,
        vocabulary=grid.vocabulary,
        positions=1024,
        seed=seed,
    )


def build_rows(grid: Grid, steps: int) -> list[dict[str, Any]]:
    """Build the chats of `steps` timed steps and one before them."""
    return build_chats(grid.rows * (steps + 1), prompt_words=grid.prompt - 6, answer_words=grid.answer - 2)


def build_cells(count: int, folder: str) -> list[CellArguments]:
    """Return the first `count` of lmbda x beta x seeds; fewer than a seed's 15 are spread over lmbda."""
    pairs = list(itertools.product(LMBDAS, BETAS))
    seed_pairs = pairs if count >= len(pairs) else [pairs[n * len(pairs) // count] for n in range(count)]
    if count == 1:
        seed_pairs = [(0.5, 0.5)]
    return [
        CellArguments(
            lmbda=lmbda,
            beta=beta,
            seed=n // len(seed_pairs),
            temperature=1.0,
            teacher_temperature=1.0,
            student_temperature=1.0,
            learning_rate=1e-5,
            output_dir=f"{folder}/{n}",
        )
        for n, (lmbda, beta) in enumerate((seed_pairs * count)[:count])
    ]


# ---- timed runs ----


def get_settings(grid: Grid, steps: int, bf16: bool) -> dict[str, Any]:
    """Return the settings that both trainers get."""
    return {"steps": steps, "rows": grid.rows, "answer_tokens": grid.answer, "bf16": bf16}


def time_trl_cell(grid: Grid, cell: CellArguments, steps: int, bf16: bool) -> list[float]:
    """Return the seconds of each step of one cell under TRL's trainer."""
    return time_trl_steps(
        build_model(grid.student, grid, 0),
        build_model(grid.teacher, grid, 1),
        build_rows(grid, steps),
        lmbda=cell.lmbda,
        seed=cell.seed,
        beta=cell.beta,
        **get_settings(grid, steps, bf16),
    )


def build_pack_trainer(
    grid: Grid, cells: Sequence[CellArguments], steps: int, args: GKDConfig, callback: TrainerCallback
) -> GKDTrainer:
    """Build our trainer of these cells as one pack."""
    tokenizer, student = build_tokenizer(), build_model(grid.student, grid, 0)
    return GKDTrainer(
        pack=Pack.build([student] * len(cells)) if len(cells) > 1 else Pack.build_single(student),
        cells=cells,
        teacher_model=build_model(grid.teacher, grid, 1),
        args=args,
        train_dataset=[encode_chat(tokenizer, row) for row in build_rows(grid, steps)],
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
        callbacks=[callback],
    )


def time_pack(grid: Grid, count: int, steps: int, bf16: bool) -> StepClock:
    """Train `count` cells as one pack; return the seconds of its steps and of their parts."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = build_arguments(GKDConfig, folder, **get_settings(grid, steps, bf16))
        trainer = build_pack_trainer(grid, build_cells(count, folder), steps, args, clock)
        trainer.remove_callback(transformers.PrinterCallback)
        clock.time_method(trainer, "sample_completions", "sampling")
        clock.time_method(trainer, "training_step", "training")
        for teacher in trainer.teachers:
            clock.time_method(teacher, "compute_output", "teacher")
        trainer.train()
    for parts in clock.part_seconds:
        parts["student"] = parts.pop("training") - parts.get("teacher", 0.0)
    return clock


def encode_chat(tokenizer: Any, row: dict[str, Any]) -> Example:
    """Encode the question as prompt and the answer as completion."""
    chat = row["messages"]
    prompt_ids = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    chat_ids = tokenizer.apply_chat_template(chat, return_dict=False)
    return Example(prompt_ids, chat_ids[len(prompt_ids) :])


# ---- the floor ----


def measure_matmul_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of one product of two square matrices, the best of ten; a GPU needs larger ones."""
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = read_clock()
        left @ right
        seconds.append(read_clock() - start)
    return 2 * side**3 / min(seconds)


def count_step_flops(grid: Grid, cells: Sequence[CellArguments], steps: int) -> dict[str, float]:
    """Count the products that a step of the grid cannot do without, the mean of the steps timed.

    Sampling: each prompt and each new token but the last, once for each cell whose coin says so. Teacher:
    each distinct sequence once. Student: forward, and twice that backward. Nothing for padding: rows are
    nearly of one length here.
    """
    end, count, vocabulary = grid.prompt + grid.answer, grid.rows, grid.vocabulary
    sampling = grid.student.count_flops(count, 0, end - 1, grid.answer, vocabulary)
    teacher = grid.teacher.count_flops(count, 0, end, grid.answer, vocabulary)
    student = 3 * grid.student.count_flops(count, 0, end, grid.answer, vocabulary)
    flops: dict[str, float] = defaultdict(float)
    for step in range(1, steps + 1):
        n_on_policy = sum(is_on_policy(cell.lmbda, cell.seed, step) for cell in cells)
        off_policy_seeds = {cell.seed for cell in cells if not is_on_policy(cell.lmbda, cell.seed, step)}
        flops["sampling"] += n_on_policy * sampling / steps
        flops["teacher"] += (n_on_policy + len(off_policy_seeds)) * teacher / steps
        flops["student"] += len(cells) * student / steps
    return flops


# ---- the comparison ----

PARTS = ("sampling", "teacher", "student", "rest")


def average_steps(turns: Sequence[Sequence[float]]) -> float:
    """Return the mean over steps of the median over turns."""
    return statistics.fmean(merge_turns(turns))


def compare_loops(
    grid: Grid, n_cells: int, steps: int, turns: int, precisions: Sequence[str]
) -> dict[str, Any]:
    """Return the seconds of a step of all cells, ours and TRL's, in each of the precisions."""
    cells = build_cells(n_cells, "")
    ours: dict[bool, list[StepClock]] = {False: [], True: []}
    trl: dict[bool, list[list[float]]] = {False: [], True: []}
    for turn in range(turns):
        for bf16 in (precision == "bf16" for precision in precisions):
            for trainer_name in ("ours", "trl") if turn % 2 else ("trl", "ours"):
                if trainer_name == "ours":
                    ours[bf16].append(time_pack(grid, len(cells), steps, bf16))
                else:
                    cell_seconds = [time_trl_cell(grid, cell, steps, bf16) for cell in cells]
                    trl[bf16].append([sum(step) for step in zip(*cell_seconds, strict=True)])
    figures: dict[str, Any] = {"grid": grid.name, "cells": len(cells), "steps": steps, "turns": turns}
    flops = count_step_flops(grid, cells, steps)
    for name in precisions:
        bf16 = name == "bf16"
        rate = measure_matmul_rate(torch.bfloat16 if bf16 else torch.float32)
        step_seconds = average_steps([clock.step_seconds for clock in ours[bf16]])
        parts = {
            part: average_steps(
                [[step.get(part, 0.0) for step in clock.part_seconds] for clock in ours[bf16]]
            )
            for part in PARTS[:-1]
        }
        parts["rest"] = step_seconds - sum(parts.values())
        figures[name] = {
            "ours_s": step_seconds,
            "trl_s": average_steps(trl[bf16]),
            "matmul_gflops": rate / 1e9,
            "floor_s": sum(flops.values()) / rate,
            "parts_s": parts,
            "floors_s": {part: value / rate for part, value in flops.items()},
        }
    return figures


def measure_pack_sizes(
    grid: Grid, pack_sizes: Sequence[int], steps: int, turns: int, precision: str
) -> list[dict[str, float]]:
    """Return the seconds of a step, and peak memory where a GPU counts it, for each K that fits."""
    seconds: dict[int, list[list[float]]] = defaultdict(list)
    peak_mib: dict[int, float] = {}
    for _ in range(turns):
        for count in pack_sizes:
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                clock = time_pack(grid, count, steps, bf16=precision == "bf16")
            except torch.OutOfMemoryError:
                print(f"out of memory at K = {count}")
                break
            seconds[count].append(clock.step_seconds)
            if torch.cuda.is_available():
                peak_mib[count] = torch.cuda.max_memory_allocated() / 2**20
    single_cell = average_steps(seconds[1])
    points = []
    for count in seconds:
        step_s = average_steps(seconds[count])
        point = {"cells": count, "step_s": step_s, "per_cell_s": step_s / count}
        point["against_loop"] = step_s / count / single_cell
        points.append({**point, **({"peak_mib": peak_mib[count]} if peak_mib else {})})
    return points


# ---- output ----


def plot_pack_sizes(points: Sequence[dict[str, float]], path: Path) -> None:
    """Draw the cost of a cell against K, in the style of the package's figures."""
    from gkd_lab.figures.layout import create_axes, set_panel_title
    from gkd_lab.figures.style import INK, LINE_COLORS, MARKERS, SMALL_SIZE, apply_style

    counts = [point["cells"] for point in points]
    per_cell = [1000 * point["per_cell_s"] for point in points]
    with apply_style():
        figure, (axes,) = create_axes(1, 2.3)
        axes.plot(counts, per_cell, color=LINE_COLORS[4], marker=MARKERS[0])
        for count, value in zip(counts, per_cell, strict=True):
            axes.annotate(
                f"{value:.0f}", (count, value), (3, 5), textcoords="offset points",
                color=INK, fontsize=SMALL_SIZE,
            )  # fmt: skip
        axes.set(xscale="log", xlabel="cells in a pack (K)", ylabel="ms a cell and step")
        axes.set_ylim(0, 1.15 * max(per_cell))
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.minorticks_off()
        axes.grid(False, axis="x")
        set_panel_title(axes, "Cost of a cell by the size of its pack")
        figure.savefig(path, dpi=200)


def print_comparison(console: Console, figures: dict[str, Any]) -> None:
    """Print the speed against TRL and the floor, and the parts of our step."""
    table = Table(title=f"{figures['cells']} cells, {figures['grid']}: ms a cell and step")
    for name in ("", "ours", "TRL loop", "speed-up", "against TRL fp32", "floor", "over floor"):
        table.add_column(name, justify="left" if not name else "right")
    parts = Table(title="Where ours goes: ms a cell and step (time over floor)")
    for name in ("", *PARTS):
        parts.add_column(name, justify="left" if not name else "right")
    scale = 1000 / figures["cells"]
    for name in (name for name in PRECISIONS if name in figures):
        row = figures[name]
        trl_fp32 = figures.get("fp32", {}).get("trl_s")
        table.add_row(
            name,
            f"{row['ours_s'] * scale:.0f}",
            f"{row['trl_s'] * scale:.0f}",
            f"{row['trl_s'] / row['ours_s']:.2f} x",
            f"{trl_fp32 / row['ours_s']:.2f} x" if trl_fp32 else "",
            f"{row['floor_s'] * scale:.0f} at {row['matmul_gflops']:.0f} GFLOP/s",
            f"{row['ours_s'] / row['floor_s']:.2f}",
        )
        entries = [
            f"{row['parts_s'][part] * scale:.1f}"
            + (f" ({row['parts_s'][part] / floor:.1f})" if (floor := row["floors_s"].get(part)) else "")
            for part in PARTS
        ]
        parts.add_row(name, *entries)
    console.print(table)
    console.print(parts)


def print_pack_sizes(console: Console, points: Sequence[dict[str, float]], precision: str) -> None:
    """Print the cost of a step and of a cell for each K."""
    table = Table(title=f"Cost against K, {precision}")
    memory = ("peak MiB",) if "peak_mib" in points[0] else ()
    for name in ("K", "s a step", "ms a cell", "of K alone", *memory):
        table.add_column(name, justify="right")
    for point in points:
        table.add_row(
            f"{point['cells']:g}",
            f"{point['step_s']:.2f}",
            f"{1000 * point['per_cell_s']:.0f}",
            f"{point['against_loop']:.2f}",
            *([f"{point['peak_mib']:.0f}"] if memory else []),
        )
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="smaller models, in a minute")
    parser.add_argument("--smoke", action="store_true", help="the smaller models, 3 cells, one step")
    parser.add_argument("--steps", type=int, help="steps timed in a turn")
    parser.add_argument("--turns", type=int, help="how often each is run")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--curve", type=Path, help="also measure the cost against K, and draw it there")
    parser.add_argument("--only", choices=("comparison", "curve"), help="one of the two measurements")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    parser.add_argument("--redraw", type=Path, help="draw --curve from this file of --out, measure nothing")
    options = parser.parse_args()
    if options.redraw is not None:
        if options.curve is None:
            parser.error("--redraw draws a picture: name it with --curve FILE.png")
        plot_pack_sizes(json.loads(options.redraw.read_text())["curve"], options.curve)
        return
    transformers.logging.set_verbosity_error()
    large = GPU if torch.cuda.is_available() else QUICKSTART
    grid = SMALL if options.small or options.smoke else large
    n_cells = 3 if options.smoke else 15
    steps = options.steps or (1 if options.smoke else 3 if options.small else 6)
    turns = options.turns or (2 if grid is large else 1)
    console = Console()
    figures: dict[str, Any] = {}
    if options.only != "curve":
        figures["comparison"] = compare_loops(grid, n_cells, steps, turns, options.precisions)
        print_comparison(console, figures["comparison"])
    if options.only == "curve" or (options.curve and options.only is None):
        precision, pack_sizes = options.precisions[0], PACK_SIZES[:2] if options.smoke else PACK_SIZES
        figures["curve"] = measure_pack_sizes(grid, pack_sizes, steps, turns, precision)
        print_pack_sizes(console, figures["curve"], precision)
        if options.curve:
            plot_pack_sizes(figures["curve"], options.curve)
    if options.out is not None:
        options.out.write_text(json.dumps({**describe_machine(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
