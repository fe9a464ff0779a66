"""Measure the error of loss and gradient when only the k most likely tokens of the teacher are stored.

    python benchmarks/top_k.py [--outputs DIR] [--tasks arithmetic ...] [--rows N] [--smoke] [--out FILE.json]

Teacher and SFT student of each task at nano scale are taken from DIR, or trained there. The loss is the mean
over the tokens of N training rows, the gradient is by all of the student's weights; both are compared with
the live teacher's. `spread` divides the mass of all other tokens evenly, as `TopKTeacherLogits` does;
`dropped` gives them none. Bytes a token are those on disk in float32; nothing here depends on the machine's
speed. `--smoke` trains the models for one step, in a temporary folder.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gkd_lab import experiments
from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.encoding.batches import collate_examples
from gkd_lab.losses.divergence import Divergence
from gkd_lab.models.forward import compute_completion_logits
from gkd_lab.runner import artifacts
from gkd_lab.runner.dataset import encode_examples, load_split, take_first_rows
from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run_options import RunOptions
from gkd_lab.teachers.score_files import ScoreLayout
from gkd_lab.teachers.top_k_distributions import TopKTeacherLogits, select_top_k

TASKS = ("arithmetic", "translation", "summarization")
TOP_K_VALUES = (8, 32, 128, None)
DIVERGENCES = {
    "forward KL": Divergence(beta=0.0),
    "JSD(0.5)": Divergence(beta=0.5),
    "reverse KL": Divergence(beta=1.0),
    "KL, T = 2": Divergence(beta=0.0, student_temperature=2.0, teacher_temperature=2.0),
    "KL, P at 0.5": Divergence(beta=0.0, teacher_temperature=0.5),
}


def shorten_sft(model: SftModel) -> SftModel:
    """Return the model with a single SFT step."""
    assert model.sft is not None
    optimizer = model.sft.optimizer.model_copy(update={"warmup_steps": 0, "cooldown_steps": 0})
    sft = model.sft.model_copy(update={"steps": 1, "optimizer": optimizer})
    return model.model_copy(update={"sft": sft})


class ModelPair:
    """A task's teacher and SFT student on some of its training rows."""

    def __init__(self, task: str, options: RunOptions, count: int, *, smoke: bool) -> None:
        grid = experiments.load_single_cell({"task": task, "lmbda": "0"}, outputs=options.outputs)
        training, scale = grid.cells[0].training, grid.scale
        teacher_spec, student_spec = training.teacher, training.start
        if smoke:
            teacher_spec, student_spec = shorten_sft(teacher_spec), shorten_sft(student_spec)
        teacher = artifacts.load_artifact(
            artifacts.ensure_artifact("teacher", teacher_spec, scale, options), teacher_spec
        )
        sft_student = artifacts.load_artifact(
            artifacts.ensure_artifact("start", student_spec, scale, options), student_spec
        )
        data = load_split(task, training.data, "train", options.cache_folder)
        examples, _ = encode_examples(student_spec, sft_student.tokenizer, take_first_rows(data, count))
        batch = collate_examples(
            examples,
            sft_student.tokenizer.pad_token_id,
            is_encoder_decoder=sft_student.model.config.is_encoder_decoder,
        )
        is_token = batch.completion_mask.bool()
        with torch.no_grad():
            self.teacher = compute_completion_logits(teacher.model.eval(), batch)[is_token]
        self.student = sft_student.model.eval()
        self.logits = compute_completion_logits(self.student, batch)[is_token]
        self.weights = [p for p in self.student.parameters() if p.requires_grad]

    def compute_loss_and_gradient(self, divergence: Divergence, target: Tensor) -> tuple[float, Tensor]:
        """Return the mean over the tokens, and its gradient by all weights, flat."""
        loss = divergence(self.logits, target).mean()
        gradients = torch.autograd.grad(loss, self.weights, retain_graph=True)
        return loss.item(), torch.cat([gradient.flatten() for gradient in gradients]).double()


def restore_top_k(teacher: Tensor, top_k: int | None, tail: str) -> Tensor:
    """Return the teacher's logits (N, V) as they are restored from its top k."""
    size = teacher.shape[-1]
    scores = select_top_k(teacher, top_k, torch.float32).apply(lambda tensor: tensor[None])
    positions = torch.arange(len(teacher))
    logits = TopKTeacherLogits.create(scores, size).create_reader(size, torch.float32, len(teacher))(
        0, positions
    )
    if tail == "spread" or scores.ids is None:
        return logits
    return torch.full_like(logits, -math.inf).scatter_(1, scores.ids[0].long(), scores.log_probs[0])


def compute_angle(first: Tensor, second: Tensor) -> float:
    """Return the angle between two gradients in degrees, by the half-angle formula: exact for small ones."""
    units = [vector / vector.norm() for vector in (first, second)]
    return math.degrees(2 * math.atan2((units[0] - units[1]).norm(), (units[0] + units[1]).norm()))


def measure_errors(task: str, pair: ModelPair) -> Iterator[dict[str, Any]]:
    """Yield a row for each divergence, k and treatment of the tail."""
    size = pair.teacher.shape[-1]
    for name, divergence in DIVERGENCES.items():
        loss, gradient = pair.compute_loss_and_gradient(divergence, pair.teacher)
        for top_k in dict.fromkeys(k if k and k < size else None for k in TOP_K_VALUES):
            layout = ScoreLayout.create([1], top_k, size, "float32")
            for tail in ("spread", "dropped") if layout.top_k else ("spread",):
                stored_loss, stored_gradient = pair.compute_loss_and_gradient(
                    divergence, restore_top_k(pair.teacher, top_k, tail)
                )
                yield {
                    "task": task,
                    "vocabulary": size,
                    "tokens": len(pair.teacher),
                    "measure": name,
                    "top_k": layout.top_k,
                    "tail": tail,
                    "loss": loss,
                    # Dropped tokens have probability 0, for which reverse KL is infinite: a huge number here.
                    "loss_error": abs(stored_loss - loss) / loss if stored_loss < 1e6 else None,
                    "gradient_degrees": compute_angle(stored_gradient, gradient),
                    "gradient_ratio": float(stored_gradient.norm() / gradient.norm()),
                    "bytes_a_token": layout.bytes_per_token,
                }


def build_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Build the table of one task."""
    first = rows[0]
    title = f"{first['task']}, V = {first['vocabulary']}, {first['tokens']:,} tokens"
    table = Table("", "k", "tail", "loss error", "degrees", "bytes a token", title=title)
    for row in rows:
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
    """Measure each task, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="arithmetic, models of one SFT step, 4 rows")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, with versions")
    options = parser.parse_args()
    if options.smoke:
        options.tasks, options.rows = ("arithmetic",), 4
    silence_libraries()
    rows = []
    for task in options.tasks:
        with tempfile.TemporaryDirectory() if options.smoke else nullcontext(options.outputs) as outputs:
            pair = ModelPair(task, RunOptions(Path(outputs)), options.rows, smoke=options.smoke)
        task_rows = list(measure_errors(task, pair))
        Console().print(build_table(task_rows))
        rows += task_rows
    if options.out is not None:
        versions = {name: version(name) for name in ("torch", "transformers")}
        options.out.write_text(json.dumps({"versions": versions, "top_k": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
