"""The files of one run, and the folder of all runs. Nothing else reads or writes them.

    spec.json  provenance.json  metrics.jsonl  checkpoint/  status.json (written last, by rename)
    times.jsonl (when each row of metrics.jsonl was written)  files.json (SHA-256 of what a training left)
    evaluations/<decoding>-<fp>/  spec.json  predictions.jsonl  scores.json  status.json
    evaluations/lm_eval-<fp>/     the same of a task of lm-eval

`status.json` is the truth: without it a run is not finished, whatever else is there.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gkd_lab.config.cell import (
    AnyEvaluation,
    Cell,
    HarnessEvaluation,
    ScoresSpec,
    SftModel,
    TextSpec,
    artifact_folder,
    scores_folder,
    text_folder,
)
from gkd_lab.config.fingerprint import FORMAT, Frozen
from gkd_lab.store import lock, timing
from gkd_lab.store.file_hashes import write_digests
from gkd_lab.store.files import (
    append_line,
    keep_lines_until,
    read_json,
    read_lines,
    set_aside,
    write_json,
    write_lines,
)

State = Literal["done", "running", "failed", "missing"]
_WORST: tuple[State, ...] = ("failed", "missing", "running", "done")


def worst(states: list[State]) -> State:
    """The state of a whole from those of its parts; all done is done."""
    return min(states, key=_WORST.index)


class DamagedRecord(RuntimeError):
    """A record that belongs to another description than the one that its name stands for."""


def _belongs_together(there: Mapping[str, Any], kind: type[Frozen]) -> bool:
    """Whether a `spec.json` has the fingerprint of what it says; one of another format is believed."""
    if there.get("format") != FORMAT:
        return True
    try:
        found = kind.model_validate(there.get("spec"))
    except ValueError:
        return False
    return found.full_fingerprint == there.get("fingerprint")


@dataclass(frozen=True)
class Part:
    """A folder with a specification and a status: a training, an artifact or an evaluation."""

    folder: Path

    @property
    def status_file(self) -> Path:
        return self.folder / "status.json"

    def status(self) -> dict[str, Any]:
        """`{"state": "done" | "failed", ...}`, or `{}` while there is no verdict."""
        verdict = read_json(self.status_file) or {}
        return verdict if verdict.get("state") in ("done", "failed") else {}

    def describe(self, spec: Frozen, **more: Any) -> None:
        """Write `spec.json`; an existing one must describe the same. Raises DamagedRecord."""
        for left_by_a_kill in self.folder.glob(".*.part"):
            if left_by_a_kill.is_file():
                left_by_a_kill.unlink(missing_ok=True)
        path = self.folder / "spec.json"
        there = read_json(path)
        if there is None or not _belongs_together(there, type(spec)):
            set_aside(path)
            body = {"format": FORMAT, "fingerprint": spec.full_fingerprint, **more}
            write_json(path, {**body, "spec": spec.model_dump(mode="json")})
        elif there.get("fingerprint") != spec.full_fingerprint:
            raise DamagedRecord(
                f"{path} describes another run ({there.get('fingerprint')}) than the one asked for "
                f"({spec.full_fingerprint}); move the folder away and run again"
            )

    def done(self, **facts: Any) -> None:
        """The last thing that a finished part writes."""
        write_json(self.status_file, {"state": "done", **facts})

    def failed(self, error: str, traceback: str = "") -> None:
        """Keep why it failed; it is tried again when asked."""
        write_json(self.status_file, {"state": "failed", "error": error, "traceback": traceback})

    def forget_failure(self) -> None:
        """Make a failed part one that is to be done; a finished one stays as it is."""
        if self.status().get("state") == "failed":
            self.status_file.unlink(missing_ok=True)


@dataclass(frozen=True)
class EvaluationRecord(Part):
    """Predictions and scores of one decoding."""

    def state(self) -> State:
        return self.status().get("state", "missing")

    def lacks(self, evaluation: AnyEvaluation) -> bool:
        """Whether it was judged before all of these metrics were asked for."""
        return self.state() == "done" and not set(evaluation.metrics) <= set(self.scores())

    def write(
        self,
        evaluation: AnyEvaluation,
        predictions: list[dict[str, Any]],
        scores: Mapping[str, Any],
        **facts: Any,
    ) -> None:
        """All files of an evaluation, its status last."""
        self.describe(evaluation)
        write_lines(self.folder / "predictions.jsonl", predictions)
        write_json(self.folder / "scores.json", dict(scores))
        self.done(**facts)

    def scores(self) -> dict[str, dict[str, Any]]:
        """Metric -> `{"value", "signature", ...}`; empty where there are none."""
        return read_json(self.folder / "scores.json") or {}

    def predictions(self) -> list[dict[str, Any]]:
        """One row an example: prompt, prediction, references, a value per metric."""
        return read_lines(self.folder / "predictions.jsonl")


@dataclass(frozen=True)
class Record(Part):
    """One training (or artifact) and what was judged of it."""

    @property
    def checkpoint(self) -> Path:
        """The result: a plain transformers folder."""
        return self.folder / "checkpoint"

    @property
    def steps_folder(self) -> Path:
        """Checkpoints to resume from, removed when the training is done."""
        return self.folder / "steps"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def lock(self) -> lock.Claim:
        """Held by whoever works on this record; free again when its process dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return lock.Claim(self.folder)

    def is_claimed(self) -> bool:
        """Whether another process is at work here."""
        return lock.is_claimed(self.folder)

    def state(self) -> State:
        """Of the training alone."""
        state: State | None = self.status().get("state")
        if state is not None:
            return state
        return "running" if self.is_claimed() else "missing"

    def evaluation(self, evaluation: AnyEvaluation) -> EvaluationRecord:
        return EvaluationRecord(self.folder / "evaluations" / evaluation.folder)

    def harness_evaluations(self) -> list[HarnessEvaluation]:
        """The lm-eval tasks that were begun, whether or not an experiment asks for them."""
        found = [read_json(path) for path in sorted(self.folder.glob("evaluations/lm_eval-*/spec.json"))]
        return [HarnessEvaluation.model_validate(one["spec"]) for one in found if one is not None]

    def log(self, row: Mapping[str, Any]) -> None:
        """One line of the training's history; `step` is in it."""
        append_line(self.metrics_file, row)
        timing.note(self.folder, row["step"])

    def history(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics_file)

    def times(self) -> list[dict[str, Any]]:
        """When each row of the history was written, for `gkd_lab.store.timing`."""
        return timing.times(self.folder)

    def rewind(self, step: int) -> None:
        """Forget the history after `step`, from where this process goes on."""
        keep_lines_until(self.metrics_file, step)
        timing.begin(self.folder, step)

    def provenance(self) -> dict[str, Any]:
        """What the result came from; empty before it is there."""
        return read_json(self.folder / "provenance.json") or {}

    def write_provenance(self, facts: Mapping[str, Any]) -> None:
        write_json(self.folder / "provenance.json", dict(facts))

    def finish(self, **facts: Any) -> None:
        """Mark the training done, with its seconds at work, and drop what only resuming needed."""
        write_digests(self.folder)
        times = self.times()
        self.done(**({"seconds": round(timing.seconds(times), 3)} if times else {}) | facts)
        shutil.rmtree(self.steps_folder, ignore_errors=True)


@dataclass(frozen=True)
class Store:
    """All records below one outputs folder."""

    root: Path

    def of(self, cell: Cell) -> Record:
        return Record(self.root / cell.folder)

    def artifact(self, scale: str, role: str, model: SftModel) -> Record:
        """The record of a teacher (`teacher`) or of a starting student (`start`)."""
        return Record(self.root / artifact_folder(scale, role, model))

    def text(self, scale: str, text: TextSpec) -> Record:
        """The record of what a teacher wrote for the prompts of a training split."""
        return Record(self.root / text_folder(scale, text))

    def scores(self, scale: str, scores: ScoresSpec) -> Record:
        """The record of what a teacher says of every token of a training split."""
        return Record(self.root / scores_folder(scale, scores))
