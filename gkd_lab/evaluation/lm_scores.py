"""What our tasks' lm-eval YAMLs name with `!function`: the table's own metrics, 0 to 100, in lm-eval's form.

Imported by lm-eval itself when it runs one of them. `process_results` of a task gives each document's values;
a corpus score is made of all documents' (prediction, references) pairs at the end.
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
    """Metric -> value of one document, for the metrics that `task` is judged by."""
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
    predictions, references = zip(*pairs, strict=True)
    return score(metric, predictions, references).value


def stop_each_beam_for_itself() -> None:
    """Keep lm-eval's stop criterion from ending whole beam searches.

    It looks at as many rows as there are prompts and answers for all of them at once (0.4.13). A step of
    beam search has several rows a prompt: where the first of them have ended, every search would stop there
    with what it has.
    """
    together: Callable[..., Any] = MultiTokenEOSCriteria.__call__
    if together.__name__ == _row_by_row.__name__:
        return

    def _stop(criterion: Any, input_ids: torch.Tensor, scores: Any, **more: Any) -> Any:
        if len(input_ids) == len(criterion.done_tracker):
            return together(criterion, input_ids, scores, **more)
        return _row_by_row(criterion, input_ids)

    _stop.__name__ = _row_by_row.__name__
    MultiTokenEOSCriteria.__call__ = _stop


def _row_by_row(criterion: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """(N,) whether the criterion's text stands at the end of each row."""
    written = input_ids[:, criterion.initial_decoder_input_length :][:, -criterion.sequence_id_len :]
    texts = criterion.tokenizer.batch_decode(written)
    return torch.tensor([criterion.sequence in text for text in texts], device=input_ids.device)


stop_each_beam_for_itself()
