"""Count kernels, waits for the device and host milliseconds of an optimizer step, without a GPU.

    python benchmarks/dispatch.py [--smoke] [--layers N] [--answer N] [--steps N] [--out FILE.json]

On a GPU a small student waits for the host, which launches kernels one by one and stops wherever it reads a
result. Both can be counted on any machine: kernels are the operators that PyTorch dispatches, without views
and bare allocations (a fused or `foreach` operator is one); waits are what reads a tensor's values into
Python (`item`, `tolist`, `cpu`, `bool`) or has a size that depends on them (`nonzero`, an index by a mask).
Tensors are tiny and there is one thread, so that milliseconds of the processor are those of the host. TRL's
GKDTrainer takes the same rows, models and coin.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from grid import (
    BETAS,
    Grid,
    Shape,
    build_model,
    build_pack_trainer,
    build_rows,
    get_settings,
)
from rich.console import Console
from rich.table import Table
from step_timing import (
    StepClock,
    TrlConfig,
    TrlTrainer,
    build_arguments,
    build_tokenizer,
    describe_machine,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.losses import chunk_sums
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.teachers import shared_prefix

TINY = Grid("tiny", Shape(4, 16, 32, 2), Shape(4, 16, 32, 2), 600, 4, 12, 48)
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITING_OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}
WAITING_METHODS = ("tolist", "cpu", "numpy")
TIMED_STEPS = 4
"""Steps that are timed, as a multiple of those that are counted."""


@dataclass(frozen=True)
class StepCounts:
    """Kernels, waits for the device and host milliseconds of one optimizer step."""

    kernels: float
    waits: float
    host_ms: float


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        library, _, name = operator._schema.name.partition("::")
        if library == "profiler":
            pass
        elif name in WAITING_OPERATORS or _is_indexed_by_mask(name, args):
            self.waits[name] += 1
        elif name not in ALLOCATIONS and not _is_view(operator):
            self.kernels[name] += 1
        return operator(*args, **(kwargs or {}))


def _is_view(operator: Any) -> bool:
    """Whether an operator returns a view of its input, and writes nothing."""
    if operator._schema.name == "aten::_unsafe_view":
        return True
    returns = operator._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_indexed_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an index by a tensor of truth values makes the result's size depend on them."""
    if name != "index":
        return False
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in args[1])


