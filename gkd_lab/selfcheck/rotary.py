"""Rotary frequencies that depend on the length of a batch: `rope_type` dynamic and longrope.

transformers computes them from the largest position of a batch and keeps them on the module, so that beyond
some length a row's output depends on the rows beside it, and with dynamic on earlier batches.
"""

from typing import Any, NamedTuple

LENGTH_DEPENDENT_TYPES = ("dynamic", "longrope")


class FixedLength(NamedTuple):
    """Number of tokens of a batch up to which rotary frequencies of a type stay the same."""

    rope_type: str
    tokens: int


def find_fixed_length(config: Any) -> FixedLength | None:
    """Return the rope type and length up to which a model's rotary frequencies are fixed; None: any length.

    config: The model's. With parameters for each type of layer, the smallest length of all.
    """
    text_config = config.get_text_config(decoder=True)
    parameters = getattr(text_config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    lengths = [
        FixedLength(str(values["rope_type"]), _read_fixed_length(text_config, values))
        for values in by_layer
        if values.get("rope_type") in LENGTH_DEPENDENT_TYPES
    ]
    return min(lengths, key=lambda length: (length.tokens, length.rope_type), default=None)


def _read_fixed_length(config: Any, parameters: dict[str, Any]) -> int:
    """Return the number of positions that the frequencies were made for."""
    original = parameters.get("original_max_position_embeddings")
    if original is None or parameters["rope_type"] == "dynamic":
        return int(config.max_position_embeddings)
    return int(original)


def explain_length_dependence(models: dict[str, Any], tokens: int) -> dict[str, str]:
    """Return why outputs of batches of `tokens` tokens depend on their lengths, for each model that does so.

    models: By "student" and "teacher", as is the result.
    """
    return {
        side: f"{_describe_change(side, fixed)}, for all rows of a batch: a row's output depends on the rows "
        f"beside it{_describe_earlier_batches(fixed.rope_type)}; keep prompt and completion within that "
        "length together"
        for side, model in models.items()
        if (fixed := find_fixed_length(model.config)) and tokens > fixed.tokens
    }


def _describe_change(side: str, fixed: FixedLength) -> str:
    """Return beyond how many tokens the frequencies of a model, "student" or "teacher", change."""
    return (
        f"the {side}'s rotary frequencies (rope_type {fixed.rope_type}) change beyond {fixed.tokens:,} tokens"
    )


def _describe_earlier_batches(rope_type: str) -> str:
    """Return a phrase for a type that depends on earlier batches too: only dynamic keeps its longest one."""
    return " and on earlier batches" if rope_type == "dynamic" else ""


def describe_fixed_lengths(models: dict[str, Any], tokens: int) -> str:
    """Return a note on models whose rotary frequencies stay the same for `tokens` tokens but not for all.

    Empty if there is no such model.
    """
    return "; ".join(
        f"{_describe_change(side, fixed)}: longer rows depend on their batch, which {tokens} tokens do not "
        "show"
        for side, model in models.items()
        if (fixed := find_fixed_length(model.config)) and tokens <= fixed.tokens
    )
