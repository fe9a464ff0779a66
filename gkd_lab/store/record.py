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
from typing import Any

from gkd_lab.config.artifact_specs import (
    SftModel,
    TeacherScoresSpec,
    TeacherTextSpec,
    get_artifact_folder,
    get_scores_folder,
    get_text_folder,
)
from gkd_lab.config.cell import AnyEvaluation, Cell, LmEvalEvaluation
from gkd_lab.config.fingerprint import FORMAT_VERSION, Frozen
from gkd_lab.store import lock, timing
from gkd_lab.store.cell_state import State, compute_cell_state, judge_evaluation
from gkd_lab.store.file_hashes import write_file_hashes
from gkd_lab.store.files import (
    append_json_line,
    drop_lines_beyond_step,
    quarantine_path,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
)


class DamagedRecord(RuntimeError):
    """A record that belongs to another description than the one that its name stands for."""


def _has_valid_fingerprint(stored_spec: Mapping[str, Any], spec_type: type[Frozen]) -> bool:
    """Whether a `spec.json` has the fingerprint of what it says; one of another format is believed."""
    if stored_spec.get("format") != FORMAT_VERSION:
        return True
    try:
        found = spec_type.model_validate(stored_spec.get("spec"))
    except ValueError:
        return False
    return found.full_fingerprint == stored_spec.get("fingerprint")


@dataclass(frozen=True)
class RecordPart:
    """A folder with a specification and a status: a training, an artifact or an evaluation."""

    folder: Path

    @property
    def status_file(self) -> Path:
        return self.folder / "status.json"

    def read_status(self) -> dict[str, Any]:
        """`{"state": "done" | "failed", ...}`, or `{}` while there is no verdict."""
        verdict = read_json(self.status_file) or {}
        return verdict if verdict.get("state") in ("done", "failed") else {}

    def write_spec(self, spec: Frozen, **header_fields: Any) -> None:
        """Write `spec.json`; an existing one must describe the same. Raises DamagedRecord."""
        for left_by_a_kill in self.folder.glob(".*.part"):
            if left_by_a_kill.is_file():
                left_by_a_kill.unlink(missing_ok=True)
        path = self.folder / "spec.json"
        there = read_json(path)
        if there is None or not _has_valid_fingerprint(there, type(spec)):
            quarantine_path(path)
            body = {"format": FORMAT_VERSION, "fingerprint": spec.full_fingerprint, **header_fields}
            write_json(path, {**body, "spec": spec.model_dump(mode="json")})
        elif there.get("fingerprint") != spec.full_fingerprint:
            raise DamagedRecord(
                f"{path} describes another run ({there.get('fingerprint')}) than the one asked for "
                f"({spec.full_fingerprint}); move the folder away and run again"
            )

    def mark_done(self, **facts: Any) -> None:
        """The last thing that a finished part writes."""
        write_json(self.status_file, {"state": "done", **facts})

    def mark_failed(self, error: str, traceback: str = "") -> None:
        """Keep why it failed; it is tried again when asked."""
        write_json(self.status_file, {"state": "failed", "error": error, "traceback": traceback})

    def clear_failure(self) -> None:
        """Make a failed part one that is to be done; a finished one stays as it is."""
        if self.read_status().get("state") == "failed":
            self.status_file.unlink(missing_ok=True)


