"""Textual entailment as a reward, by any sequence-classification model (Roit et al. 2023; Fig. 5)."""

from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from gkd_lab.config.reward_names import RewardFunction
from gkd_lab.models.build import hide_progress_bars

ROWS_AT_ONCE = 64
ENTAILMENT_LABEL = "entailment"


@lru_cache(maxsize=1)
def load_entailment_reward(model: str, revision: str | None, device: torch.device) -> RewardFunction:
    """The probability that the prompt (premise) entails the text (hypothesis), from 0 to 1.

    The model is loaded once, frozen, in its own dtype. Pairs longer than it reads are cut at their longer
    part. Raises ValueError if none of its labels is called entailment, or there is no such model.
    """
    given: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    try:
        with hide_progress_bars():
            judge = AutoModelForSequenceClassification.from_pretrained(model, dtype="auto", **given)
            tokenizer = AutoTokenizer.from_pretrained(model, **given)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"reward 'entailment': the model {model!r} cannot be loaded: {reason}") from error
    label = entailment_label_id(judge, model)
    judge = judge.to(device).eval().requires_grad_(False)

    def rule(prompts: list[str], texts: list[str], references: list[str]) -> list[float]:
        found: list[float] = []
        for first in range(0, len(texts), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            found += _label_probabilities(judge, tokenizer, prompts[some], texts[some])[:, label].tolist()
        return found

    return rule


def entailment_label_id(classifier: PreTrainedModel, model_name: str) -> int:
    """Number of the label that is called entailment in the model's own list, whatever its case."""
    labels = classifier.config.id2label
    found = [number for number, label in labels.items() if str(label).lower() == ENTAILMENT_LABEL]
    if len(found) != 1:
        known = ", ".join(map(str, labels.values()))
        raise ValueError(
            f"reward 'entailment': no label of {model_name!r} is called {ENTAILMENT_LABEL!r}; it has: {known}"
        )
    return int(found[0])


@torch.no_grad()
def _label_probabilities(
    classifier: PreTrainedModel, tokenizer: Any, premises: list[str], texts: list[str]
) -> Any:
    """(rows, labels), float64."""
    longest = min(
        tokenizer.model_max_length, getattr(classifier.config, "max_position_embeddings", None) or 2**20
    )
    pairs = tokenizer(
        premises, texts, truncation=True, max_length=longest, padding=True, return_tensors="pt", verbose=False
    ).to(classifier.device)
    with torch.autocast(classifier.device.type, enabled=False):
        return classifier(**pairs).logits.double().softmax(-1).cpu()
