"""A grid of 15 cells as one pack, against a loop over TRL's GKDTrainer and against the arithmetic it must do.

    python benchmarks/grid.py [--small] [--steps N] [--turns N] [--curve FILE.png] [--out FILE.json]

Same models (random weights, nobody ends a sequence), rows, coin, steps and precision; TRL samples with its
KV cache (gradient checkpointing off). All take turns in one process and each step is timed by itself; a
trainer's set-up and first step are left out. The floor is the matrix products that the grid cannot do
without, at the rate that this machine reaches on one large product. `--curve` measures the cost against K.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig as TrlConfig
from trl.experimental.gkd import GKDTrainer as TrlTrainer

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.encoding.batches import Example
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.models.build import train_tokenizer
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import is_on_policy

LMBDAS, BETAS = (0.0, 0.5, 1.0), (0.0, 0.1, 0.5, 0.9, 1.0)
CURVE = (1, 3, 5, 15, 45)
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WORDS = [f"w{n}" for n in range(500)]


@dataclass(frozen=True)
class Shape:
    """A Llama-like model without its embeddings."""

    layers: int
    width: int
    feed_forward: int
    heads: int

    def weights(self) -> int:
        """Entries of the matrices of all layers."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.feed_forward)

    def flops(self, rows: int, first: int, last: int, projected: int, vocabulary: int) -> int:
        """Products of a forward pass over the positions [first, last) of `rows` rows, 2 a multiply-add.

        A position attends to itself and to those before it; `projected` positions a row meet the head.
        """
        tokens = last - first
        seen = (last * (last + 1) - first * (first + 1)) // 2
        attention = 4 * self.layers * self.width * seen
        return rows * (2 * self.weights() * tokens + attention + 2 * self.width * vocabulary * projected)


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
GPU = Grid("60 M from 400 M", Shape(12, 512, 2048, 8), Shape(24, 1024, 4096, 16), 32_768, 16, 64, 64)


# ---- models and data ----


def tokenizer() -> PreTrainedTokenizerFast:
    words = " ".join([*WORDS, "user", "assistant"])
    made = train_tokenizer(TokenizerSpec(kind="word", vocab_size=600), [words])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    return made


