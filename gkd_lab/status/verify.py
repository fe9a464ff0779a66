"""Read every record of an experiment again and report what no longer matches its fingerprint.

A record is compared with its specification, its hashes, the scores that its predictions give and the
data and models as they are now.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from gkd_lab.config import Grid
from gkd_lab.config.artifact_specs import DataSpec, ModelSpec, SftModel, TeacherScoresSpec, TeacherTextSpec
from gkd_lab.config.cell import Evaluation, LmEvalEvaluation, Training, list_references
from gkd_lab.config.fingerprint import FORMAT_VERSION, SHOWN_DIGITS, Frozen
from gkd_lab.metrics import METRICS, Scorer
from gkd_lab.metrics.scored_predictions import parse_prediction, score_predictions
from gkd_lab.store import DamagedRecord, EvaluationRecord, Record, Store
from gkd_lab.store.file_hashes import list_changed_files, read_file_hashes
from gkd_lab.store.files import read_json
from gkd_lab.store.predictions import read_predictions

T = TypeVar("T", bound=Frozen)
Spec = Training | SftModel | TeacherTextSpec | TeacherScoresSpec
SourceKey = tuple[str, ...]
"""`data` or `model`, then its task and place."""
Revisions = Mapping[SourceKey, str]
ProgressCallback = Callable[[int], None]
"""Takes the number of records that have been read."""


@dataclass
class VerificationResult:
    """Counts of what was read, and the mismatches."""

    records: int = 0
    evaluations: int = 0
    files: int = 0
    missing: int = 0
    """Cells of the experiment that have no record."""
    mismatches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Comparisons that were not possible, with the reason."""


def list_candidate_records(grid: Grid, store: Store) -> list[Record]:
    """Return all stored records of the grid's tasks at its scale, other experiments' included."""
    tasks = dict.fromkeys(cell.task for cell in grid.cells)
    paths = (path for task in tasks for path in sorted((store.root / grid.scale / task).glob("*-*")))
    return [Record(path) for path in paths if path.is_dir()]


def verify_records(
    grid: Grid,
    store: Store,
    records: list[Record],
    report_progress: ProgressCallback = lambda done: None,
) -> VerificationResult:
    """Verify records by fingerprints, hashes and recomputed scores; return counts and mismatches.

    `grid` must be resolved from data and models as they are now. Of another experiment's records only those
    are reported whose data or models have changed: they may have been this one's before.
    """
    result, scorer = VerificationResult(), Scorer()
    revisions = {key: revision for cell in grid.cells for key, revision in list_revisions(cell.training)}
    experiment_folders = _list_experiment_folders(grid, store)
    folders = {record.folder for record in records}
    result.missing = sum(store.get_record(cell).folder not in folders for cell in grid.cells)
    for done, record in enumerate(records, 1):
        verifier = RecordVerifier(store, record, result, scorer, revisions)
        if record.folder in experiment_folders:
            verifier.verify_record()
        else:
            verifier.verify_revisions()
        report_progress(done)
    return result


def _list_experiment_folders(grid: Grid, store: Store) -> set[Path]:
    """Return the record folders of the grid's cells, reference models, teacher texts and scores."""
    folders = {store.get_record(cell).folder for cell in grid.cells}
    for role, model, _ in list_references(grid.cells):
        folders.add(store.get_artifact(grid.scale, role, model).folder)
    for cell in grid.cells:
        text_spec, scores_spec = cell.training.text_spec, cell.training.scores_spec
        if text_spec is not None:
            folders.add(store.get_teacher_text(grid.scale, text_spec).folder)
        if scores_spec is not None:
            folders.add(store.get_teacher_scores(grid.scale, scores_spec).folder)
    return folders


