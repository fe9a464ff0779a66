"""Error, time and peak memory of the loss and its backward pass, against TRL's two trainers.

    python benchmarks/loss.py [--small] [--tokens N] [--vocabulary V] [--width H] [--dtype bf16] [--runs R]

All three start from the same hidden states and heads. Errors are against float64 autograd on the first 32
tokens: relative, of the value and of the gradients (the worse of hidden states and head). Methods alternate;
time is the fastest run's. Memory is the most that a run adds, less the gradient of the head, which all of
them return: on CUDA by PyTorch's own account; on a CPU by the kernel's (VmHWM, which writing 5 to
/proc/self/clear_refs sets back), so Linux only, and each run in a process of its own, as allocators keep
freed memory, in which a later run would hide. The targets are for the default size.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.fused_loss import compute_cell_losses
from gkd_lab.models.projection import Projection

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

TARGETS = {
    "time / GKD": 1.0,
    "time / Distillation": 1.05,
    "memory / GKD": 0.125,
    "memory / Distillation": 1.05,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED_TOKENS = 32


@dataclass(frozen=True)
class Tensors:
    """Hidden states (1, N, H) and heads (V, H) of a student and a teacher of the same shape."""

    student: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor

    def trained(self) -> "Tensors":
        return Tensors(
            self.student.requires_grad_(), self.head.requires_grad_(), self.teacher, self.teacher_head
        )

    def part(self, tokens: int, dtype: torch.dtype) -> "Tensors":
        """The first tokens in another dtype, with gradients of their own."""
        few = (self.student[:, :tokens], self.head, self.teacher[:, :tokens], self.teacher_head)
        return Tensors(*(tensor.detach().to(dtype, copy=True) for tensor in few)).trained()

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.student.grad is not None
        assert self.head.grad is not None
        return self.student.grad, self.head.grad


def ours(t: Tensors, beta: float) -> Tensor:
    weights = torch.ones(t.student.shape[:2], device=t.student.device)
    heads = Projection(t.head), Projection(t.teacher_head)
    sums = compute_cell_losses(
        t.student, heads[0], t.teacher, heads[1], (0,), (Divergence(beta=beta),), weights
    )
    return sums.losses.sum()


def trl_gkd(t: Tensors, beta: float) -> Tensor:
    """As its `compute_loss`: logits of all positions, the teacher's without gradient, then the mask."""
    logits = t.student @ t.head.T
    with torch.no_grad():
        target = t.teacher @ t.teacher_head.T
    labels = torch.ones(t.student.shape[:2], dtype=torch.long, device=logits.device)
    return TrlGKDTrainer.generalized_jsd_loss(logits, target, labels=labels, beta=beta, num_items_in_batch=1)


def trl_distillation(t: Tensors, beta: float) -> Tensor:
    mask = torch.ones(t.student.shape[:2], device=t.student.device)
    return _chunked_divergence_loss(t.student, t.teacher, t.head, t.teacher_head, mask, beta, 1)[0]


def reference(t: Tensors, beta: float) -> Tensor:
    return Divergence(beta=beta)(t.student[0] @ t.head.T, t.teacher[0] @ t.teacher_head.T).sum()


@dataclass(frozen=True)
class Size:
    """What to measure with, and where."""

    tokens: int
    vocabulary: int
    width: int
    dtype: str
    device: str

    def tensors(self) -> Tensors:
        """Random, the same each time; logits have a standard deviation of 2."""
        torch.manual_seed(0)
        shapes = ((1, self.tokens, self.width), (self.vocabulary, self.width)) * 2
        spread = {2: 2 / self.width**0.5, 3: 1.0}
        tensors = (torch.randn(shape, device=self.device).mul_(spread[len(shape)]) for shape in shapes)
        return Tensors(*(tensor.to(DTYPES[self.dtype]) for tensor in tensors)).trained()


Loss = Callable[[Tensors, float], Tensor]
METHODS: dict[str, Loss] = {"ours": ours, "TRL GKD": trl_gkd, "TRL Distillation": trl_distillation}


