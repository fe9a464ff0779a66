"""Measure error, time and peak memory of the loss and its backward pass, against TRL's two trainers.

    python benchmarks/loss.py [--small | --smoke] [--tokens N] [--vocabulary V] [--width H] [--runs R]

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

    def require_gradients(self) -> "Tensors":
        """Let autograd track the student's tensors."""
        return Tensors(
            self.student.requires_grad_(), self.head.requires_grad_(), self.teacher, self.teacher_head
        )

    def copy_first(self, tokens: int, dtype: torch.dtype) -> "Tensors":
        """Copy the first tokens in another dtype, with separate gradients."""
        first = (self.student[:, :tokens], self.head, self.teacher[:, :tokens], self.teacher_head)
        return Tensors(*(tensor.detach().to(dtype, copy=True) for tensor in first)).require_gradients()

    def get_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the student's hidden states and head."""
        assert self.student.grad is not None
        assert self.head.grad is not None
        return self.student.grad, self.head.grad


def compute_ours(t: Tensors, beta: float) -> Tensor:
    """Sum our loss over the tokens."""
    weights = torch.ones(t.student.shape[:2], device=t.student.device)
    heads = Projection(t.head), Projection(t.teacher_head)
    sums = compute_cell_losses(
        t.student, heads[0], t.teacher, heads[1], (0,), (Divergence(beta=beta),), weights
    )
    return sums.losses.sum()


def compute_trl_gkd(t: Tensors, beta: float) -> Tensor:
    """Compute TRL's GKD loss as its trainer does: all logits, the teacher's without gradient, masked."""
    logits = t.student @ t.head.T
    with torch.no_grad():
        target = t.teacher @ t.teacher_head.T
    labels = torch.ones(t.student.shape[:2], dtype=torch.long, device=logits.device)
    return TrlGKDTrainer.generalized_jsd_loss(logits, target, labels=labels, beta=beta, num_items_in_batch=1)


def compute_trl_distillation(t: Tensors, beta: float) -> Tensor:
    """Compute the chunked loss of TRL's DistillationTrainer."""
    mask = torch.ones(t.student.shape[:2], device=t.student.device)
    return _chunked_divergence_loss(t.student, t.teacher, t.head, t.teacher_head, mask, beta, 1)[0]


def compute_reference(t: Tensors, beta: float) -> Tensor:
    """Compute the loss by plain formulas over all logits."""
    return Divergence(beta=beta)(t.student[0] @ t.head.T, t.teacher[0] @ t.teacher_head.T).sum()


@dataclass(frozen=True)
class Size:
    """Shape, dtype and device of the tensors."""

    tokens: int
    vocabulary: int
    width: int
    dtype: str
    device: str

    def draw_tensors(self) -> Tensors:
        """Draw the same random tensors each time; logits have a standard deviation of 2."""
        torch.manual_seed(0)
        shapes = ((1, self.tokens, self.width), (self.vocabulary, self.width)) * 2
        spread = {2: 2 / self.width**0.5, 3: 1.0}
        tensors = (torch.randn(shape, device=self.device).mul_(spread[len(shape)]) for shape in shapes)
        return Tensors(*(tensor.to(DTYPES[self.dtype]) for tensor in tensors)).require_gradients()


Loss = Callable[[Tensors, float], Tensor]
METHODS: dict[str, Loss] = {
    "ours": compute_ours,
    "TRL GKD": compute_trl_gkd,
    "TRL Distillation": compute_trl_distillation,
}


def measure_errors(tensors: Tensors, beta: float) -> dict[str, tuple[float, float]]:
    """Return the relative errors (value, gradient) of each method."""
    exact = tensors.copy_first(CHECKED_TOKENS, torch.float64)
    expected = compute_reference(exact, beta)
    expected.backward()
    errors = {}
    for name, loss in METHODS.items():
        part = tensors.copy_first(CHECKED_TOKENS, tensors.head.dtype)
        value = loss(part, beta)
        value.backward()
        pairs = zip(part.get_gradients(), exact.get_gradients(), strict=True)
        gradient = max(((actual.double() - true).norm() / true.norm()).item() for actual, true in pairs)
        errors[name] = (abs(value.double() / expected - 1).item(), gradient)
    return errors


