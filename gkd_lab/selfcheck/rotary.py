"""Rotary frequencies that depend on the length of a batch: `rope_type` dynamic and longrope.

transformers computes them from the largest position of a batch and keeps them on the module, so that beyond
some length a row's output depends on the rows beside it, and with dynamic on earlier batches.
"""

from typing import Any

LENGTH_DEPENDENT_TYPES = ("dynamic", "longrope")


def find_fixed_length(config: Any) -> tuple[str, int] | None:
    """Return (rope type, tokens up to which a model's rotary frequencies are fixed); None: at any length.

    config: The model's. With parameters for each type of layer, the smallest length of all.
    """
    text_config = config.get_text_config(decoder=True)
    parameters = getattr(text_config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    lengths = [
        (_get_fixed_length(text_config, values), str(values["rope_type"]))
        for values in by_layer
        if values.get("rope_type") in LENGTH_DEPENDENT_TYPES
    ]
    length, kind = min(lengths, default=(0, ""))
    return (kind, length) if lengths else None


def _get_fixed_length(config: Any, parameters: dict[str, Any]) -> int:
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
        side: f"the {side}'s rotary frequencies (rope_type {fixed[0]}) change beyond {fixed[1]:,} tokens, "
        f"for all rows of a batch: a row's output depends on the rows beside it{_get_memory(fixed[0])}; keep "
        "prompt and completion within that length together"
        for side, model in models.items()
        if (fixed := find_fixed_length(model.config)) and tokens > fixed[1]
    }


def _get_memory(kind: str) -> str:
    """Return what a rope type depends on besides the batch: only dynamic keeps its longest batch."""
    return " and on earlier batches" if kind == "dynamic" else ""


def describe_fixed_lengths(models: dict[str, Any], tokens: int) -> str:
    """Return a note on models whose rotary frequencies stay the same for `tokens` tokens but not for all.

    Empty if there is no such model.
    """
    return "; ".join(
        f"the {side}'s rotary frequencies (rope_type {fixed[0]}) change beyond {fixed[1]:,} tokens: longer "
        f"rows depend on their batch, which {tokens} tokens do not show"
        for side, model in models.items()
        if (fixed := find_fixed_length(model.config)) and tokens <= fixed[1]
    )
