"""What gives rewards: a rule (prompts, texts, references) -> one number for each text, more is better.

Ours: `exact_match`, `rouge2`, `rougeL` against the data's own completion, `entailment` by a model; each from
0 to 1. Any other is a user's function, known by its import path.
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
    """1 where the answer behind `####` is the reference's, by the rule of the metric `accuracy` (GSM8K).

    Of a reference without such an answer the whole text counts, as in the metric `exact_match`. Else 0.
    """
    return [float(_is_exact_match(text, wanted)) for text, wanted in zip(texts, references, strict=True)]


def _is_exact_match(text: str, reference: str) -> bool:
    answer = extract_answer(reference)
    return text.strip() == reference.strip() if answer is None else extract_answer(text) == answer


def create_rouge_reward(kind: str) -> RewardFunction:
    """The F-measure of `rouge2` or `rougeL` against the reference, not stemmed, from 0 to 1."""
    score = RougeScorer((kind,), use_stemmer=False)

    def rule(prompts: Texts, texts: Texts, references: Texts) -> list[float]:
        values = score(texts, [[reference] for reference in references])[kind]
        return [value / 100 for value in values]

    return rule


def load_reward_function(
    name: str, model: str | None, revision: str | None, device: torch.device | str
) -> RewardFunction:
    """The rule of this name, ready for use. Raises SpecError, a ValueError, for what cannot be found."""
    check_reward_name(name)
    check_reward_model(name, model)
    if name == ENTAILMENT:
        from gkd_lab.losses.entailment import load_entailment_reward

        assert model is not None, "checked"
        return load_entailment_reward(model, revision, torch.device(device))
    if name == "exact_match":
        return _require_references(name, exact_match)
    return (
        _require_references(name, create_rouge_reward(name))
        if name.startswith("rouge")
        else import_reward(name)
    )


def _require_references(name: str, function: RewardFunction) -> RewardFunction:
    def checked(prompts: Texts, texts: Texts, references: Texts) -> list[float]:
        missing = [row for row, reference in enumerate(references) if not reference]
        if missing:
            raise MissingReferenceError(
                f"reward {name!r} compares with the data's completion, and {len(missing)} of "
                f"{len(references)} rows have none (prompt {prompts[missing[0]]!r:.80})"
            )
        return function(prompts, texts, references)

    return checked


class MissingReferenceError(ValueError):
    """A rule that compares was given nothing to compare with."""


def compute_rewards(
    name: str, function: RewardFunction, prompts: Texts, texts: Texts, references: Texts
) -> list[float]:
    """What a rule gives, as finite numbers. Raises ValueError naming the reward, the row and the value."""
    try:
        given: Any = function(list(prompts), list(texts), list(references))
    except MissingReferenceError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything, and may call exit()
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rsplit('/', 1)[-1]}, line {last.lineno}"
        raise ValueError(f"reward {name!r} raised {type(error).__name__}: {error} ({where})") from error
    if isinstance(given, str | dict) or not hasattr(given, "__len__") or not hasattr(given, "__iter__"):
        raise ValueError(f"reward {name!r} gave {given!r:.80}, not a list of {len(texts)} numbers")
    if len(given) != len(texts):
        raise ValueError(f"reward {name!r} gave {len(given)} values for {len(texts)} texts")
    return [_finite_reward(name, row, value, texts) for row, value in enumerate(given)]


def _finite_reward(name: str, row: int, value: Any, texts: Sequence[str]) -> float:
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
