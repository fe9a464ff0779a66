"""Build small grids, and stores with made-up scores that the records write themselves."""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gkd_lab.config import Cell, Evaluation, Grid, RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.experiment import parse_experiment
from gkd_lab.store import Record, Store

ScoreFunction = Callable[[Cell], float]


@dataclass(frozen=True)
class FakeTask:
    """The parts of a task that `expand_grid` needs."""

    name: str
    metrics: tuple[str, ...] = ("accuracy",)
    family: Any = "decoder-only"

    def list_default_layers(self, scale: str, source: str | None) -> list[tuple[str, Mapping[str, Any]]]:
        size = {"layers": 1, "width": 8, "heads": 1, "sft": {"steps": 1}}
        defaults = {
            **{"lmbda": 0.5, "beta": 0.5, "seed": 0, "temperature": 1.0},
            **{"teacher_temperature": 1.0, "student_temperature": 1.0},
            **{"loss_normalization": "sequence", "steps": 10, "batch_size": 2, "dropout": 0.0},
            **{"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1.0},
            **{"warmup_steps": 0, "cooldown_steps": 0, "precision": "fp32"},
            **{"max_input_tokens": 8, "max_output_tokens": 8},
            **{"data": {}, "tokenizer": {"kind": "word", "vocab_size": 50}},
            **{"teacher": "teacher", "student": "small"},
            "models": {
                "teacher": {**size, "width": 16},
                "small": size,
                "base": {**size, "layers": 2},
            },
            "evaluations": [{"decoding": "greedy", "split": "test", "examples": 50}],
        }
        return [("task", defaults)]


TASKS = {task.name: task for task in (FakeTask("arithmetic"), FakeTask("translation", ("bleu",)))}


def build_grid(**document: Any) -> Grid:
    """Build lmbda {0, 0.5, 1} x beta {0, 0.1, 1} on arithmetic; `document` replaces the file's fields."""
    grid = document.pop("grid", {"lmbda": [0, 0.5, 1], "beta": [0, 0.1, 1]})
    task = {} if "task" in grid else {"task": "arithmetic"}
    experiment = parse_experiment({"description": "made up", **task, "grid": grid, **document}, "made.yaml")
    revisions = RevisionLookup(
        resolve_data=lambda task, settings: DataSpec(kind="made", name=task, revision="1"),
        resolve_model=lambda name: (name, None, "1"),
    )
    return expand_grid("made", experiment, TASKS, revisions)


def linear_score(cell: Cell) -> float:
    """Return a score that rises with lmbda, and a little towards forward KL."""
    return 40.0 + 30.0 * cell.lmbda - 4.0 * _numeric_beta(cell) + cell.seed


def _numeric_beta(cell: Cell) -> float:
    """Return the beta, 0.25 for total variation."""
    return 0.25 if cell.beta is None else cell.beta


def fill_store(
    grid: Grid,
    store: Store,
    *,
    cells: Iterable[Cell] | None = None,
    score: ScoreFunction = linear_score,
    start_score: float = 30.0,
    teacher_score: float = 95.0,
    text: str = "3 + 4 = 7",
) -> None:
    """Write records of `cells` (default: all of the grid) and of every reference model."""
    for cell in grid.cells if cells is None else cells:
        write_finished_record(store.get_record(cell), cell, score(cell), text)
    for cell in grid.cells:
        for role, model, reference_score in (
            ("start", cell.training.start, start_score),
            ("teacher", cell.training.teacher, teacher_score),
        ):
            record = store.get_artifact(grid.scale, role, model)
            if any(record.get_evaluation(e).read_state() != "done" for e in cell.evaluations):
                write_finished_record(record, cell, reference_score, text)


def write_finished_record(record: Record, cell: Cell, score: float, text: str = "7") -> None:
    """Write a finished record: history, provenance, and every evaluation with this score."""
    record.write_provenance(
        {
            "time": "2026-01-01T00:00:00+00:00",
            "gkd_lab": "0.1.0",
            "python": "3.11.9",
            "packages": {"torch": "2.13.0"},
            "machine": {"system": "Linux", "cpus": 2},
        }
    )
    for step in range(50, 501, 50):
        loss = (1.2 - 0.7 * _numeric_beta(cell)) * 0.5 ** (step / 200) + 0.01 * (step % 100) / 100
        record.log_row({"step": step, "loss": loss, "on_policy": cell.lmbda, "grad_norm": 1.0})
    for evaluation in cell.evaluations:
        write_evaluation(record, evaluation, score, text)
    record.finish(seconds=1.0)


def write_evaluation(record: Record, evaluation: Evaluation, score: float, text: str = "7") -> None:
    """Write one evaluation of 50 examples, of which `score` per cent are right."""
    metric, *others = evaluation.metrics
    hits = [100.0 if index < score / 2 else 0.0 for index in range(50)]
    random.Random(0).shuffle(hits)
    predictions = [
        {
            "prompt": f"3 + {index} =",
            "prediction": f"{text} #{index}",
            "references": [f"#{index}"],
            "tokens": 7,
            "ended": True,
            "scores": {metric: hit},
        }
        for index, hit in enumerate(hits)
    ]
    scores = {
        metric: {"value": score, "low": score - 3, "high": score + 3, "n": 50, "signature": "made"},
        **{name: {"value": score / 2, "signature": "made"} for name in others},
        "mean_length": {"value": 7.0},
    }
    record.get_evaluation(evaluation).write_results(evaluation, predictions, scores)
