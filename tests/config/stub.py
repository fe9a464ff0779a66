"""Stub tasks and revisions with fixed defaults, so that the fingerprints of their cells never change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gkd_lab.config import Cell, ConfigError, Grid, RevisionLookup, expand_grid
from gkd_lab.config.artifact_specs import DataSpec, Family
from gkd_lab.config.experiment import apply_overrides, parse_experiment
from gkd_lab.config.settings import DataSettings


def make_model_defaults(layers: int, width: int, **sft: Any) -> dict[str, Any]:
    return {"layers": layers, "width": width, "heads": 2, "sft": sft}


@dataclass(frozen=True)
class StubTask:
    name: str
    family: Family
    metrics: tuple[str, ...]

    def list_default_layers(self, scale: str, source: str | None) -> list[tuple[str, Mapping[str, Any]]]:
        if scale != "nano":
            raise ValueError(f"{self.name} has no {scale} scale; it has: nano")
        return [("task", self.defaults)]

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {
            "lmbda": 1.0,
            "beta": 0.0,
            "teacher_temperature": 1.0,
            "student_temperature": 1.0,
            "temperature": 1.0,
            "loss_normalization": "sequence",
            "seed": 0,
            "teacher": "large",
            "student": "small",
            "models": {
                "large": make_model_defaults(2, 16, steps=20, batch_size=4, learning_rate=2e-3),
                "small": make_model_defaults(1, 8, steps=10, batch_size=4, learning_rate=2e-3),
            },
            "data": {"source": "made", "train": 100, "validation": 10, "test": 10},
            "tokenizer": {"kind": "word", "vocab_size": 64},
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "warmup_steps": 2,
            "cooldown_steps": 5,
            "steps": 20,
            "batch_size": 4,
            "dropout": 0.0,
            "precision": "fp32",
            "max_input_tokens": 12,
            "max_output_tokens": 12,
            "evaluations": [{"decoding": "greedy"}],
        }


TASKS = {
    "sums": StubTask("sums", "decoder-only", ("accuracy",)),
    "words": StubTask("words", "encoder-decoder", ("bleu", "chrf")),
}


def resolve_data(task: str, settings: DataSettings) -> DataSpec:
    sizes: dict[str, Any] = {
        "train": settings.train,
        "validation": settings.validation,
        "test": settings.test,
    }
    if settings.source == "made":
        seed = settings.seed or 0
        return DataSpec(kind="made", name=task, revision=f"{task}-1", seed=seed, **sizes)
    return DataSpec(kind="folder", path=settings.source, revision="c0ffee", **sizes)


def resolve_model(place: str) -> tuple[str | None, str | None, str]:
    if place.startswith("/"):
        return None, place, "sha256:1"
    return place, None, "abc"


def make_grid(overrides: Mapping[str, str] | None = None, **document: Any) -> Grid:
    """The cells of an experiment on `sums` unless it says otherwise."""
    has_task = "task" in document or "task" in document.get("grid", {})
    whole = {"description": "stub", **({} if has_task else {"task": "sums"}), **document}
    experiment = parse_experiment(apply_overrides(whole, overrides or {}), "stub.yaml")
    return expand_grid(
        "stub", experiment, TASKS, RevisionLookup(resolve_data=resolve_data, resolve_model=resolve_model)
    )


def make_cell(overrides: Mapping[str, str] | None = None, **document: Any) -> Cell:
    (only,) = make_grid(overrides, **document).cells
    return only


def get_refusal(overrides: Mapping[str, str] | None = None, **document: Any) -> str:
    """Return the message that refuses an invalid experiment."""
    try:
        make_grid(overrides, **document)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"accepted: {document} {overrides}")
