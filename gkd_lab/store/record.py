"""Records: the files of one training, artifact or evaluation, and the store of all of them.

    spec.json  provenance.json  metrics.jsonl  checkpoint/  status.json (written last, by rename)
    selection.jsonl  checkpoint-best/ (scores on validation rows during training, where it is asked for)
    times.jsonl (when each row of metrics.jsonl was written)  files.json (SHA-256 of each file of a training)
    evaluations/<decoding>-<fp>/  spec.json  predictions.jsonl  scores.json  status.json
    evaluations/lm_eval-<fp>/     the same files for a task of lm-eval

`status.json` is the source of truth: without it a run is not finished, whatever other files exist.
"""

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
from gkd_lab.store.cell_state import State, compute_cell_state, require_metrics
from gkd_lab.store.file_hashes import write_file_hashes
from gkd_lab.store.files import (
    append_json_line,
    drop_lines_beyond_step,
    quarantine_path,
    read_json,
    read_json_lines,
    read_last_json_lines,
    remove_file,
    remove_folder,
    write_json,
    write_json_lines,
)
from gkd_lab.store.heartbeat import require_lock

_UNPACKABLE_FILE = "alone.json"


class DamagedRecord(RuntimeError):
    """A record whose files contradict its specification or each other."""


def _has_valid_fingerprint(stored_spec: Mapping[str, Any], spec_type: type[Frozen]) -> bool:
    """Return whether a stored spec hashes to its stored fingerprint; other format versions are trusted."""
    if stored_spec.get("format") != FORMAT_VERSION:
        return True
    try:
        spec = spec_type.model_validate(stored_spec.get("spec"))
    except ValueError:
        return False
    return spec.full_fingerprint == stored_spec.get("fingerprint")


@dataclass(frozen=True)
class RecordPart:
    """Folder with a specification and a status: a training, an artifact or an evaluation."""

    folder: Path

    @property
    def status_file(self) -> Path:
        """Path of `status.json`, which is written last."""
        return self.folder / "status.json"

    def read_status(self) -> dict[str, Any]:
        """Return `{"state": "done" | "failed", ...}`; {} while the part is unfinished."""
        status = read_json(self.status_file) or {}
        return status if status.get("state") in ("done", "failed") else {}

    def write_spec(self, spec: Frozen, **header_fields: Any) -> None:
        """Write `spec.json`, or check the existing one's fingerprint; also delete leftover `.part` files.

        A damaged `spec.json` is quarantined. Raises DamagedRecord where the folder belongs to another run.
        """
        require_lock(self.folder)
        for unfinished_file in self.folder.glob(".*.part"):  # left by a killed process
            if unfinished_file.is_file():
                unfinished_file.unlink(missing_ok=True)
        path = self.folder / "spec.json"
        stored_spec = read_json(path)
        if stored_spec is None or not _has_valid_fingerprint(stored_spec, type(spec)):
            quarantine_path(path)
            header = {"format": FORMAT_VERSION, "fingerprint": spec.full_fingerprint, **header_fields}
            write_json(path, {**header, "spec": spec.model_dump(mode="json")})
        elif stored_spec.get("fingerprint") != spec.full_fingerprint:
            raise DamagedRecord(
                f"{path} describes another run ({stored_spec.get('fingerprint')}) than the requested one "
                f"({spec.full_fingerprint}); move the folder away and run again"
            )

    def mark_done(self, **facts: Any) -> None:
        """Write the status `done` with `facts`; call it after all other files are written."""
        write_json(self.status_file, {"state": "done", **facts})

    def mark_failed(self, error: str, traceback: str = "") -> None:
        """Write the status `failed` with error and traceback; `--retry-failed` clears it."""
        write_json(self.status_file, {"state": "failed", "error": error, "traceback": traceback})

    def clear_failure(self) -> None:
        """Delete the status of a failed part, so that it is run again; a finished part stays."""
        if self.read_status().get("state") == "failed":
            self.clear_status()

    def clear_status(self) -> None:
        """Delete the status, so that the part counts as unfinished."""
        remove_file(self.status_file)