def model(shape: Shape, grid: Grid, seed: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=grid.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return made.to(dtype)


def rows(grid: Grid, count: int) -> list[dict[str, Any]]:
    """Chats whose prompts have up to 3 tokens less than the grid's."""

    def words(first: int, length: int) -> str:
        return " ".join(WORDS[(first + n) % len(WORDS)] for n in range(length))

    return [
        {
            "messages": [
                {"role": "user", "content": words(n, grid.prompt - 6 - n % 4)},
                {"role": "assistant", "content": words(7 * n, grid.answer - 2)},
            ]
        }
        for n in range(count)
    ]


def cells(count: int, folder: str) -> list[CellArguments]:
    """The first `count` of lmbda x beta x seeds; fewer than a seed's 15 are spread over lmbda."""
    crossed = list(itertools.product(LMBDAS, BETAS))
    seed = crossed if count >= len(crossed) else [crossed[n * len(crossed) // count] for n in range(count)]
    if count == 1:
        seed = [(0.5, 0.5)]
    return [
        CellArguments(
            lmbda=lmbda,
            beta=beta,
            seed=n // len(seed),
            temperature=1.0,
            teacher_temperature=1.0,
            student_temperature=1.0,
            learning_rate=1e-5,
            output_dir=f"{folder}/{n}",
        )
        for n, (lmbda, beta) in enumerate((seed * count)[:count])
    ]


# ---- one trainer, timed ----


class Clock(TrainerCallback):
    """Seconds of each step but the first, and of its parts."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.running: dict[str, float] = defaultdict(float)
        self.last: float | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = _now()
        if self.last is not None:
            self.seconds.append(now - self.last)
            self.parts.append(dict(self.running))
        self.last = now
        self.running.clear()

    def step(self) -> int:
        return len(self.seconds) + (self.last is not None)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **options: Any) -> Any:
            begun = _now()
            try:
                return call(*args, **options)
            finally:
                self.running[name] += _now() - begun

        return measured


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def arguments(kind: type, grid: Grid, folder: str, steps: int, bf16: bool, **more: Any) -> Any:
    return kind(
        output_dir=folder,
        max_steps=steps + 1,
        per_device_train_batch_size=grid.rows,
        learning_rate=1e-5,
        max_new_tokens=grid.answer,
        max_length=None,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )


def trl_cell(grid: Grid, cell: CellArguments, steps: int, bf16: bool) -> Clock:
    clock, tokens = Clock(), tokenizer()

    def coin() -> float:
        """TRL's falls as ours does."""
        return 0.0 if is_on_policy(cell.lmbda, cell.seed, clock.step()) else 2.0

    with tempfile.TemporaryDirectory() as folder:
        args = arguments(TrlConfig, grid, folder, steps, bf16, lmbda=cell.lmbda, beta=cell.beta)
        trainer = TrlTrainer(
            model=model(grid.student, grid, 0),
            teacher_model=model(grid.teacher, grid, 1),
            args=args,
            train_dataset=datasets.Dataset.from_list(rows(grid, grid.rows * (steps + 1))),
            processing_class=tokens,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with mock.patch("trl.experimental.gkd.gkd_trainer.random.random", coin):
            trainer.train()
    return clock


def our_pack(grid: Grid, count: int, steps: int, bf16: bool) -> Clock:
    clock, tokens = Clock(), tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        student = model(grid.student, grid, 0)
        trainer = GKDTrainer(
            pack=Pack.build([student] * count) if count > 1 else Pack.build_single(student),
            cells=cells(count, folder),
            teacher_model=model(grid.teacher, grid, 1),
            args=arguments(GKDConfig, grid, folder, steps, bf16),
            train_dataset=[_example(tokens, row) for row in rows(grid, grid.rows * (steps + 1))],
            processing_class=tokens,
            teacher_processing_class=tokens,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        for owner, name, part in (
            (trainer, "_written", "sampling"),
            (trainer, "_read", "teacher"),
            (trainer, "training_step", "training"),
        ):
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
        trainer.train()
    for part in clock.parts:
        part["student"] = part.pop("training") - part.get("teacher", 0.0)
    return clock


def _example(tokens: Any, row: dict[str, Any]) -> Example:
    chat = row["messages"]
    prompt = tokens.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    whole = tokens.apply_chat_template(chat, return_dict=False)
    return Example(prompt, whole[len(prompt) :])


# ---- the floor ----


def matmul_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """FLOP/s of one product of two square matrices, the best of ten."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(10):
        begun = _now()
        one @ other
        taken.append(_now() - begun)
    return 2 * side**3 / min(taken)


def flops(grid: Grid, of_cells: Sequence[CellArguments], steps: int) -> dict[str, float]:
    """Products that a step of the grid cannot do without, the mean of the steps timed.

    Sampling: each prompt and each new token but the last, once for each cell whose coin says so. Teacher:
    each distinct sequence once. Student: forward, and twice that backward. Nothing for padding: rows are
    nearly of one length here.
    """
    end, count, vocabulary = grid.prompt + grid.answer, grid.rows, grid.vocabulary
    found: dict[str, float] = defaultdict(float)
    for step in range(1, steps + 1):
        writing = [c for c in of_cells if is_on_policy(c.lmbda, c.seed, step)]
        reading = {c.seed for c in of_cells if not is_on_policy(c.lmbda, c.seed, step)}
        write = grid.student.flops(count, 0, end - 1, grid.answer, vocabulary)
        read = grid.teacher.flops(count, 0, end, grid.answer, vocabulary)
        train = 3 * grid.student.flops(count, 0, end, grid.answer, vocabulary)
        found["sampling"] += len(writing) * write / steps
        found["teacher"] += (len(writing) + len(reading)) * read / steps
        found["student"] += len(of_cells) * train / steps
    return found


# ---- the comparison ----

PARTS = ("sampling", "teacher", "student", "rest")


@contextmanager
def quiet() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def by_step(turns: Sequence[Sequence[float]]) -> float:
    """Mean over steps of the median over turns: steps differ in kind, turns only in noise."""
    return statistics.fmean(statistics.median(step) for step in zip(*turns, strict=True))


def compare(grid: Grid, steps: int, turns: int) -> dict[str, Any]:
    """Seconds a step of all 15 cells: ours and TRL's, float32 and bfloat16."""
    of_cells = cells(15, "")
    ours: dict[bool, list[Clock]] = {False: [], True: []}
    theirs: dict[bool, list[list[float]]] = {False: [], True: []}
    for turn in range(turns):
        for bf16 in (False, True):
            for mine in (True, False) if turn % 2 else (False, True):
                if mine:
                    ours[bf16].append(our_pack(grid, len(of_cells), steps, bf16))
                else:
                    loop = [trl_cell(grid, cell, steps, bf16).seconds for cell in of_cells]
                    theirs[bf16].append([sum(step) for step in zip(*loop, strict=True)])
    found: dict[str, Any] = {"grid": grid.name, "cells": len(of_cells), "steps": steps, "turns": turns}
    needed = flops(grid, of_cells, steps)
    for bf16, name in ((False, "fp32"), (True, "bf16")):
        rate = matmul_rate(torch.bfloat16 if bf16 else torch.float32)
        whole = by_step([clock.seconds for clock in ours[bf16]])
        parts = {
            part: by_step([[step.get(part, 0.0) for step in clock.parts] for clock in ours[bf16]])
            for part in PARTS[:-1]
        }
        parts["rest"] = whole - sum(parts.values())
        found[name] = {
            "ours_s": whole,
            "trl_s": by_step(theirs[bf16]),
            "matmul_gflops": rate / 1e9,
            "floor_s": sum(needed.values()) / rate,
            "parts_s": parts,
            "floors_s": {part: value / rate for part, value in needed.items()},
        }
    return found


def curve(grid: Grid, steps: int, turns: int) -> list[dict[str, float]]:
    """Seconds of a step, float32, and peak memory where a GPU counts it, against K."""
    taken: dict[int, list[list[float]]] = defaultdict(list)
    peak: dict[int, float] = {}
    for _ in range(turns):
        for count in CURVE:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            taken[count].append(our_pack(grid, count, steps, False).seconds)
            if torch.cuda.is_available():
                peak[count] = torch.cuda.max_memory_allocated() / 2**20
    alone = by_step(taken[1])
    return [
        {
            "cells": count,
            "step_s": by_step(taken[count]),
            "per_cell_s": by_step(taken[count]) / count,
            "against_loop": by_step(taken[count]) / count / alone,
            **({"peak_mib": peak[count]} if peak else {}),
        }
        for count in CURVE
    ]


def plot(points: Sequence[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    counts = [point["cells"] for point in points]
    per_cell = [1000 * point["per_cell_s"] for point in points]
    axes.plot(counts, per_cell, "o-")
    for count, value in zip(counts, per_cell, strict=True):
        axes.annotate(f"{value:.0f}", (count, value), textcoords="offset points", xytext=(4, 5))
    axes.set(xscale="log", xlabel="cells in a pack (K)", ylabel="ms a cell and step", ylim=(0, None))
    axes.set_xticks(counts, [f"{count:g}" for count in counts])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def show(out: Console, found: dict[str, Any]) -> None:
    table = Table(title=f"{found['cells']} cells, {found['grid']}: ms a cell and step")
    for name in ("", "ours", "TRL loop", "speed-up", "against TRL fp32", "floor", "over floor"):
        table.add_column(name, justify="left" if not name else "right")
    each = 1000 / found["cells"]
    for name in ("fp32", "bf16"):
        row = found[name]
        table.add_row(
            name,
            f"{row['ours_s'] * each:.0f}",
            f"{row['trl_s'] * each:.0f}",
            f"{row['trl_s'] / row['ours_s']:.2f} x",
            f"{found['fp32']['trl_s'] / row['ours_s']:.2f} x",
            f"{row['floor_s'] * each:.0f} at {row['matmul_gflops']:.0f} GFLOP/s",
            f"{row['ours_s'] / row['floor_s']:.2f}",
        )
    out.print(table)
    parts = Table(title="Where ours goes: ms a cell and step (time over floor)")
    for name in ("", *PARTS):
        parts.add_column(name, justify="left" if not name else "right")
    for name in ("fp32", "bf16"):
        row = found[name]
        shown = [
            f"{row['parts_s'][part] * each:.1f}"
            + (f" ({row['parts_s'][part] / floor:.1f})" if (floor := row["floors_s"].get(part)) else "")
            for part in PARTS
        ]
        parts.add_row(name, *shown)
    out.print(parts)


def show_curve(out: Console, points: Sequence[dict[str, float]]) -> None:
    table = Table(title="Cost against K, float32")
    for name in (
        "K",
        "s a step",
        "ms a cell",
        "of K alone",
        *(("peak MiB",) if "peak_mib" in points[0] else ()),
    ):
        table.add_column(name, justify="right")
    for point in points:
        table.add_row(
            f"{point['cells']:g}",
            f"{point['step_s']:.2f}",
            f"{1000 * point['per_cell_s']:.0f}",
            f"{point['against_loop']:.2f}",
            *([f"{point['peak_mib']:.0f}"] if "peak_mib" in point else []),
        )
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="smaller models, in a minute")
    parser.add_argument("--steps", type=int, help="steps timed in a turn")
    parser.add_argument("--turns", type=int, help="how often each is run")
    parser.add_argument("--curve", type=Path, help="also measure the cost against K, and draw it there")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    grid = SMALL if options.small else GPU if gpu else QUICKSTART
    steps, turns = options.steps or (3 if options.small else 6), options.turns or (1 if options.small else 2)
    out = Console()
    with quiet():
        found = {"comparison": compare(grid, steps, turns)}
        show(out, found["comparison"])
        if options.curve:
            found["curve"] = curve(grid, steps, turns)  # type: ignore[assignment]
            show_curve(out, found["curve"])  # type: ignore[arg-type]
            plot(found["curve"], options.curve)  # type: ignore[arg-type]
    if options.out is not None:
        device = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
        versions = {m.__name__: m.__version__ for m in (torch, transformers, trl)}
        facts = {"device": device, "threads": torch.get_num_threads(), "versions": versions, **found}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