@dataclass(frozen=True)
class EvaluationRecord(RecordPart):
    """Predictions and scores of one decoding."""

    def read_state(self) -> State:
        return self.read_status().get("state", "missing")

    def lacks_metrics(self, evaluation: AnyEvaluation) -> bool:
        """Whether it was judged before all of these metrics were asked for."""
        verdict = self.read_status().get("state")
        return verdict == "done" and not judge_evaluation(verdict, evaluation.metrics, self.read_scores())

    def write_results(
        self,
        evaluation: AnyEvaluation,
        predictions: list[dict[str, Any]],
        scores: Mapping[str, Any],
        **facts: Any,
    ) -> None:
        """All files of an evaluation, its status last."""
        self.write_spec(evaluation)
        write_json_lines(self.folder / "predictions.jsonl", predictions)
        write_json(self.folder / "scores.json", dict(scores))
        self.mark_done(**facts)

    def read_scores(self) -> dict[str, dict[str, Any]]:
        """Metric -> `{"value", "signature", ...}`; empty where there are none."""
        return read_json(self.folder / "scores.json") or {}

    def read_prediction_rows(self) -> list[dict[str, Any]]:
        """One row an example: prompt, prediction, references, a value per metric."""
        return read_json_lines(self.folder / "predictions.jsonl")


@dataclass(frozen=True)
class Record(RecordPart):
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

    def lock(self) -> lock.FolderLock:
        """Held by whoever works on this record; free again when its process dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return lock.FolderLock(self.folder)

    def is_locked(self) -> bool:
        """Whether another process is at work here."""
        return lock.is_locked(self.folder)

    def read_state(self) -> State:
        """Return the state of the training or artifact alone, without its evaluations."""
        return compute_cell_state(self.read_status().get("state"), [], self.is_locked).training

    def get_evaluation(self, evaluation: AnyEvaluation) -> EvaluationRecord:
        return EvaluationRecord(self.folder / "evaluations" / evaluation.folder)

    def list_harness_evaluations(self) -> list[LmEvalEvaluation]:
        """The lm-eval tasks that were begun, whether or not an experiment asks for them."""
        found = [read_json(path) for path in sorted(self.folder.glob("evaluations/lm_eval-*/spec.json"))]
        return [LmEvalEvaluation.model_validate(one["spec"]) for one in found if one is not None]

    def log_row(self, row: Mapping[str, Any]) -> None:
        """One line of the training's history; `step` is in it."""
        append_json_line(self.metrics_file, row)
        timing.log_step_time(self.folder, row["step"])

    def read_history(self) -> list[dict[str, Any]]:
        return read_json_lines(self.metrics_file)

    def read_step_times(self) -> list[dict[str, Any]]:
        """When each row of the history was written, for `gkd_lab.store.timing`."""
        return timing.read_step_times(self.folder)

    def rewind_history(self, step: int) -> None:
        """Forget the history after `step`, from where this process goes on."""
        drop_lines_beyond_step(self.metrics_file, step)
        timing.log_process_start(self.folder, step)

    def read_provenance(self) -> dict[str, Any]:
        """What the result came from; empty before it is there."""
        return read_json(self.folder / "provenance.json") or {}

    def write_provenance(self, facts: Mapping[str, Any]) -> None:
        write_json(self.folder / "provenance.json", dict(facts))

    def finish(self, **facts: Any) -> None:
        """Mark the training done, with its seconds at work, and drop what only resuming needed."""
        write_file_hashes(self.folder)
        times = self.read_step_times()
        self.mark_done(**({"seconds": round(timing.sum_work_seconds(times), 3)} if times else {}) | facts)
        shutil.rmtree(self.steps_folder, ignore_errors=True)


@dataclass(frozen=True)
class Store:
    """All records below one outputs folder."""

    root: Path

    def get_record(self, cell: Cell) -> Record:
        return Record(self.root / cell.folder)

    def get_artifact(self, scale: str, role: str, model: SftModel) -> Record:
        """The record of a teacher (`teacher`) or of a starting student (`start`)."""
        return Record(self.root / get_artifact_folder(scale, role, model))

    def get_teacher_text(self, scale: str, text: TeacherTextSpec) -> Record:
        """The record of what a teacher wrote for the prompts of a training split."""
        return Record(self.root / get_text_folder(scale, text))

    def get_teacher_scores(self, scale: str, scores: TeacherScoresSpec) -> Record:
        """The record of what a teacher says of every token of a training split."""
        return Record(self.root / get_scores_folder(scale, scores))
