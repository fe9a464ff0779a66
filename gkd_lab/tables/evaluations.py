"""The finished evaluations of a record, as its files tell, and one that two records share."""

from dataclasses import dataclass
from typing import Any

from gkd_lab.config import Evaluation, SpecError
from gkd_lab.config.errors import unknown
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.files import read_json

_ORDER = ("greedy", "beam", "sample")


@dataclass(frozen=True)
class Finished:
    """One evaluation whose predictions were kept."""

    part: EvaluationRecord
    evaluation: Evaluation

    @property
    def folder(self) -> str:
        return self.part.folder.name

    @property
    def name(self) -> str:
        return self.evaluation.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those first that it was made for, then what was computed later."""
        later = (name for name, score in self.part.scores().items() if "signature" in score)
        return tuple(dict.fromkeys((*self.evaluation.metrics, *later)))

    @property
    def order(self) -> tuple[Any, ...]:
        return self.evaluation.split != "test", _ORDER.index(self.evaluation.decoding), self.folder


def finished(record: Record) -> list[Finished]:
    """The evaluations of a record that are done, the test split and greedy first. SpecError for none."""
    found, failed = [], []
    for path in sorted(record.folder.glob("evaluations/*/spec.json")):
        part = EvaluationRecord(path.parent)
        spec = (read_json(path) or {}).get("spec")
        if spec and "lm_eval" in spec:
            continue  # a task of lm-eval: its documents are not the cell's rows
        if part.state() == "failed":
            failed.append(f"{part.folder.name}: {part.status().get('error', 'failed')}")
        if part.state() == "done" and spec and (part.folder / "predictions.jsonl").exists():
            found.append(Finished(part, Evaluation.model_validate(spec)))
    if not found:
        raise SpecError(_unfinished(record, failed))
    return sorted(found, key=lambda one: one.order)


def common(
    a: list[Finished], b: list[Finished], name: str | None
) -> tuple[Finished, Finished, tuple[str, ...]]:
    """(of a, of b, names of the others): the same evaluation, else one of the same name. SpecError."""
    pairs = [(one, other) for one in a for other in b if one.folder == other.folder]
    taken = {found.folder for pair in pairs for found in pair}
    pairs += [
        (one, other)
        for one in a
        for other in b
        if one.name == other.name and not {one.folder, other.folder} & taken
    ]
    if not pairs:
        raise SpecError(f"no common evaluation: A has {_names(a)}; B has {_names(b)}")
    if name is not None:
        chosen = [pair for pair in pairs if name in (pair[0].name, pair[0].folder)]
        if not chosen:
            raise unknown("evaluation", name, _distinct(pairs))
        first, *_ = chosen
    else:
        first = min(pairs, key=lambda pair: pair[0].order)
    return *first, tuple(one for one in _distinct(pairs) if one not in (first[0].name, first[0].folder))


def _distinct(pairs: list[tuple[Finished, Finished]]) -> list[str]:
    """The name of each pair, or its folder where two have one name."""
    names = [one.name for one, _ in pairs]
    return [one.name if names.count(one.name) == 1 else one.folder for one, _ in pairs]


def _names(found: list[Finished]) -> str:
    return ", ".join(dict.fromkeys(one.name for one in found))


def _unfinished(record: Record, failed: list[str]) -> str:
    state = record.state()
    if state != "done":
        why = f"its training is {state if state != 'missing' else 'not finished'}"
    else:
        why = f"failed: {'; '.join(failed)}" if failed else "it was not evaluated yet"
    return f"{record.folder} has no finished evaluation: {why}; run its experiment to finish it"
