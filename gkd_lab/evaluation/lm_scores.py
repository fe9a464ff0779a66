"""Functions for `!function` in our tasks' lm-eval YAMLs: the table's metrics, 0 to 100, in lm-eval's form.

lm-eval imports this module when it runs such a task. A task's `process_results` returns each document's
values; a corpus score is computed from the (prediction, references) pairs of all documents.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils_hf import MultiTokenEOSCriteria

from gkd_lab.metrics import score
from gkd_lab.metrics.text_metrics import CORPUS_METRICS
from gkd_lab.tasks import TASKS

Pair = tuple[str, list[str]]


def process_results(task: str, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return metric -> value of one document, for the metrics of `task`."""
    prediction, references = results[0].strip(), [str(text) for text in doc["references"]]
    return {
        metric: (prediction, references)
        if metric in CORPUS_METRICS
        else score(metric, [prediction], [references]).value
        for metric in TASKS[task].metrics
    }


def arithmetic(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """As `process_results`; lm-eval writes this function's text into its results."""
    return process_results("arithmetic", doc, results)


def translation(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """As `process_results`."""
    return process_results("translation", doc, results)


def summarization(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """As `process_results`."""
    return process_results("summarization", doc, results)


def instruction(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """As `process_results`."""
    return process_results("instruction", doc, results)


def bleu(pairs: Sequence[Pair]) -> float:
    """sacreBLEU's corpus BLEU of all documents."""
    return _corpus("bleu", pairs)


def chrf(pairs: Sequence[Pair]) -> float:
    """sacreBLEU's chrF of all documents."""
    return _corpus("chrf", pairs)


def _corpus(metric: str, pairs: Sequence[Pair]) -> float:
    """Compute a corpus metric over the pairs of all documents."""
    predictions, references = zip(*pairs, strict=True)
    return score(metric, predictions, references).value


def stop_each_beam_for_itself() -> None:
    """Keep lm-eval's stop criterion from ending whole beam searches.

    lm-eval 0.4.13 looks at as many rows as there are prompts, and stops all rows once these have ended. A
    step of beam search has several rows per prompt, so every search would stop when the first rows have
    ended.
    """
    stop_all_rows: Callable[..., Any] = MultiTokenEOSCriteria.__call__
    if stop_all_rows.__name__ == _row_by_row.__name__:
        return

    def _stop(criterion: Any, input_ids: torch.Tensor, scores: Any, **options: Any) -> Any:
        if len(input_ids) == len(criterion.done_tracker):
            return stop_all_rows(criterion, input_ids, scores, **options)
        return _row_by_row(criterion, input_ids)

    _stop.__name__ = _row_by_row.__name__
    MultiTokenEOSCriteria.__call__ = _stop


def _row_by_row(criterion: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Check for each row whether its last tokens contain the stop sequence, (N,)."""
    last_ids = input_ids[:, criterion.initial_decoder_input_length :][:, -criterion.sequence_id_len :]
    texts = criterion.tokenizer.batch_decode(last_ids)
    return torch.tensor([criterion.sequence in text for text in texts], device=input_ids.device)


stop_each_beam_for_itself()