def errors(tensors: Tensors, beta: float) -> dict[str, tuple[float, float]]:
    """Relative errors (value, gradient) of each method."""
    exact = tensors.part(CHECKED_TOKENS, torch.float64)
    expected = reference(exact, beta)
    expected.backward()
    found = {}
    for name, loss in METHODS.items():
        part = tensors.part(CHECKED_TOKENS, tensors.head.dtype)
        value = loss(part, beta)
        value.backward()
        pairs = zip(part.gradients(), exact.gradients(), strict=True)
        gradient = max(((got.double() - true).norm() / true.norm()).item() for got, true in pairs)
        found[name] = (abs(value.double() / expected - 1).item(), gradient)
    return found


class Meter:
    """Seconds and MiB that a piece of work takes on a device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def measure(self, work: Callable[[], None]) -> tuple[float, float]:
        before = self._reset()
        start = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, (self._peak() - before) / 2**20

    def _reset(self) -> int:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        return self._status("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def cost(name: str, beta: float, size: Size) -> tuple[float, float]:
    """(seconds, MiB without the head's gradient) of one run of a method."""

    def both_passes(tensors: Tensors) -> None:
        METHODS[name](tensors, beta).backward()

    tensors = size.tensors()
    few = replace(size, tokens=8, vocabulary=64, width=8)
    both_passes(few.tensors())  # loads libraries and compiles kernels, in next to no memory
    seconds, memory = Meter(size.device).measure(partial(both_passes, tensors))
    return seconds, memory - tensors.head.numel() * tensors.head.element_size() / 2**20


def costs(beta: float, size: Size, runs: int) -> dict[str, tuple[float, float]]:
    """The least seconds and the most MiB of alternating runs of each method."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for name in [*METHODS] * runs:
        seen[name].append(cost(name, beta, size) if size.device == "cuda" else _alone(name, beta, size))
    return {name: (min(s for s, _ in found), max(m for _, m in found)) for name, found in seen.items()}


def _alone(name: str, beta: float, size: Size) -> tuple[float, float]:
    context = get_context("forkserver")
    context.set_forkserver_preload(["gkd_lab.losses.fused_loss", "trl.trainer.distillation_trainer"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(cost, name, beta, size).result()


def ratios(cost: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Ours over TRL's, by the names of the targets."""
    return {
        f"{what} / {other}": cost["ours"][n] / cost[f"TRL {other}"][n]
        for n, what in enumerate(("time", "memory"))
        for other in ("GKD", "Distillation")
    }


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="N = 1,024, V = 32,000, H = 32, beta = 0.5: seconds"
    )
    parser.add_argument("--tokens", type=int, default=1024 if cuda else 2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896 if cuda else 512)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--runs", type=int, default=10 if cuda else 1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    given = parser.parse_args()
    if given.small:
        given.tokens, given.vocabulary, given.width, given.betas = 1024, 32_000, 32, [0.5]
    return given


def main() -> None:
    """Measure at each beta; print."""
    given = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = Size(given.tokens, given.vocabulary, given.width, given.dtype, device)
    title = f"N = {size.tokens:,}, V = {size.vocabulary:,}, H = {size.width:,}, {size.dtype}, {device}"
    table = Table("beta", "", "value error", "gradient error", "s", "MiB", title=title)
    compared = Table("beta", *(f"{name} (target {target:g})" for name, target in TARGETS.items()))
    kept = []
    for beta in given.betas:
        error, cost = errors(size.tensors(), beta), costs(beta, size, given.runs)
        for name in METHODS:
            row = (f"{error[name][0]:.1e}", f"{error[name][1]:.1e}", f"{cost[name][0]:.3f}")
            table.add_row(f"{beta:g}", name, *row, f"{cost[name][1]:,.0f}")
            kept.append(
                {
                    "beta": beta,
                    "method": name,
                    "value_error": error[name][0],
                    "gradient_error": error[name][1],
                    "seconds": cost[name][0],
                    "mib": cost[name][1],
                }
            )
        found = ratios(cost)
        cells = (f"{r:.3f} {'ok' if r <= TARGETS[n] else 'MISSED'}" for n, r in found.items())
        compared.add_row(f"{beta:g}", *cells)
    console = Console()
    console.print(table)
    console.print(compared)
    if given.out is not None:
        hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
        versions = {name: version(name) for name in ("torch", "trl")}
        facts = {"device": hardware or device, "size": vars(size), "versions": versions, "loss": kept}
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
