"""Finished evaluations of a record, and the evaluation that two records have in common."""

from dataclasses import dataclass
from typing import Any

from gkd_lab.config import ConfigError, Evaluation
from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.store import EvaluationRecord, Record
from gkd_lab.store.files import read_json

_DECODING_ORDER = ("greedy", "beam", "sample")


@dataclass(frozen=True)
class FinishedEvaluation:
    """One evaluation with stored predictions."""

    record: EvaluationRecord
    evaluation: Evaluation

    @property
    def folder(self) -> str:
        """Name (not path) of the evaluation's folder, which ends with its fingerprint."""
        return self.record.folder.name

    @property
    def name(self) -> str:
        """Short name, such as `greedy`; two evaluations of one record may share it."""
        return self.evaluation.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the requested metrics, then of the stored ones that were computed later."""
        later = (name for name, score in self.record.read_scores().items() if "signature" in score)
        return tuple(dict.fromkeys((*self.evaluation.metrics, *later)))

    @property
    def sort_key(self) -> tuple[Any, ...]:
        """Key that sorts the test split first, then greedy, beam, sampling, then by folder."""
        return self.evaluation.split != "test", _DECODING_ORDER.index(self.evaluation.decoding), self.folder


def list_finished_evaluations(record: Record) -> list[FinishedEvaluation]:
    """List a record's evaluations that are done and have predictions, sorted; never lm-eval's.

    Raises ConfigError where there is none.
    """
    finished, failures = [], []
    for path in sorted(record.folder.glob("evaluations/*/spec.json")):
        part = EvaluationRecord(path.parent)
        spec = (read_json(path) or {}).get("spec")
        if spec and "lm_eval" in spec:
            continue  # its documents are not the cell's dataset rows
        if part.read_state() == "failed":
            failures.append(f"{part.folder.name}: {part.read_status().get('error', 'failed')}")
        if part.read_state() == "done" and spec and (part.folder / "predictions.jsonl").exists():
            finished.append(FinishedEvaluation(part, Evaluation.model_validate(spec)))
    if not finished:
        raise ConfigError(_describe_unfinished(record, failures))
    return sorted(finished, key=lambda evaluation: evaluation.sort_key)


Pair = tuple[FinishedEvaluation, FinishedEvaluation]


def match_evaluations(
    a: list[FinishedEvaluation], b: list[FinishedEvaluation], evaluation_name: str | None
) -> tuple[FinishedEvaluation, FinishedEvaluation, tuple[str, ...]]:
    """Return (evaluation of A, its match in B, names of the other matching pairs).

    Evaluations match if they are of equal settings, else by name. Without a name the best-sorted match is
    returned. Raises ConfigError where there is none.
    """
    pairs = [(first, second) for first in a for second in b if first.folder == second.folder]
    matched = {evaluation.folder for pair in pairs for evaluation in pair}
    pairs += [
        (first, second)
        for first in a
        for second in b
        if first.name == second.name and not {first.folder, second.folder} & matched
    ]
    if not pairs:
        raise ConfigError(f"no common evaluation: A has {_join_names(a)}; B has {_join_names(b)}")
    names = _name_pairs(pairs)
    if evaluation_name is None:
        first, second = min(pairs, key=lambda pair: pair[0].sort_key)
    else:
        named = [pair for pair in pairs if evaluation_name in (pair[0].name, pair[0].folder)]
        if not named:
            raise build_unknown_name_error("evaluation", evaluation_name, names)
        first, second = named[0]
    return first, second, tuple(name for name in names if name not in (first.name, first.folder))


def _name_pairs(pairs: list[Pair]) -> list[str]:
    """Return one name per pair: its short name, or its folder where pairs share the short name."""
    names = [first.name for first, _ in pairs]
    return [first.name if names.count(first.name) == 1 else first.folder for first, _ in pairs]


def _join_names(evaluations: list[FinishedEvaluation]) -> str:
    """Join the distinct short names with commas, in their order."""
    return ", ".join(dict.fromkeys(evaluation.name for evaluation in evaluations))


def _describe_unfinished(record: Record, failures: list[str]) -> str:
    """Return an error text: the record's folder and why it has no finished evaluation."""
    state = record.read_state()
    if state != "done":
        reason = f"its training is {state if state != 'missing' else 'not finished'}"
    else:
        reason = f"failed: {'; '.join(failures)}" if failures else "it was not evaluated yet"
    return f"{record.folder} has no finished evaluation: {reason}; run its experiment to finish it"