@dataclass(frozen=True)
class RecordVerifier:
    """Verifies one record and adds what it finds to a result."""

    store: Store
    record: Record
    result: VerificationResult
    scorer: Scorer
    revisions: Revisions
    """Of data and models as they are now."""

    def verify_record(self) -> None:
        """Verify spec, sources, files, provenance and evaluations; a locked record is only noted."""
        if self.record.is_locked():
            self._add_note("left alone, another process works there")
            return
        self.result.records += 1
        spec = self._load_spec(self.record.folder, _get_spec_type(self.record.folder))
        if spec is not None:
            self._verify_source_revisions(spec)
        if self._is_done(self.record):
            self._verify_file_hashes()
            self._verify_provenance(spec)
        for folder in sorted(self.record.folder.glob("evaluations/*-*")):
            self._verify_evaluation(EvaluationRecord(folder))

    def verify_revisions(self) -> None:
        """Verify only the revisions of data and models; nothing if the specification is invalid."""
        content = (read_json(self.record.folder / "spec.json") or {}).get("spec")
        try:
            spec = _get_spec_type(self.record.folder).model_validate(content)
        except ValidationError:
            return
        self._verify_source_revisions(spec)

    def _load_spec(self, folder: Path, spec_type: type[T]) -> T | None:
        """Load a folder's specification, None if unreadable; report a wrong fingerprint or name.

        A specification with a wrong fingerprint is reported and returned.
        """
        stored = read_json(folder / "spec.json")
        if stored is None:
            self._add_mismatch("spec.json is missing or damaged", folder)
            return None
        try:
            spec = spec_type.model_validate(stored.get("spec"))
        except ValidationError as error:
            first = error.errors()[0]
            location = ".".join(map(str, first["loc"]))
            self._add_mismatch(f"spec.json is no {spec_type.__name__}: {location}: {first['msg']}", folder)
            return None
        written, now = str(stored.get("fingerprint")), spec.full_fingerprint
        if stored.get("format") != FORMAT_VERSION:
            self._add_mismatch(
                f"spec.json has format {stored.get('format')}, this version has {FORMAT_VERSION}", folder
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
        """Return whether a record's state is `done`; a damaged status is added as a mismatch."""
        if record.status_file.exists() and not record.read_status():
            self._add_mismatch("status.json is damaged", record.folder)
        return record.read_status().get("state") == "done"

    def _verify_file_hashes(self) -> None:
        """Add a mismatch for each file that changed since its hash was stored."""
        hashes = read_file_hashes(self.record.folder)
        if hashes is None:
            self._add_note("its files have no hashes to be compared with (files.json)")
            return
        self.result.files += len(hashes)
        for change in list_changed_files(self.record.folder):
            self._add_mismatch(change)

    def _verify_provenance(self, spec: Spec | None) -> None:
        """Add a mismatch if the provenance is unreadable or, of a training, names other inputs."""
        provenance = self.record.read_provenance()
        if not provenance:
            self._add_mismatch("provenance.json is missing or damaged")
        elif isinstance(spec, Training):
            self._verify_inputs(provenance, spec)

    def _verify_inputs(self, provenance: Mapping[str, Any], spec: Training) -> None:
        """Add mismatches where a training used other data than specified or other models than stored."""
        scale = self.record.folder.parent.parent.name
        if "data" in provenance and provenance["data"].get("revision") != spec.data.revision:
            self._add_mismatch(
                f"provenance.json names data {provenance['data'].get('revision')}, not its own"
            )
        for role, model in (("teacher", spec.teacher), ("start", spec.start)):
            used_hashes = provenance.get(role, {}).get("files", {})
            hashes = read_file_hashes(self.store.get_artifact(scale, role, model).folder)
            for name, used_hash in used_hashes.items():
                if hashes is not None and hashes.get(name) != used_hash:
                    self._add_mismatch(f"its {role} {model.fingerprint} had another {name} than now")

    def _verify_evaluation(self, evaluation: EvaluationRecord) -> None:
        """Verify specification and, if done, scores of one evaluation; of lm-eval the row count."""
        content = (read_json(evaluation.folder / "spec.json") or {}).get("spec", {})
        is_lm_eval = "lm_eval" in content or evaluation.folder.name.startswith("lm_eval-")
        spec_type = LmEvalEvaluation if is_lm_eval else Evaluation
        spec = self._load_spec(evaluation.folder, spec_type)
        if not self._is_done(evaluation):
            return
        self.result.evaluations += 1
        if is_lm_eval:
            self._verify_row_count(evaluation)
        elif isinstance(spec, Evaluation):
            self._verify_scores(evaluation, spec)

    def _verify_row_count(self, evaluation: EvaluationRecord) -> None:
        """Add a mismatch if an lm-eval task has not as many predictions as its status states."""
        rows, written = len(evaluation.read_prediction_rows()), evaluation.read_status().get("rows")
        if written not in (None, rows):
            self._add_mismatch(f"predictions.jsonl has {rows} of {written} rows", evaluation.folder)

    def _verify_scores(self, evaluation: EvaluationRecord, spec: Evaluation) -> None:
        """Recompute the scores from the predictions; add a mismatch per difference from stored ones."""
        stored_scores = evaluation.read_scores()
        names = tuple(dict.fromkeys((*spec.metrics, *(name for name in stored_scores if name in METRICS))))
        try:
            rows = read_predictions(evaluation)
            scores, scored_rows = score_predictions(
                names, [parse_prediction(row) for row in rows], self.scorer
            )
        except (DamagedRecord, ValueError) as error:
            self._add_mismatch(str(error).removeprefix(f"{evaluation.folder}/"), evaluation.folder)
            return
        comparable = [
            name for name in scores if self._is_comparable(name, stored_scores, scores[name], evaluation)
        ]
        for name in comparable:
            for change in _describe_score_changes(name, stored_scores[name], scores[name]):
                self._add_mismatch(change, evaluation.folder)
        for name in set(comparable) & set(names):
            row_pairs = zip(rows, scored_rows, strict=True)
            wrong = sum(row["scores"].get(name) != scored["scores"][name] for row, scored in row_pairs)
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
        """Return whether a score is stored with the signature of now; if not, note or report it."""
        if name not in stored_scores:
            if "signature" in computed_score:
                self._add_mismatch(f"scores.json has no {name}", evaluation.folder)
            return False
        stored, computed = stored_scores[name].get("signature"), computed_score.get("signature")
        if stored != computed:
            self._add_note(
                f"{name} was computed as {stored}, here it is {computed}: not compared", evaluation.folder
            )
        return bool(stored == computed)

    def _verify_source_revisions(self, spec: Spec) -> None:
        """Add a mismatch for each data set or model that has another revision now."""
        for key, revision in dict.fromkeys(list_revisions(spec)):
            current = self.revisions.get(key)
            if current is not None and current != revision:
                source = " ".join(part for part in key if part)
                self._add_mismatch(
                    f"{source} was {_shorten_revision(revision)}, it is {_shorten_revision(current)} now"
                )

    def _add_mismatch(self, message: str, folder: Path | None = None) -> None:
        """Add `<folder>: <message>` to the mismatches; `folder` None: the record's."""
        self.result.mismatches.append(f"{self._get_relative_folder(folder)}: {message}")

    def _add_note(self, message: str, folder: Path | None = None) -> None:
        """Add `<folder>: <message>` to the notes on what was not compared; None: the record's."""
        self.result.notes.append(f"{self._get_relative_folder(folder)}: {message}")

    def _get_relative_folder(self, folder: Path | None) -> Path:
        """Return a folder (None: the record's) relative to the store's root."""
        return (folder or self.record.folder).relative_to(self.store.root)


def _get_spec_type(folder: Path) -> type[Spec]:
    """Return the class of a record's specification, by its folder's name; a training by default."""
    if folder.name.startswith(("teacher-", "start-")):
        return SftModel
    if folder.name.startswith("scores-"):
        return TeacherScoresSpec
    return TeacherTextSpec if folder.name.startswith("text-") else Training


def _describe_score_changes(
    name: str, stored: Mapping[str, Any], computed: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a text per number (value, low, high) that differs, by more than 1e-9."""
    for key in ("value", "low", "high"):
        a, b = stored.get(key), computed.get(key)
        is_equal = a == b if None in (a, b) else isclose(a or 0, b or 0, rel_tol=1e-9, abs_tol=1e-9)
        if not is_equal:
            label = name if key == "value" else f"{name}.{key}"
            yield f"{label} is {a} in scores.json, {b} from its predictions"


def list_revisions(spec: Spec) -> Iterator[tuple[SourceKey, str]]:
    """Yield (source key, revision) of all local or made data and of local models, but not of the hub's."""
    if isinstance(spec, Training):
        yield from list_revisions(spec.teacher)
        yield from list_revisions(spec.start)
    elif isinstance(spec, TeacherTextSpec | TeacherScoresSpec):
        yield from list_revisions(spec.teacher)
        yield from _list_data_revisions(spec.task, spec.data)
    else:
        yield from _list_data_revisions(spec.task, spec.data)
        yield from _list_model_revisions(spec.model)


def _list_data_revisions(task: str, data: DataSpec) -> Iterator[tuple[SourceKey, str]]:
    """Yield (source key, revision) of local or made data; nothing for data on the hub."""
    if data.kind != "hub":
        yield ("data", task, data.path or data.name or "made", data.config or ""), data.revision


def _list_model_revisions(model: ModelSpec) -> Iterator[tuple[SourceKey, str]]:
    """Yield (source key, revision) of a local model; nothing for one on the hub or made."""
    if model.path is not None and model.revision is not None:
        yield ("model", model.path), model.revision


def _shorten_revision(revision: str) -> str:
    """Shorten `sha256:<digits>` to eight digits; a revision without algorithm stays whole."""
    algorithm, colon, digits = revision.partition(":")
    return f"{algorithm}:{digits[:SHOWN_DIGITS]}" if colon else revision
