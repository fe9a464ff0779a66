"""Scores of models as claims read them: from the long table of a run, or from the paper's numbers.

A model is what cells of several seeds have in common: their settings, under one evaluation and metric. Its
settings are resolved values (lmbda, loss, beta, role, ...) and never a method's name, so the same claim
reads the paper's figures and our own tables.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from gkd_lab.claims import paper
from gkd_lab.claims.model_settings import (
    MODEL_SETTINGS,
    SETTING_NAMES,
    Conditions,
    Settings,
    describe_condition,
    meets_condition,
)
from gkd_lab.config.settings import METHODS
from gkd_lab.statistics.example_scores import ExampleLookup, SeedScore, build_sample, find_no_examples
from gkd_lab.statistics.noise import ScoreSample


@dataclass(frozen=True)
class ComparedModel:
    """Cells that differ in their seed only, a shared SFT student, or a teacher."""

    settings: Settings
    scores: dict[int, SeedScore]
    """Seed -> finished score; empty where none is."""
    seeds: set[int] = field(default_factory=set)
    """Seeds that are planned, finished or not."""

    def __getitem__(self, name: str) -> Any:
        return self.settings.get(name)


@dataclass(frozen=True)
class Column:
    """Models that differ only in what a claim compares; all other settings are shared."""

    shared: Settings
    models: list[ComparedModel]


@dataclass(frozen=True)
class ModelScores:
    """Models that claims compare, with what is known of their examples."""

    models: list[ComparedModel]
    find_examples: ExampleLookup = find_no_examples
    problems: tuple[str, ...] = ()
    """What of the table was left out, and why."""
    empty_reason: str | None = None
    """First condition that left no trained cell."""

    def where(self, *conditions: Conditions, **others: Any) -> "ModelScores":
        """Return the models that meet all conditions; quality scores, unless `measure` is named.

        A start or teacher is kept if it meets the conditions on what it shares with trained cells.
        """
        merged: dict[str, Any] = {"measure": "quality"}
        for condition in (*conditions, others):
            merged.update(condition)
        models, reason = self.models, self.empty_reason
        if not models:
            reason = reason or "no cells"
        for name in sorted(merged, key=lambda name: name != "task"):
            models = [model for model in models if _meets(model, name, merged[name])]
            if not reason and not any(model["role"] == "cell" for model in models):
                reason = f"no {describe_condition(name, merged[name])}"
        return ModelScores(models, self.find_examples, self.problems, reason)

    def columns(self, varying: Iterable[str]) -> list[Column]:
        """Group the models into columns that share every setting but the varying ones."""
        dependent = {name for field_name in varying for name in _DEPENDENT_SETTINGS.get(field_name, ())}
        excluded = {*varying, *dependent}
        shared = [name for name in SETTING_NAMES if name not in excluded]
        groups: dict[tuple[Any, ...], list[ComparedModel]] = {}
        for model in self.models:
            if "role" in excluded or model["role"] == "cell":
                groups.setdefault(tuple(model[name] for name in shared), []).append(model)
        return [Column(dict(zip(shared, key, strict=True)), models) for key, models in groups.items()]

    def collect_sample(self, models: Sequence[ComparedModel]) -> tuple[ScoreSample | None, list[str]]:
        """Return (scores over the seeds that all models have, notes on what these do not cover).

        No sample: the models have no seed in common. Examples are used where all scores have them.
        """
        seeds = sorted(set.intersection(*(set(model.scores) for model in models)))
        if not seeds:
            return None, []
        table = [[model.scores[seed] for seed in seeds] for model in models]
        sample, note = build_sample(table, self.find_examples)
        return sample, [*([note] if note else []), *_describe_coverage(models, seeds)]


def _describe_coverage(models: Sequence[ComparedModel], seeds: Sequence[int]) -> list[str]:
    """Return notes on planned seeds that some model lacks, and on an SFT student that all seeds share."""
    unpaired = sorted(set().union(*(model.seeds for model in models)) - set(seeds))
    starts = {model.scores[seed].start for model in models for seed in seeds}
    notes = [f"not all models have seed {', '.join(map(str, unpaired))}"] if unpaired else []
    return [*notes, "one SFT student"] if len(seeds) > 1 and len(starts) == 1 and starts != {None} else notes


def _meets(model: ComparedModel, name: str, condition: Any) -> bool:
    """Return whether a model meets one condition; settings of trained cells do not apply to references."""
    if model["role"] != "cell" and name in MODEL_SETTINGS and name != "role":
        return True
    return meets_condition(model[name], condition)


_DEPENDENT_SETTINGS = {
    "temperature": ("evaluation",),
    "beta": ("loss",),
    "loss": ("beta",),
    "anchor": ("alpha", "loss", "beta"),
    "role": MODEL_SETTINGS,
}
"""Setting -> settings that cannot stay the same where it changes."""


# ---- building ----


@dataclass
class ModelCollector:
    """Collects scores by settings and seed, and counts what it leaves out."""

    models: dict[tuple[Any, ...], ComparedModel] = field(default_factory=dict)
    conflicts: set[tuple[Any, ...]] = field(default_factory=set)
    problems: Counter[str] = field(default_factory=Counter)
    """Text on what was left out -> how often."""
    notes: list[str] = field(default_factory=list)
    """Other texts on how the table was read."""

    def add(self, settings: Settings, seed: int | None, score: SeedScore | None) -> None:
        """Add a score; None for a seed or score that is missing, which keeps the model as planned."""
        key = tuple(settings.get(name) for name in SETTING_NAMES)
        model = self.models.setdefault(key, ComparedModel(settings, {}))
        if seed is None:
            return
        model.seeds.add(seed)
        if score is None:
            return
        stored = model.scores.setdefault(seed, score)
        if (stored.key, stored.value) != (score.key, score.value):
            self.conflicts.add((*key, seed))
        elif settings["role"] == "cell" and stored is not score:
            self.problems["repeated rows"] += 1

    def finish(self) -> list[ComparedModel]:
        """Return the models without the scores that contradict each other."""
        for *key, seed in self.conflicts:
            del self.models[tuple(key)].scores[seed]
        if self.conflicts:
            self.problems["scores that differ though their settings and seed are equal"] += len(
                self.conflicts
            )
        return list(self.models.values())

    def describe_problems(self) -> tuple[str, ...]:
        """Return a text per kind of score that was left out, and the notes."""
        left_out = (f"left out: {count} {text}" for text, count in self.problems.items())
        return (*left_out, *self.notes)


def build_reference_settings(settings: Settings, role: str) -> Settings:
    """Return the settings of a cell's start or teacher: what the cell shares with it."""
    return {**settings, **dict.fromkeys(MODEL_SETTINGS), "role": role}