class StepCounter(TrainerCallback):
    """Keeps the counts at the end of every step."""

    def __init__(self, operators: OperatorCounter) -> None:
        self.operators = operators
        self.totals: list[tuple[int, int]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.totals.append((self.operators.kernels.total(), self.operators.waits.total()))

    def average(self) -> tuple[float, float]:
        """Return kernels and waits of a step: the mean over all steps but the first."""
        steps = len(self.totals) - 1
        first, last = self.totals[0], self.totals[-1]
        return (last[0] - first[0]) / steps, (last[1] - first[1]) / steps


@contextlib.contextmanager
def count_waiting_methods(counter: OperatorCounter) -> Iterator[None]:
    """Count the calls of Tensor methods that wait without an operator of their own."""
    with contextlib.ExitStack() as stack:
        for name in WAITING_METHODS:
            method = getattr(torch.Tensor, name)

            def call(
                tensor: torch.Tensor, *args: Any, _name: str = name, _method: Any = method, **options: Any
            ) -> Any:
                counter.waits[_name] += 1
                return _method(tensor, *args, **options)

            stack.enter_context(mock.patch.object(torch.Tensor, name, call))
        yield


# ---- trainers ----


def build_trl_trainer(grid: Grid, lmbda: float, steps: int, folder: str, callback: Any) -> Any:
    """Build TRL's trainer of one cell."""
    import datasets

    return TrlTrainer(
        model=build_model(grid.student, grid, 0),
        teacher_model=build_model(grid.teacher, grid, 1),
        args=build_arguments(TrlConfig, folder, lmbda=lmbda, **get_settings(grid, steps, bf16=False)),
        train_dataset=datasets.Dataset.from_list(build_rows(grid, steps)),
        processing_class=build_tokenizer(),
        callbacks=[callback],
    )


def build_varied_trainer(
    grid: Grid,
    lmbda: float,
    steps: int,
    folder: str,
    callback: Any,
    *,
    n_cells: int,
    n_seeds: int,
    n_rates: int,
) -> GKDTrainer:
    """Build our trainer of `n_cells` cells that differ in divergence, rate and seed, all at one lmbda."""
    cells = [
        CellArguments(
            lmbda=lmbda,
            beta=BETAS[n % len(BETAS)] if n_cells > 1 else 0.5,
            seed=n * n_seeds // n_cells,
            temperature=1.0,
            teacher_temperature=1.0,
            student_temperature=1.0,
            learning_rate=1e-5 * (1 + n % n_rates),
            output_dir=f"{folder}/{n}",
        )
        for n in range(n_cells)
    ]
    args = build_arguments(GKDConfig, folder, **get_settings(grid, steps, bf16=False))
    return build_pack_trainer(grid, cells, steps, args, callback)


def measure(build: Callable[..., Any], grid: Grid, lmbda: float, steps: int) -> tuple[StepCounts, Counter]:
    """Return the counts of a step, and which operators they are: one run counts, another is timed."""
    operators, clock = OperatorCounter(), StepClock(time.process_time)
    counter = StepCounter(operators)
    for callback, count in ((counter, steps), (clock, TIMED_STEPS * steps)):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = build(grid, lmbda, count, folder, callback)
            trainer.remove_callback(transformers.PrinterCallback)
            with contextlib.ExitStack() as stack:
                if callback is counter:
                    stack.enter_context(count_waiting_methods(operators))
                    stack.enter_context(operators)
                # A CPU takes teacher and loss in slices that fit into its cache, a GPU at once.
                stack.enter_context(mock.patch.object(shared_prefix, "CPU_STATE_BYTES", 2**40))
                stack.enter_context(mock.patch.object(chunk_sums, "SLICE_BYTES", 2**40))
                stack.enter_context(mock.patch.object(chunk_sums, "takes_all_blocks", lambda _: True))
                # Lambda 0 and 1 toss no coin that could fall otherwise.
                trainer.train()
    kernels, waits = counter.average()
    names = Counter({**operators.kernels, **{f"wait: {n}": c for n, c in operators.waits.items()}})
    return StepCounts(kernels, waits, 1000 * statistics.median(clock.step_seconds)), names


# ---- the table ----

CASES: dict[str, tuple[int, int, int] | None] = {
    "TRL, one cell": None,
    "ours, K = 1": (1, 1, 1),
    "ours, K = 15, one seed": (15, 1, 3),
    "ours, K = 15, three seeds": (15, 3, 3),
    "ours, K = 15, one seed and rate": (15, 1, 1),
}
"""Numbers of cells, of seeds and of learning rates, which alternate; None: TRL."""


def measure_cases(grid: Grid, steps: int, n_cells: int, *, detail: bool) -> dict[str, dict[str, Any]]:
    """Return case -> lmbda -> counts."""
    figures: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        build: Callable[..., Any] = build_trl_trainer
        if case is not None:
            options = {"n_cells": min(case[0], n_cells), "n_seeds": case[1], "n_rates": case[2]}

            build = functools.partial(build_varied_trainer, **options)  # type: ignore[arg-type]

        label = name.replace("15", str(n_cells))
        figures[label] = {}
        for lmbda in (0.0, 1.0):
            counts, operators = measure(build, grid, lmbda, steps)
            figures[label][f"{lmbda:g}"] = asdict(counts)
            if detail:
                frequent = [f"{op} {count / (steps + 1):.0f}" for op, count in operators.most_common(40)]
                print(f"{label}, lmbda {lmbda:g}: {', '.join(frequent)}\n")
    return figures


def print_figures(figures: dict[str, dict[str, Any]], grid: Grid) -> None:
    """Print a row a case: kernels, waits and milliseconds at lmbda 0 and 1."""
    table = Table(title=f"An optimizer step, {grid.student.layers} layers, {grid.answer} sampled tokens")
    table.add_column("")
    for name in ("kernels, λ = 0", "λ = 1", "waits, λ = 0", "λ = 1", "host ms, λ = 0", "λ = 1"):
        table.add_column(name, justify="right")
    for name, by_lmbda in figures.items():
        columns = [
            f"{by_lmbda[lmbda][key]:,.{int(key == 'host_ms')}f}"
            for key in ("kernels", "waits", "host_ms")
            for lmbda in ("0", "1")
        ]
        table.add_row(name, *columns)
    Console().print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one layer, 4 tokens, 3 cells")
    parser.add_argument("--layers", type=int, help="layers of student and teacher (4)")
    parser.add_argument("--answer", type=int, help="sampled tokens (48)")
    parser.add_argument("--steps", type=int, default=3, help="steps counted")
    parser.add_argument("--detail", action="store_true", help="also print the most frequent operators")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    layers = options.layers or (1 if options.smoke else TINY.student.layers)
    answer = options.answer or (4 if options.smoke else TINY.answer)
    shape = replace(TINY.student, layers=layers)
    grid = replace(TINY, student=shape, teacher=shape, answer=answer)
    n_cells, steps = (3, 1) if options.smoke else (15, options.steps)
    figures = measure_cases(grid, steps, n_cells, detail=options.detail)
    print_figures(figures, grid)
    if options.out is not None:
        grid_figures = {"layers": layers, "answer": answer, "cells": n_cells, "steps": steps}
        result = {**describe_machine(), "grid": grid_figures, "counts": figures}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
