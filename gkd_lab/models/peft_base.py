"""The base model of a PEFT student as its teacher: the same weights with the adapter off, no second copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model

from gkd_lab.models.forward import eval_mode

_REPLACING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of LoRA (`init_lora_weights`) that change the base weights; after "pissa" may stand a number."""


def is_base_of(student: Any, model: Any) -> bool:
    """Check whether `model` is the very module that PEFT put the student's adapter into."""
    if not is_peft_model(student):
        return False
    return model is not student and model in (student.base_model, student.get_base_model())


def explain_changed_base(adapter: Any) -> str | None:
    """Return why a model with this adapter (a `PeftConfig`) turned off is not its base; None if it is."""
    bias = getattr(adapter, "bias", "none")
    if bias not in ("none", False, None):
        return f"bias={bias!r} trains biases of the base"
    init = getattr(adapter, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REPLACING_INITS):
        return f"init_lora_weights={init!r} changes the weights of the base"
    if getattr(adapter, "layer_replication", None):
        return "layer_replication adds layers to the base"
    if adapter.is_prompt_learning:
        return f"{type(adapter).__name__} has no layers to turn off"
    return None


def check_base_can_teach(student: Any) -> None:
    """Raise ValueError if the student with its adapters off is not the fixed model that they were put on."""
    reasons = [explain_changed_base(adapter) for adapter in student.peft_config.values()]
    if not any(reasons):
        with without_adapters(student):  # which turns off the gradients of all that belongs to an adapter
            trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        reasons = [f"{len(trained)} weights of the base learn ({trained[0]}, ...)"] if trained else []
    reason = next(filter(None, reasons), None)
    if reason is not None:
        raise ValueError(
            f"the teacher is the base of the student's adapter, and turning the adapter off does not give it "
            f"back: {reason}: pass a teacher with weights of its own, loaded a second time or copied before "
            "the adapter was added"
        )


@contextmanager
def without_adapters(student: Any) -> Iterator[None]:
    """Context manager: within the block the student is its base, in eval mode; then all is as before.

    PEFT turns gradients of adapters off and on again with them; here each weight gets back its own setting.
    """
    settings = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    with eval_mode(student):
        try:
            with student.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in settings:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