# ---- the paper ----

OTHER_MEASURES = {"self_bleu": "self_bleu", "entailment": "entailment", "step_time": "step_time",
                   "step_seconds": "step_time"}  # fmt: skip
"""Metric -> measure, where it is not a model's quality."""


def load_paper_scores(figures: Iterable[str] | None = None) -> ModelScores:
    """Load the paper's numbers of these figures (None: of all), one seed each."""
    frame = paper.load_values()
    selected = frame if figures is None else frame[frame["figure"].isin(tuple(figures))]
    collector = ModelCollector()
    for row in selected.to_dict("records"):
        _add_paper_row(collector, {str(k): None if pd.isna(v) else v for k, v in row.items()})
    return ModelScores(collector.finish())


def _add_paper_row(collector: ModelCollector, row: dict[str, Any]) -> None:
    """Add a number of the paper and, where it is known, that of its start (0 for gains)."""
    settings = {
        **{name: row[name] for name in ("task", "metric", "student", "decoding", "temperature")},
        **{name: row[name] for name in ("teacher_temperature", "role", "lmbda", "beta", "alpha")},
        "measure": OTHER_MEASURES.get(row["metric"], "quality"),
        "pair": "self" if row["figure"] == "A.10" else "smaller",
        "train_share": row["train_share"] if row["figure"] == "3" else None,  # elsewhere it is no axis
        "loss": classify_method_loss(row["method"], row["divergence"]),
        "anchor": "start" if row["method"] == "rlef" else None,
    }
    collector.add(settings, 0, SeedScore(row["value"], row["error"]))
    is_gain = row["form"] == "gain"
    if row["role"] == "cell" and (is_gain or row["start"] is not None):
        error = 0.0 if is_gain else row["gain_error"] - row["error"]
        start = SeedScore(0.0 if is_gain else row["start"], error)
        collector.add(build_reference_settings(settings, "start"), 0, start)


def classify_method_loss(method: Any, divergence: Any) -> str | None:
    """Return the method's name if it trains with cross-entropy (`seqkd`, `sft`), else `divergence`."""
    settings = METHODS.get(method, {}) if isinstance(method, str) else {}
    return str(method) if settings.get("type") == "cross_entropy" else divergence