@dataclass(frozen=True)
class EvaluationRecord(RecordPart):
    """Predictions and scores of one evaluation of a model."""

    def read_state(self) -> State:
        """Return the stored state, done, failed or missing; never running."""
        return self.read_status().get("state", "missing")

    def lacks_metrics(self, evaluation: AnyEvaluation) -> bool:
        """Return whether the evaluation is done but has no score for one of its requested metrics."""
        state = self.read_status().get("state")
        return state == "done" and not require_metrics(state, evaluation.metrics, self.read_scores())

    def write_results(
        self,
        evaluation: AnyEvaluation,
        predictions: list[dict[str, Any]],
        scores: Mapping[str, Any],
        **facts: Any,
    ) -> None:
        """Write spec, predictions and scores of an evaluation, then the status `done` with `facts`."""
        self.write_spec(evaluation)
        write_json_lines(self.folder / "predictions.jsonl", predictions)
        write_json(self.folder / "scores.json", dict(scores))
        self.mark_done(**facts)

    def read_scores(self) -> dict[str, dict[str, Any]]:
        """Return metric -> `{"value", "signature", ...}`; {} if there are no scores."""
        return read_json(self.folder / "scores.json") or {}

    def read_prediction_rows(self) -> list[dict[str, Any]]:
        """Return one row per text (prompt, prediction, references, scores), up to the first damaged line."""
        return read_json_lines(self.folder / "predictions.jsonl")


