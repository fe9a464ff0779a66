"""Sample with fused decode steps and with transformers' `generate`: seconds, kernels, waits, equal tokens.

    python benchmarks/sampling.py [--smoke] [--turns N] [--out FILE.json]

Random Llama-like models and T5s alone and as packs, without an end of sequence; both take turns in one
process, with the same noise, and must write the same tokens. Seconds are the processor's, as the clock's are
noisy on a shared machine. Kernels and waits are counted as in `dispatch.py`, fused weights included.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from dispatch import TINY, OperatorCounter, count_waiting_methods
from grid import QUICKSTART, Grid, Shape, build_model
from rich.console import Console
from rich.table import Table
from step_timing import describe_machine
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from gkd_lab.models.forward import Sequences
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.training.sampling import generate_completions

WIDE = Grid("6 layers of 576", Shape(6, 576, 1536, 9), Shape(1, 16, 32, 2), 8192, 8, 24, 48)
"""A fifth of the layers of a model of 135 M, with a sixth of its vocabulary."""


@dataclass(frozen=True)
class Case:
    """A grid's student in a pack of so many cells, Llama-like or a T5 of the same shape."""

    grid: Grid
    cells: int
    is_t5: bool = False

    @property
    def label(self) -> str:
        """Name of the row."""
        return f"{self.grid.name}{' T5' * self.is_t5}, K = {self.cells}"


CASES = (
    Case(TINY, 1),
    Case(TINY, 15),
    Case(QUICKSTART, 1),
    Case(QUICKSTART, 15),
    Case(WIDE, 1),
    Case(WIDE, 4),
    Case(TINY, 15, is_t5=True),
    Case(QUICKSTART, 1, is_t5=True),
    Case(QUICKSTART, 15, is_t5=True),
)
SMOKE = Case(replace(TINY, student=Shape(1, 16, 32, 2), answer=4), 3)


def build_student(case: Case) -> PreTrainedModel:
    """Build the student, or a pack of equal ones."""
    student = (build_t5 if case.is_t5 else build_model)(case.grid.student, case.grid, 0)
    return student if case.cells == 1 else Pack.build([student] * case.cells).model


def build_t5(shape: Shape, grid: Grid, seed: int) -> PreTrainedModel:
    """Build a T5 v1.1 with random weights, as many layers in each stack."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=grid.vocabulary,
        d_model=shape.width,
        d_kv=shape.width // shape.heads,
        d_ff=shape.feed_forward,
        num_layers=shape.layers,
        num_decoder_layers=shape.layers,
        num_heads=shape.heads,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def build_prompts(case: Case) -> Sequences:
    """Build random prompts for every cell, half of them with padding."""
    shape = (case.grid.rows, case.grid.prompt)
    ids = torch.randint(2, case.grid.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, slice(-3, None) if case.is_t5 else slice(3)] = 0
    return Sequences(ids, mask, ids[:, :1], mask[:, :1]).repeat_rows(case.cells)


def sample(model: PreTrainedModel, prompts: Sequences, case: Case, noise: Tensor) -> Tensor:
    """Return the sampled ids, (N, C)."""
    options: dict[str, Any] = {"end_ids": torch.tensor([case.grid.vocabulary]), "pad_id": 0}
    return generate_completions(
        model, prompts, max_new_tokens=case.grid.answer, uniforms=noise, **options
    ).completion_ids


@contextmanager
def without_fused_steps(model: PreTrainedModel) -> Iterator[None]:
    """Let the model sample with `generate`, as any model with a hook does."""
    hook = model.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        hook.remove()


def measure(case: Case, turns: int) -> dict[str, dict[str, float]]:
    """Return way -> milliseconds (median), kernels and waits of sampling one batch."""
    model, prompts = build_student(case), build_prompts(case)
    noise = draw_uniforms(0, 0, "sampling", prompts.num_rows, case.grid.answer)
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "generate": lambda: without_fused_steps(model),
        "fused": nullcontext,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    ids, counters = {}, {}
    for turn in range(turns + 1):
        for way, enter in ways.items():
            with enter():
                start = time.process_time()
                ids[way] = sample(model, prompts, case, noise)
                seconds[way] += [time.process_time() - start] if turn else []
    assert torch.equal(ids["fused"], ids["generate"]), "the two ways write different tokens"
    for way, enter in ways.items():
        counters[way] = OperatorCounter()
        with enter(), count_waiting_methods(counters[way]), counters[way]:
            sample(model, prompts, case, noise)
    return {
        way: {
            "ms": 1000 * statistics.median(seconds[way]),
            "kernels": counters[way].kernels.total(),
            "waits": counters[way].waits.total(),
        }
        for way in ways
    }


def print_figures(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a row a case."""
    table = Table(title="Sampling a batch: with generate, and by fused steps")
    table.add_column("")
    for name in ("ms", "fused", "ratio", "kernels", "fused", "waits", "fused"):
        table.add_column(name, justify="right")
    for name, ways in figures.items():
        old, new = ways["generate"], ways["fused"]
        table.add_row(
            name,
            f"{old['ms']:,.0f}",
            f"{new['ms']:,.0f}",
            f"{old['ms'] / new['ms']:.2f} x",
            *(f"{way[key]:,.0f}" for key in ("kernels", "waits") for way in (old, new)),
        )
    Console().print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one layer, 4 tokens, 3 cells")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each way")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    cases = (SMOKE,) if options.smoke else CASES
    figures = {}
    for case in cases:
        figures[case.label] = measure(case, 1 if options.smoke else options.turns)
    print_figures(figures)
    if options.out is not None:
        options.out.write_text(json.dumps({**describe_machine(), "sampling": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