class Meter:
    """Measures the seconds and MiB that a function takes on a device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def measure(self, work: Callable[[], None]) -> tuple[float, float]:
        """Return the seconds and the MiB that the work adds at its peak."""
        before = self._reset_peak()
        start = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, (self._get_peak() - before) / 2**20

    def _reset_peak(self) -> int:
        """Forget the peak; return the bytes in use."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        return self._read_status("VmRSS")

    def _get_peak(self) -> int:
        """Return the most bytes in use since the peak was reset."""
        return torch.cuda.max_memory_allocated() if self.cuda else self._read_status("VmHWM")

    @staticmethod
    def _read_status(field: str) -> int:
        """Read a field of this process's status file, in bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure_cost(name: str, beta: float, size: Size) -> tuple[float, float]:
    """Return (seconds, MiB without the head's gradient) of one run of a method."""

    def run_both_passes(tensors: Tensors) -> None:
        METHODS[name](tensors, beta).backward()

    tensors = size.draw_tensors()
    small = replace(size, tokens=8, vocabulary=64, width=8)
    run_both_passes(small.draw_tensors())  # loads libraries and compiles kernels, in next to no memory
    seconds, memory = Meter(size.device).measure(partial(run_both_passes, tensors))
    return seconds, memory - tensors.head.numel() * tensors.head.element_size() / 2**20


def measure_costs(beta: float, size: Size, runs: int) -> dict[str, tuple[float, float]]:
    """Return the least seconds and the most MiB of alternating runs of each method."""
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for name in [*METHODS] * runs:
        measure = measure_cost if size.device == "cuda" else _measure_in_process
        costs[name].append(measure(name, beta, size))
    return {name: (min(s for s, _ in pairs), max(m for _, m in pairs)) for name, pairs in costs.items()}


def _measure_in_process(name: str, beta: float, size: Size) -> tuple[float, float]:
    """Measure one run in a new process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["gkd_lab.losses.fused_loss", "trl.trainer.distillation_trainer"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(measure_cost, name, beta, size).result()


def compute_ratios(costs: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Divide ours by TRL's, by the names of the targets."""
    return {
        f"{quantity} / {trainer}": costs["ours"][n] / costs[f"TRL {trainer}"][n]
        for n, quantity in enumerate(("time", "memory"))
        for trainer in ("GKD", "Distillation")
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; `--small` and `--smoke` replace the sizes."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="N = 1,024, V = 32,000, H = 32, beta = 0.5: seconds"
    )
    parser.add_argument("--smoke", action="store_true", help="N = 64, V = 1,000, H = 32, beta = 0.5")
    parser.add_argument("--tokens", type=int, default=1024 if cuda else 2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896 if cuda else 512)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--runs", type=int, default=10 if cuda else 1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with hardware and versions")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    options = parser.parse_args()
    if options.small or options.smoke:
        options.tokens, options.vocabulary = (64, 1000) if options.smoke else (1024, 32_000)
        options.width, options.betas = 32, [0.5]
    return options


def main() -> None:
    """Measure at each beta, print, write."""
    options = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = Size(options.tokens, options.vocabulary, options.width, options.dtype, device)
    title = f"N = {size.tokens:,}, V = {size.vocabulary:,}, H = {size.width:,}, {size.dtype}, {device}"
    table = Table("beta", "", "value error", "gradient error", "s", "MiB", title=title)
    ratio_table = Table("beta", *(f"{name} (target {target:g})" for name, target in TARGETS.items()))
    rows = []
    for beta in options.betas:
        errors, costs = measure_errors(size.draw_tensors(), beta), measure_costs(beta, size, options.runs)
        for name in METHODS:
            (value_error, gradient_error), (seconds, mib) = errors[name], costs[name]
            table.add_row(
                f"{beta:g}",
                name,
                f"{value_error:.1e}",
                f"{gradient_error:.1e}",
                f"{seconds:.3f}",
                f"{mib:,.0f}",
            )
            rows.append(
                {
                    "beta": beta,
                    "method": name,
                    "value_error": value_error,
                    "gradient_error": gradient_error,
                    "seconds": seconds,
                    "mib": mib,
                }
            )
        ratios = compute_ratios(costs).items()
        entries = (f"{ratio:.3f} {'ok' if ratio <= TARGETS[name] else 'MISSED'}" for name, ratio in ratios)
        ratio_table.add_row(f"{beta:g}", *entries)
    console = Console()
    console.print(table)
    console.print(ratio_table)
    if options.out is not None:
        hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
        versions = {name: version(name) for name in ("torch", "trl")}
        facts = {"device": hardware or device, "size": vars(size), "versions": versions, "loss": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
