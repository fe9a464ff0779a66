"""One record read again: held to its specification, its hashes, its predictions, its sources as of now."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from gkd_lab.config.cell import (
    DataSpec,
    Evaluation,
    HarnessEvaluation,
    ModelSpec,
    ScoresSpec,
    SftModel,
    TextSpec,
    Training,
)
from gkd_lab.config.fingerprint import FORMAT, SHOWN, Frozen
from gkd_lab.metrics import METRICS, Scorer
from gkd_lab.metrics.scored_predictions import judge, prediction_of
from gkd_lab.store import DamagedRecord, EvaluationRecord, Record, Store
from gkd_lab.store.file_hashes import changed_files, stored_digests
from gkd_lab.store.files import read_json
from gkd_lab.store.predictions import read_predictions

T = TypeVar("T", bound=Frozen)
Spec = Training | SftModel | TextSpec | ScoresSpec
Sources = Mapping[tuple[str, ...], str]
"""(data or model, its place) -> revision."""


@dataclass
class Verified:
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
class Reading:
    """One record that is read again."""

    store: Store
    record: Record
    outcome: Verified
    scorer: Scorer

    def whole(self, sources: Sources) -> None:
        if self.record.is_claimed():
            self._note("left alone, another process works there")
            return
        self.outcome.records += 1
        spec = self._spec()
        if spec is not None:
            self._sources(spec, sources)
        if self._is_done(self.record):
            self._files()
            self._provenance(spec)
        for folder in sorted(self.record.folder.glob("evaluations/*-*")):
            self._evaluation(EvaluationRecord(folder))

    def sources_only(self, sources: Sources) -> None:
        content = (read_json(self.record.folder / "spec.json") or {}).get("spec")
        try:
            self._sources(_kind(self.record.folder).model_validate(content), sources)
        except ValidationError:
            return  # another experiment's: not asked for here

    def _spec(self) -> Spec | None:
        return self._described(self.record.folder, _kind(self.record.folder))

    def _described(self, folder: Path, kind: type[T]) -> T | None:
        """The specification in a folder, if it is the one that its name and its fingerprint stand for."""
        there = read_json(folder / "spec.json")
        if there is None:
            self._differs("spec.json is missing or damaged", folder)
            return None
        try:
            spec = kind.model_validate(there.get("spec"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            self._differs(f"spec.json is no {kind.__name__}: {where}: {first['msg']}", folder)
            return None
        written, now = str(there.get("fingerprint")), spec.full_fingerprint
        if there.get("format") != FORMAT:
            self._differs(f"spec.json has format {there.get('format')}, this version has {FORMAT}", folder)
        elif written != now:
            self._differs(f"spec.json was {written[:SHOWN]} and now describes {now[:SHOWN]}", folder)
        elif not folder.name.endswith(f"-{now[:SHOWN]}"):
            self._differs(f"spec.json describes {now[:SHOWN]}, which is not what its folder is named", folder)
        return spec

    def _is_done(self, part: Record | EvaluationRecord) -> bool:
        if part.status_file.exists() and not part.status():
            self._differs("status.json is damaged", part.folder)
        return part.status().get("state") == "done"

    def _files(self) -> None:
        stored = stored_digests(self.record.folder)
        if stored is None:
            self._note("its files have no hashes to be held to (files.json)")
            return
        self.outcome.files += len(stored)
        for change in changed_files(self.record.folder):
            self._differs(change)

    def _provenance(self, spec: Spec | None) -> None:
        facts = self.record.provenance()
        if not facts:
            self._differs("provenance.json is missing or damaged")
        elif isinstance(spec, Training):
            self._came_from(facts, spec)

    def _came_from(self, facts: Mapping[str, Any], spec: Training) -> None:
        """Whether its data were those of its specification, and its models are still what they were."""
        scale = self.record.folder.parent.parent.name
        if "data" in facts and facts["data"].get("revision") != spec.data.revision:
            self._differs(f"provenance.json names data {facts['data'].get('revision')}, not its own")
        for role, model in (("teacher", spec.teacher), ("start", spec.start)):
            was = facts.get(role, {}).get("files", {})
            now = stored_digests(self.store.artifact(scale, role, model).folder)
            for name, digest in was.items():
                if now is not None and now.get(name) != digest:
                    self._differs(f"its {role} {model.fingerprint} had another {name} than now")

    def _evaluation(self, part: EvaluationRecord) -> None:
        content = (read_json(part.folder / "spec.json") or {}).get("spec", {})
        by_harness = "lm_eval" in content or part.folder.name.startswith("lm_eval-")
        if by_harness:
            self._described(part.folder, HarnessEvaluation)
        spec = None if by_harness else self._described(part.folder, Evaluation)
        if self._is_done(part):
            self.outcome.evaluations += 1
            if by_harness:
                self._counted(part)
            elif spec is not None:
                self._scores(part, spec)

    def _counted(self, part: EvaluationRecord) -> None:
        rows, written = len(part.predictions()), part.status().get("rows")
        if written not in (None, rows):
            self._differs(f"predictions.jsonl has {rows} of {written} rows", part.folder)

    def _scores(self, part: EvaluationRecord, spec: Evaluation) -> None:
        stored = part.scores()
        names = tuple(dict.fromkeys((*spec.metrics, *(one for one in stored if one in METRICS))))
        try:
            rows = read_predictions(part)
            anew, lines = judge(names, [prediction_of(row) for row in rows], self.scorer)
        except (DamagedRecord, ValueError) as error:
            self._differs(str(error).removeprefix(f"{part.folder}/"), part.folder)
            return
        comparable = [name for name in anew if self._is_comparable(name, stored, anew[name], part)]
        for name in comparable:
            for change in _changed(name, stored[name], anew[name]):
                self._differs(change, part.folder)
        for name in set(comparable) & set(names):
            pairs = zip(rows, lines, strict=True)
            wrong = sum(row["scores"].get(name) != line["scores"][name] for row, line in pairs)
            if wrong:
                self._differs(f"{name} of {wrong} predictions is not what it is computed to be", part.folder)

    def _is_comparable(
        self, name: str, stored: Mapping[str, Any], anew: Mapping[str, Any], part: EvaluationRecord
    ) -> bool:
        if name not in stored:
            if "signature" in anew:
                self._differs(f"scores.json has no {name}", part.folder)
            return False
        was, now = stored[name].get("signature"), anew.get("signature")
        if was != now:
            self._note(f"{name} was computed as {was}, here it is {now}: not compared", part.folder)
        return bool(was == now)

    def _sources(self, spec: Spec, sources: Sources) -> None:
        for key, revision in dict.fromkeys(revisions_of(spec)):
            now = sources.get(key)
            if now is not None and now != revision:
                what, place = key[0], " ".join(part for part in key[1:] if part)
                self._differs(f"{what} {place} was {_short(revision)}, it is {_short(now)} now")

    def _differs(self, what: str, folder: Path | None = None) -> None:
        self.outcome.mismatches.append(f"{self._name(folder)}: {what}")

    def _note(self, what: str, folder: Path | None = None) -> None:
        self.outcome.notes.append(f"{self._name(folder)}: {what}")

    def _name(self, folder: Path | None) -> Path:
        return (folder or self.record.folder).relative_to(self.store.root)


def _kind(folder: Path) -> type[Spec]:
    if folder.name.startswith(("teacher-", "start-")):
        return SftModel
    if folder.name.startswith("scores-"):
        return ScoresSpec
    return TextSpec if folder.name.startswith("text-") else Training


def _changed(name: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Of numbers that are computed in the same order no more than the last bits may differ."""
    for part in ("value", "low", "high"):
        a, b = was.get(part), now.get(part)
        same = a == b if None in (a, b) else isclose(float(a or 0), float(b or 0), rel_tol=1e-9, abs_tol=1e-9)
        if not same:
            label = name if part == "value" else f"{name}.{part}"
            yield f"{label} is {a} in scores.json, {b} from its predictions"


def revisions_of(spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
    """(data or model, its place), revision: of all that has a place here; a hub's commit is its own proof."""
    if isinstance(spec, Training):
        yield from revisions_of(spec.teacher)
        yield from revisions_of(spec.start)
    elif isinstance(spec, TextSpec | ScoresSpec):
        yield from revisions_of(spec.teacher)
        yield from _of_data(spec.task, spec.data)
    else:
        yield from _of_data(spec.task, spec.data)
        yield from _of_model(spec.model)


def _of_data(task: str, data: DataSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    if data.kind != "hub":
        yield ("data", task, data.path or data.name or "made", data.config or ""), data.revision


def _of_model(model: ModelSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    if model.path is not None and model.revision is not None:
        yield ("model", model.path), model.revision


def _short(revision: str) -> str:
    """A hash by its first digits."""
    kind, colon, digits = revision.partition(":")
    return f"{kind}:{digits[:SHOWN]}" if colon else revision
