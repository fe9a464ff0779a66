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
    """Return a reward function: the probability, 0 to 1, that the prompt (premise) entails the text.

    The model is loaded once, frozen, in its own dtype. Pairs that are too long for it are cut at their longer
    part. Raises ValueError if the model is missing or has no label called entailment.
    """
    options: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    try:
        with hide_progress_bars():
            classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype="auto", **options)
            tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"reward 'entailment': the model {model!r} cannot be loaded: {reason}") from error
    label = entailment_label_id(classifier, model)
    classifier = classifier.to(device).eval().requires_grad_(False)

    def compute_entailment(prompts: list[str], texts: list[str], references: list[str]) -> list[float]:
        """Return the probability that each prompt entails its text; references are ignored."""
        rewards: list[float] = []
        for first in range(0, len(texts), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            probabilities = _label_probabilities(classifier, tokenizer, prompts[rows], texts[rows])
            rewards += probabilities[:, label].tolist()
        return rewards

    return compute_entailment


def entailment_label_id(classifier: PreTrainedModel, model_name: str) -> int:
    """Return the index of the label named entailment, in any case; ValueError unless exactly one is."""
    labels = classifier.config.id2label
    numbers = [number for number, label in labels.items() if str(label).lower() == ENTAILMENT_LABEL]
    if len(numbers) != 1:
        names = ", ".join(map(str, labels.values()))
        raise ValueError(
            f"reward 'entailment': no label of {model_name!r} is called {ENTAILMENT_LABEL!r}; it has: {names}"
        )
    return int(numbers[0])


@torch.no_grad()
def _label_probabilities(
    classifier: PreTrainedModel, tokenizer: Any, premises: list[str], texts: list[str]
) -> Any:
    """Return each (premise, text) pair's label probabilities, (rows, labels), float64, on the CPU."""
    longest = min(
        tokenizer.model_max_length, getattr(classifier.config, "max_position_embeddings", None) or 2**20
    )
    pairs = tokenizer(
        premises, texts, truncation=True, max_length=longest, padding=True, return_tensors="pt", verbose=False
    ).to(classifier.device)
    with torch.autocast(classifier.device.type, enabled=False):
        return classifier(**pairs).logits.double().softmax(-1).cpu()
