"""One record read again: held to its specification, its hashes, its predictions, its sources as of now."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from gkd_lab.config.artifact_specs import DataSpec, ModelSpec, SftModel, TeacherScoresSpec, TeacherTextSpec
from gkd_lab.config.cell import Evaluation, LmEvalEvaluation, Training
from gkd_lab.config.fingerprint import FORMAT_VERSION, SHOWN_DIGITS, Frozen
from gkd_lab.metrics import METRICS, Scorer
from gkd_lab.metrics.scored_predictions import parse_prediction, score_predictions
from gkd_lab.store import DamagedRecord, EvaluationRecord, Record, Store
from gkd_lab.store.file_hashes import list_changed_files, read_file_hashes
from gkd_lab.store.files import read_json
from gkd_lab.store.predictions import read_predictions

T = TypeVar("T", bound=Frozen)
Spec = Training | SftModel | TeacherTextSpec | TeacherScoresSpec
Revisions = Mapping[tuple[str, ...], str]
"""(data or model, its place) -> revision."""


@dataclass
class VerificationResult:
    """What was read, and what of it does not match."""

    records: int = 0
    evaluations: int = 0
    files: int = 0
    missing: int = 0
    """Cells of the experiment that were not begun."""
    mismatches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be compared, and why."""


@dataclass(frozen=True)
class RecordVerifier:
    """One record that is read again."""

    store: Store
    record: Record
    result: VerificationResult
    scorer: Scorer

    def verify_record(self, revisions: Revisions) -> None:
        if self.record.is_locked():
            self._add_note("left alone, another process works there")
            return
        self.result.records += 1
        spec = self._load_record_spec()
        if spec is not None:
            self._verify_source_revisions(spec, revisions)
        if self._is_done(self.record):
            self._verify_file_hashes()
            self._verify_provenance(spec)
        for folder in sorted(self.record.folder.glob("evaluations/*-*")):
            self._verify_evaluation(EvaluationRecord(folder))

    def verify_revisions(self, revisions: Revisions) -> None:
        content = (read_json(self.record.folder / "spec.json") or {}).get("spec")
        try:
            self._verify_source_revisions(
                _get_spec_type(self.record.folder).model_validate(content), revisions
            )
        except ValidationError:
            return  # another experiment's: not asked for here

    def _load_record_spec(self) -> Spec | None:
        return self._load_spec(self.record.folder, _get_spec_type(self.record.folder))

    def _load_spec(self, folder: Path, spec_type: type[T]) -> T | None:
        """The specification in a folder, if it is the one that its name and its fingerprint stand for."""
        there = read_json(folder / "spec.json")
        if there is None:
            self._add_mismatch("spec.json is missing or damaged", folder)
            return None
        try:
            spec = spec_type.model_validate(there.get("spec"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            self._add_mismatch(f"spec.json is no {spec_type.__name__}: {where}: {first['msg']}", folder)
            return None
        written, now = str(there.get("fingerprint")), spec.full_fingerprint
        if there.get("format") != FORMAT_VERSION:
            self._add_mismatch(
                f"spec.json has format {there.get('format')}, this version has {FORMAT_VERSION}", folder
            )
        elif written != now:
            self._add_mismatch(
                f"spec.json was {written[:SHOWN_DIGITS]} and now describes {now[:SHOWN_DIGITS]}", folder
            )
        elif not folder.name.endswith(f"-{now[:SHOWN_DIGITS]}"):
            self._add_mismatch(
                f"spec.json describes {now[:SHOWN_DIGITS]}, which is not what its folder is named", folder
            )
        return spec

    def _is_done(self, record: Record | EvaluationRecord) -> bool:
        if record.status_file.exists() and not record.read_status():
            self._add_mismatch("status.json is damaged", record.folder)
        return record.read_status().get("state") == "done"

    def _verify_file_hashes(self) -> None:
        stored = read_file_hashes(self.record.folder)
        if stored is None:
            self._add_note("its files have no hashes to be held to (files.json)")
            return
        self.result.files += len(stored)
        for change in list_changed_files(self.record.folder):
            self._add_mismatch(change)

    def _verify_provenance(self, spec: Spec | None) -> None:
        facts = self.record.read_provenance()
        if not facts:
            self._add_mismatch("provenance.json is missing or damaged")
        elif isinstance(spec, Training):
            self._verify_inputs(facts, spec)

    def _verify_inputs(self, provenance: Mapping[str, Any], spec: Training) -> None:
        """Whether its data were those of its specification, and its models are still what they were."""
        scale = self.record.folder.parent.parent.name
        if "data" in provenance and provenance["data"].get("revision") != spec.data.revision:
            self._add_mismatch(
                f"provenance.json names data {provenance['data'].get('revision')}, not its own"
            )
        for role, model in (("teacher", spec.teacher), ("start", spec.start)):
            was = provenance.get(role, {}).get("files", {})
            now = read_file_hashes(self.store.get_artifact(scale, role, model).folder)
            for name, digest in was.items():
                if now is not None and now.get(name) != digest:
                    self._add_mismatch(f"its {role} {model.fingerprint} had another {name} than now")

    def _verify_evaluation(self, evaluation: EvaluationRecord) -> None:
        content = (read_json(evaluation.folder / "spec.json") or {}).get("spec", {})
        by_harness = "lm_eval" in content or evaluation.folder.name.startswith("lm_eval-")
        if by_harness:
            self._load_spec(evaluation.folder, LmEvalEvaluation)
        spec = None if by_harness else self._load_spec(evaluation.folder, Evaluation)
        if self._is_done(evaluation):
            self.result.evaluations += 1
            if by_harness:
                self._verify_row_count(evaluation)
            elif spec is not None:
                self._verify_scores(evaluation, spec)

    def _verify_row_count(self, evaluation: EvaluationRecord) -> None:
        rows, written = len(evaluation.read_prediction_rows()), evaluation.read_status().get("rows")
        if written not in (None, rows):
            self._add_mismatch(f"predictions.jsonl has {rows} of {written} rows", evaluation.folder)

    def _verify_scores(self, evaluation: EvaluationRecord, spec: Evaluation) -> None:
        stored = evaluation.read_scores()
        names = tuple(dict.fromkeys((*spec.metrics, *(one for one in stored if one in METRICS))))
        try:
            rows = read_predictions(evaluation)
            anew, lines = score_predictions(names, [parse_prediction(row) for row in rows], self.scorer)
        except (DamagedRecord, ValueError) as error:
            self._add_mismatch(str(error).removeprefix(f"{evaluation.folder}/"), evaluation.folder)
            return
        comparable = [name for name in anew if self._is_comparable(name, stored, anew[name], evaluation)]
        for name in comparable:
            for change in _describe_score_changes(name, stored[name], anew[name]):
                self._add_mismatch(change, evaluation.folder)
        for name in set(comparable) & set(names):
            pairs = zip(rows, lines, strict=True)
            wrong = sum(row["scores"].get(name) != line["scores"][name] for row, line in pairs)
            if wrong:
                self._add_mismatch(
                    f"{name} of {wrong} predictions is not what it is computed to be", evaluation.folder
                )

    def _is_comparable(
        self,
        name: str,
        stored_scores: Mapping[str, Any],
        computed_score: Mapping[str, Any],
        evaluation: EvaluationRecord,
    ) -> bool:
        if name not in stored_scores:
            if "signature" in computed_score:
                self._add_mismatch(f"scores.json has no {name}", evaluation.folder)
            return False
        was, now = stored_scores[name].get("signature"), computed_score.get("signature")
        if was != now:
            self._add_note(f"{name} was computed as {was}, here it is {now}: not compared", evaluation.folder)
        return bool(was == now)

    def _verify_source_revisions(self, spec: Spec, revisions: Revisions) -> None:
        for key, revision in dict.fromkeys(list_revisions(spec)):
            now = revisions.get(key)
            if now is not None and now != revision:
                what, place = key[0], " ".join(part for part in key[1:] if part)
                self._add_mismatch(
                    f"{what} {place} was {_shorten_revision(revision)}, it is {_shorten_revision(now)} now"
                )

    def _add_mismatch(self, message: str, folder: Path | None = None) -> None:
        self.result.mismatches.append(f"{self._get_relative_folder(folder)}: {message}")

    def _add_note(self, message: str, folder: Path | None = None) -> None:
        self.result.notes.append(f"{self._get_relative_folder(folder)}: {message}")

    def _get_relative_folder(self, folder: Path | None) -> Path:
        return (folder or self.record.folder).relative_to(self.store.root)


def _get_spec_type(folder: Path) -> type[Spec]:
    if folder.name.startswith(("teacher-", "start-")):
        return SftModel
    if folder.name.startswith("scores-"):
        return TeacherScoresSpec
    return TeacherTextSpec if folder.name.startswith("text-") else Training


def _describe_score_changes(
    name: str, stored: Mapping[str, Any], computed: Mapping[str, Any]
) -> Iterator[str]:
    """Of numbers that are computed in the same order no more than the last bits may differ."""
    for part in ("value", "low", "high"):
        a, b = stored.get(part), computed.get(part)
        same = a == b if None in (a, b) else isclose(float(a or 0), float(b or 0), rel_tol=1e-9, abs_tol=1e-9)
        if not same:
            label = name if part == "value" else f"{name}.{part}"
            yield f"{label} is {a} in scores.json, {b} from its predictions"


def list_revisions(spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
    """(data or model, its place), revision: of all that has a place here; a hub's commit is its own proof."""
    if isinstance(spec, Training):
        yield from list_revisions(spec.teacher)
        yield from list_revisions(spec.start)
    elif isinstance(spec, TeacherTextSpec | TeacherScoresSpec):
        yield from list_revisions(spec.teacher)
        yield from _list_data_revisions(spec.task, spec.data)
    else:
        yield from _list_data_revisions(spec.task, spec.data)
        yield from _list_model_revisions(spec.model)


def _list_data_revisions(task: str, data: DataSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    if data.kind != "hub":
        yield ("data", task, data.path or data.name or "made", data.config or ""), data.revision


def _list_model_revisions(model: ModelSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    if model.path is not None and model.revision is not None:
        yield ("model", model.path), model.revision


def _shorten_revision(revision: str) -> str:
    """A hash by its first digits."""
    kind, colon, digits = revision.partition(":")
    return f"{kind}:{digits[:SHOWN_DIGITS]}" if colon else revision