@dataclass(frozen=True)
class Record(RecordPart):
    """One training or artifact, with its evaluations."""

    @property
    def checkpoint(self) -> Path:
        """Folder of the trained model and its tokenizer, as transformers saves them."""
        return self.folder / "checkpoint"

    @property
    def best_checkpoint(self) -> Path:
        """Folder of the model that scored best on validation rows, beside the last one."""
        return self.folder / "checkpoint-best"

    @property
    def steps_folder(self) -> Path:
        """Folder of the checkpoints to resume from, removed when the training is done."""
        return self.folder / "steps"

    @property
    def metrics_file(self) -> Path:
        """Path of `metrics.jsonl`, the history of the training."""
        return self.folder / "metrics.jsonl"

    def lock(self) -> lock.FolderLock:
        """Create the record's folder and return its lock, not yet acquired."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return lock.FolderLock(self.folder)

    def is_locked(self) -> bool:
        """Return whether a live process, this one included, holds the lock of this record."""
        return lock.is_locked(self.folder)

    def read_state(self) -> State:
        """Return the state of the training or artifact alone: done, failed, running or missing."""
        return compute_cell_state(self.read_status().get("state"), [], self.is_locked).training

    def get_evaluation(self, evaluation: AnyEvaluation) -> EvaluationRecord:
        """Return the record of one evaluation of this model, whether or not its files exist."""
        return EvaluationRecord(self.folder / "evaluations" / evaluation.folder)

    def list_harness_evaluations(self) -> list[LmEvalEvaluation]:
        """Return the lm-eval evaluations that have a spec here, requested by an experiment or not."""
        paths = sorted(self.folder.glob("evaluations/lm_eval-*/spec.json"))
        stored_specs = [stored_spec for path in paths if (stored_spec := read_json(path)) is not None]
        return [LmEvalEvaluation.model_validate(stored_spec["spec"]) for stored_spec in stored_specs]

    def log_row(self, row: Mapping[str, Any]) -> None:
        """Append a row, which has a `step`, to `metrics.jsonl`, and the present time to `times.jsonl`."""
        append_json_line(self.metrics_file, row)
        timing.log_step_time(self.folder, row["step"])

    def read_history(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`, up to the first damaged line; [] without the file."""
        return read_json_lines(self.metrics_file)

    def read_recent_history(self, count: int) -> list[dict[str, Any]]:
        """Return the last `count` rows of the history, reading only the end of its file."""
        return read_last_json_lines(self.metrics_file, count)

    def read_step_times(self) -> list[dict[str, Any]]:
        """Return `{"step", "time"}` for each row of the history, as `gkd_lab.store.timing` takes them."""
        return timing.read_step_times(self.folder)

    def read_seconds_per_step(self) -> float | None:
        """Return the present pace in seconds per step, read from the end of `times.jsonl`; None: unknown."""
        return timing.read_seconds_per_step(self.folder)

    def log_selection(self, row: Mapping[str, Any]) -> None:
        """Append a row, a `step` and its score on validation rows, to `selection.jsonl`."""
        append_json_line(self.folder / "selection.jsonl", row)

    def read_selection(self) -> list[dict[str, Any]]:
        """Return the rows of `selection.jsonl`; [] without the file."""
        return read_json_lines(self.folder / "selection.jsonl")

    def rewind_history(self, step: int) -> None:
        """Drop history, selection and times after `step`; log that this process starts or resumes there."""
        drop_lines_beyond_step(self.metrics_file, step)
        drop_lines_beyond_step(self.folder / "selection.jsonl", step)
        timing.log_process_start(self.folder, step)

    def read_provenance(self) -> dict[str, Any]:
        """Return the contents of `provenance.json`; {} if it is missing."""
        return read_json(self.folder / "provenance.json") or {}

    def write_provenance(self, facts: Mapping[str, Any]) -> None:
        """Write `facts` to `provenance.json`, replacing it."""
        write_json(self.folder / "provenance.json", dict(facts))

    def finish(self, **facts: Any) -> None:
        """Hash the files, mark the record done with its work seconds, delete the checkpoints in `steps`."""
        write_file_hashes(self.folder)
        times = self.read_step_times()
        self.mark_done(**({"seconds": round(timing.sum_work_seconds(times), 3)} if times else {}) | facts)
        remove_folder(self.steps_folder)

    def read_unpackable_reason(self) -> str | None:
        """Return the stored reason why copies of this SFT student cannot be packed; None if none is known."""
        reason = (read_json(self.folder / _UNPACKABLE_FILE) or {}).get("reason")
        return reason if isinstance(reason, str) else None

    def write_unpackable_reason(self, reason: str) -> None:
        """Store the reason why copies of this SFT student cannot be packed, which `gkd-lab plan` shows."""
        if self.read_unpackable_reason() != reason:
            write_json(self.folder / _UNPACKABLE_FILE, {"reason": reason})

    def delete_unpackable_reason(self) -> None:
        """Delete the stored reason, if any, after a pack of this SFT student was built."""
        remove_file(self.folder / _UNPACKABLE_FILE)


@dataclass(frozen=True)
class Store:
    """Records below one outputs folder."""

    root: Path

    def get_record(self, cell: Cell) -> Record:
        """Return the record of a cell, whether or not its files exist."""
        return Record(self.root / cell.folder)

    def get_artifact(self, scale: str, role: str, model: SftModel) -> Record:
        """Return the record of a teacher (role `teacher`) or SFT student (role `start`), existing or not."""
        return Record(self.root / get_artifact_folder(scale, role, model))

    def get_sft_student(self, cell: Cell) -> Record:
        """Return the record of the SFT student that a cell's training starts from, existing or not."""
        return self.get_artifact(cell.scale, "start", cell.training.start)

    def get_teacher_text(self, scale: str, text: TeacherTextSpec) -> Record:
        """Return the record of a teacher's completions for a training split, existing or not."""
        return Record(self.root / get_text_folder(scale, text))

    def get_teacher_scores(self, scale: str, scores: TeacherScoresSpec) -> Record:
        """Return the record of a teacher's scores for a training split's tokens, existing or not."""
        return Record(self.root / get_scores_folder(scale, scores))
