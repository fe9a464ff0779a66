"""The finished evaluations of a record, as its files tell, and one that two records share."""

from dataclasses import dataclass
from typing import Any

from gkd_lab.config import ConfigError, Evaluation
from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.files import read_json

_DECODING_ORDER = ("greedy", "beam", "sample")


@dataclass(frozen=True)
class FinishedEvaluation:
    """One evaluation whose predictions were kept."""

    record: EvaluationRecord
    evaluation: Evaluation

    @property
    def folder(self) -> str:
        return self.record.folder.name

    @property
    def name(self) -> str:
        return self.evaluation.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those first that it was made for, then what was computed later."""
        later = (name for name, score in self.record.read_scores().items() if "signature" in score)
        return tuple(dict.fromkeys((*self.evaluation.metrics, *later)))

    @property
    def sort_key(self) -> tuple[Any, ...]:
        return self.evaluation.split != "test", _DECODING_ORDER.index(self.evaluation.decoding), self.folder


def list_finished_evaluations(record: Record) -> list[FinishedEvaluation]:
    """The evaluations of a record that are done, the test split and greedy first. SpecError for none."""
    found, failed = [], []
    for path in sorted(record.folder.glob("evaluations/*/spec.json")):
        part = EvaluationRecord(path.parent)
        spec = (read_json(path) or {}).get("spec")
        if spec and "lm_eval" in spec:
            continue  # a task of lm-eval: its documents are not the cell's rows
        if part.read_state() == "failed":
            failed.append(f"{part.folder.name}: {part.read_status().get('error', 'failed')}")
        if part.read_state() == "done" and spec and (part.folder / "predictions.jsonl").exists():
            found.append(FinishedEvaluation(part, Evaluation.model_validate(spec)))
    if not found:
        raise ConfigError(_describe_unfinished(record, failed))
    return sorted(found, key=lambda one: one.sort_key)


def match_evaluations(
    a: list[FinishedEvaluation], b: list[FinishedEvaluation], evaluation_name: str | None
) -> tuple[FinishedEvaluation, FinishedEvaluation, tuple[str, ...]]:
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
        raise ConfigError(f"no common evaluation: A has {_join_names(a)}; B has {_join_names(b)}")
    if evaluation_name is not None:
        chosen = [pair for pair in pairs if evaluation_name in (pair[0].name, pair[0].folder)]
        if not chosen:
            raise build_unknown_name_error("evaluation", evaluation_name, _unambiguous_names(pairs))
        first, *_ = chosen
    else:
        first = min(pairs, key=lambda pair: pair[0].sort_key)
    return *first, tuple(
        one for one in _unambiguous_names(pairs) if one not in (first[0].name, first[0].folder)
    )


def _unambiguous_names(pairs: list[tuple[FinishedEvaluation, FinishedEvaluation]]) -> list[str]:
    """The name of each pair, or its folder where two have one name."""
    names = [one.name for one, _ in pairs]
    return [one.name if names.count(one.name) == 1 else one.folder for one, _ in pairs]


def _join_names(found: list[FinishedEvaluation]) -> str:
    return ", ".join(dict.fromkeys(one.name for one in found))


def _describe_unfinished(record: Record, failed: list[str]) -> str:
    state = record.read_state()
    if state != "done":
        why = f"its training is {state if state != 'missing' else 'not finished'}"
    else:
        why = f"failed: {'; '.join(failed)}" if failed else "it was not evaluated yet"
    return f"{record.folder} has no finished evaluation: {why}; run its experiment to finish it"
