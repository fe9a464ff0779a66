"""Reward functions: (prompts, texts, references) -> one number for each text, larger is better.

Built in are `exact_match`, `rouge2`, `rougeL` against the dataset's completion and `entailment` by a model,
each from 0 to 1. Any other one is a user's function, named by its import path.
"""

import math
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from gkd_lab.config.reward_names import (
    ENTAILMENT,
    RewardFunction,
    check_reward_model,
    check_reward_name,
    import_reward,
)
from gkd_lab.metrics.answers import extract_answer
from gkd_lab.metrics.rouge import RougeScorer

Texts = list[str]


def exact_match(prompts: Texts, texts: Texts, references: Texts) -> list[float]:
    """Return 1 for each text whose `#### ANSWER` equals its reference's, as `accuracy` (GSM8K), else 0.

    If a reference has no such answer, the whole stripped text is compared, as by the metric `exact_match`.
    """
    pairs = zip(texts, references, strict=True)
    return [float(_is_exact_match(text, reference)) for text, reference in pairs]


def _is_exact_match(text: str, reference: str) -> bool:
    """Whether the `####` answers are equal, or the whole texts if the reference has no such answer."""
    answer = extract_answer(reference)
    return text.strip() == reference.strip() if answer is None else extract_answer(text) == answer


def create_rouge_reward(kind: str) -> RewardFunction:
    """Return the reward function `rouge2` or `rougeL`: unstemmed F-measure with the reference, 0 to 1."""
    score = RougeScorer((kind,), use_stemmer=False)

    def compute_rouge(prompts: Texts, texts: Texts, references: Texts) -> list[float]:
        """Return each text's F-measure with its reference, 0 to 1; prompts are ignored."""
        values = score(texts, [[reference] for reference in references])[kind]
        return [value / 100 for value in values]

    return compute_rouge


def load_reward_function(
    name: str, model: str | None, revision: str | None, device: torch.device | str
) -> RewardFunction:
    """Return the built-in or imported reward function of this name; ConfigError if it cannot be found.

    Built-in ones that compare with references raise MissingReferenceError for a row without. model, revision:
    for `entailment` alone.
    """
    check_reward_name(name)
    check_reward_model(name, model)
    if name == ENTAILMENT:
        from gkd_lab.losses.entailment import load_entailment_reward

        assert model is not None, "check_reward_model has refused None"
        return load_entailment_reward(model, revision, torch.device(device))
    if name == "exact_match":
        return _require_references(name, exact_match)
    if name.startswith("rouge"):
        return _require_references(name, create_rouge_reward(name))
    return import_reward(name)


def _require_references(name: str, function: RewardFunction) -> RewardFunction:
    """Return a wrapper of the function that raises MissingReferenceError if any reference is empty."""

    def compute_checked(prompts: Texts, texts: Texts, references: Texts) -> list[float]:
        """Return the wrapped function's rewards; MissingReferenceError if any reference is empty."""
        missing = [row for row, reference in enumerate(references) if not reference]
        if missing:
            raise MissingReferenceError(
                f"reward {name!r} compares with the data's completion, and {len(missing)} of "
                f"{len(references)} rows have none (prompt {prompts[missing[0]]!r:.80})"
            )
        return function(prompts, texts, references)

    return compute_checked


class MissingReferenceError(ValueError):
    """A reward compares with references, and a row has none."""


def compute_rewards(
    name: str, function: RewardFunction, prompts: Texts, texts: Texts, references: Texts
) -> list[float]:
    """Call the reward function; return one float per text. ValueError if it fails or one is not finite."""
    try:
        rewards: Any = function(list(prompts), list(texts), list(references))
    except MissingReferenceError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything, and may call exit()
        last = traceback.extract_tb(error.__traceback__)[-1]
        location = f"{last.filename.rsplit('/', 1)[-1]}, line {last.lineno}"
        raise ValueError(f"reward {name!r} raised {type(error).__name__}: {error} ({location})") from error
    if isinstance(rewards, str | dict) or not hasattr(rewards, "__len__") or not hasattr(rewards, "__iter__"):
        raise ValueError(f"reward {name!r} gave {rewards!r:.80}, not a list of {len(texts)} numbers")
    if len(rewards) != len(texts):
        raise ValueError(f"reward {name!r} gave {len(rewards)} values for {len(texts)} texts")
    return [_parse_reward(name, row, value, texts) for row, value in enumerate(rewards)]


def _parse_reward(name: str, row: int, value: Any, texts: Sequence[str]) -> float:
    """Return one row's reward as a float; ValueError if it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"reward {name!r} gave {value!r:.40} for row {row} of {len(texts)}, which is no finite number "
            f"(text {texts[row]!r:.80})"
        )
    return number
