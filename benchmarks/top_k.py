"""What a teacher's scores lose when only the k most likely tokens of each distribution are kept.

    python benchmarks/top_k.py [--outputs DIR] [--tasks arithmetic ...] [--rows N] [--out FILE.json]

Teacher and starting student of each task at nano scale are taken from DIR, or made there. The loss is the
mean over the tokens of N training rows, its gradient that of all of the student's weights, both against the
live teacher's. `spread` is what `TopKTeacherLogits` does with the mass of all other tokens, `dropped` gives them none.
Bytes a token are those on disk in float32; nothing here depends on the machine's speed.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gkd_lab import experiments
from gkd_lab.encoding.batches import collate_examples
from gkd_lab.losses.divergence import Divergence
from gkd_lab.models.forward import compute_completion_logits
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import encode_examples, load_split
from gkd_lab.runner.library_logging import silence_libraries
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.teachers.score_files import ScoreLayout
from gkd_lab.teachers.top_k_distributions import TopKTeacherLogits, select_top_k

TASKS = ("arithmetic", "translation", "summarization")
KEPT = (8, 32, 128, None)
MEASURES = {
    "forward KL": Divergence(beta=0.0),
    "JSD(0.5)": Divergence(beta=0.5),
    "reverse KL": Divergence(beta=1.0),
    "KL, T = 2": Divergence(beta=0.0, student_temperature=2.0, teacher_temperature=2.0),
    "KL, P at 0.5": Divergence(beta=0.0, teacher_temperature=0.5),
}


class Pair:
    """A task's teacher and starting student on some of its training rows."""

    def __init__(self, task: str, options: RunOptions, count: int) -> None:
        grid = experiments.load_single_cell({"task": task, "lmbda": "0"}, outputs=options.outputs)
        training, scale = grid.cells[0].training, grid.scale
        teacher = artifacts.load_artifact(
            artifacts.ensure_artifact("teacher", training.teacher, scale, options), training.teacher
        )
        start = artifacts.load_artifact(
            artifacts.ensure_artifact("start", training.start, scale, options), training.start
        )
        data = load_split(task, training.data, "train", options.cache_folder)
        found, _ = encode_examples(training.start, start.tokenizer, data.take_first(count))
        batch = collate_examples(
            found, start.tokenizer.pad_token_id, is_encoder_decoder=start.model.config.is_encoder_decoder
        )
        real = batch.completion_mask.bool()
        with torch.no_grad():
            self.teacher = compute_completion_logits(teacher.model.eval(), batch)[real]
        self.student = start.model.eval()
        self.logits = compute_completion_logits(self.student, batch)[real]
        self.weights = [p for p in self.student.parameters() if p.requires_grad]

    def loss_and_gradient(self, measure: Divergence, target: Tensor) -> tuple[float, Tensor]:
        """Mean over the tokens, and its gradient by all weights, flat."""
        loss = measure(self.logits, target).mean()
        found = torch.autograd.grad(loss, self.weights, retain_graph=True)
        return loss.item(), torch.cat([one.flatten() for one in found]).double()


def kept(teacher: Tensor, top_k: int | None, tail: str) -> Tensor:
    """The teacher's logits as they come back from a store, (N, V)."""
    size = teacher.shape[-1]
    scores = select_top_k(teacher, top_k, torch.float32).apply(lambda tensor: tensor[None])
    everything = torch.arange(len(teacher))
    found = TopKTeacherLogits.create(scores, size).create_reader(size, torch.float32, len(teacher))(
        0, everything
    )
    if tail == "spread" or scores.ids is None:
        return found
    return torch.full_like(found, -math.inf).scatter_(1, scores.ids[0].long(), scores.log_probs[0])


def degrees(one: Tensor, other: Tensor) -> float:
    """Angle between two gradients, by the half-angle formula, which keeps small ones."""
    units = [vector / vector.norm() for vector in (one, other)]
    return math.degrees(2 * math.atan2((units[0] - units[1]).norm(), (units[0] + units[1]).norm()))


def errors(task: str, pair: Pair) -> Iterator[dict[str, Any]]:
    """A row for each measure, k and way with the tail."""
    size = pair.teacher.shape[-1]
    for name, measure in MEASURES.items():
        loss, gradient = pair.loss_and_gradient(measure, pair.teacher)
        for top_k in dict.fromkeys(k if k and k < size else None for k in KEPT):
            layout = ScoreLayout.create([1], top_k, size, "float32")
            for tail in ("spread", "dropped") if layout.top_k else ("spread",):
                found, own = pair.loss_and_gradient(measure, kept(pair.teacher, top_k, tail))
                yield {
                    "task": task,
                    "vocabulary": size,
                    "tokens": len(pair.teacher),
                    "measure": name,
                    "top_k": layout.top_k,
                    "tail": tail,
                    "loss": loss,
                    # What is dropped has probability 0, and reverse KL then what stands for infinity.
                    "loss_error": abs(found - loss) / loss if found < 1e6 else None,
                    "gradient_degrees": degrees(own, gradient),
                    "gradient_ratio": float(own.norm() / gradient.norm()),
                    "bytes_a_token": layout.bytes_per_token,
                }


def shown(found: Sequence[dict[str, Any]]) -> Table:
    """One line for each row."""
    first = found[0]
    title = f"{first['task']}, V = {first['vocabulary']}, {first['tokens']:,} tokens"
    table = Table("", "k", "tail", "loss error", "degrees", "bytes a token", title=title)
    for row in found:
        table.add_row(
            row["measure"],
            "V" if row["top_k"] is None else str(row["top_k"]),
            row["tail"],
            "infinite" if row["loss_error"] is None else f"{row['loss_error']:.1e}",
            f"{row['gradient_degrees']:.2g}",
            str(row["bytes_a_token"]),
        )
    return table


def main() -> None:
    """Measure each task; print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with versions")
    given = parser.parse_args()
    silence_libraries()
    options, found = RunOptions(given.outputs), []
    for task in given.tasks:
        own = list(errors(task, Pair(task, options, given.rows)))
        Console().print(shown(own))
        found += own
    if given.out is not None:
        facts = {"versions": {name: version(name) for name in ("torch", "transformers")}, "top_k": found}
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
