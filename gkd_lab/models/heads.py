"""Separate a model's last hidden states from its output head, so that a loss can project them in chunks.

The model's own forward runs with a stand-in for its head, which records the head's input and returns a single
logit. Shapes: N rows (K packed students times B), C completion tokens, H hidden width, V vocabulary.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.models.forward import (
    Sequences,
    accepts_argument,
    build_forward_arguments,
    eval_mode,
    slice_completion_outputs,
    unwrap_model,
)
from gkd_lab.models.packed_layers import PackedLinear
from gkd_lab.models.projection import Projection, get_product_dtype

logger = logging.getLogger(__name__)

LOGIT_FACTOR_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Configuration fields that multiply the logits: Cohere's, and those of Falcon-H1 and related models."""
PLAIN_WEIGHT_TYPES = (Tensor, nn.Parameter, DTensor)
"""Types of weights that can be multiplied; a quantized weight has another type or an integer dtype."""
LARGE_LOGIT = 64.0
"""A logit that every usual soft-cap changes: Gemma 2's cap is 30."""
ModuleSlot = tuple[nn.Module, str]
"""A module and the name of one of its children."""


@dataclass(frozen=True)
class UnprojectedOutput:
    """Outputs of a forward pass without the final projection to logits.

    hidden: the output head's input for each completion token, (N, C, H); the logits, (N, C, V), when
        `projection.weight` is None.
    aux_loss: load-balancing loss of a mixture of experts times its coefficient, when the model's
        configuration has `output_router_logits`.
    extra_outputs: the requested outputs by transformers' name: `hidden_states`, `decoder_attentions`, ...
    """

    hidden: Tensor
    projection: Projection
    aux_loss: Tensor | None
    extra_outputs: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


class OutputHead:
    """A model's output head: its output embedding, and the scale and soft-cap of its configuration.

    `is_linear` tells whether hidden states times head equal the model's own logits. The constructor compares
    them on a few tokens; if they differ, it logs the reason and `compute_unprojected` returns the logits
    themselves. With weights on the meta device or sharded it trusts the type of the head instead.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._unwrapped_model = unwrap_model(model)
        self._text_config = self._unwrapped_model.config.get_text_config(decoder=True)
        self.logit_indices: list[int] | None = None
        """Indices of a classifier's logits that are compared, in this order; None for all."""
        classifies = get_classifier_kind(self._unwrapped_model) is not None
        self._head_module: nn.Module | None = None if classifies else model.get_output_embeddings()
        self._head_slots = _find_head_slots(self._head_module, model)
        reason = self._explain_nonlinear_head()
        self.is_linear = reason is None
        if self.is_linear and is_deepspeed_zero3_enabled():
            self._register_with_zero_3()
        if reason is not None and not classifies:
            logger.warning(
                "%s: the loss gets all logits at once, which takes more memory, as %s",
                type(self._unwrapped_model).__name__,
                reason,
            )

    def compute_unprojected(self, batch: Sequences, output_names: Sequence[str] = ()) -> UnprojectedOutput:
        """Run the model; return the head's inputs (N, C, H) and projection, or logits if it is not linear.

        Calls `model.forward`, not the model, so that it can run inside a wrapper's forward.

        Args:
            output_names: Extra outputs to return: "hidden_states", "attentions".

        Raises:
            ValueError: if the configuration asks for a router loss that the model does not return.
        """
        if self.is_linear:
            hidden, output = self._capture_completion_hidden(batch, 0.0, output_names)
            return UnprojectedOutput(
                hidden,
                self.read_projection(),
                self._compute_aux_loss(output),
                _select_outputs(output, output_names),
            )
        output = self.model.forward(**self._build_arguments(batch, output_names))
        logits = slice_completion_outputs(self._unwrapped_model, output.logits, batch)
        logits = logits if self.logit_indices is None else logits[..., self.logit_indices]
        return UnprojectedOutput(
            logits, Projection(None), self._compute_aux_loss(output), _select_outputs(output, output_names)
        )

    def _build_arguments(self, batch: Sequences, output_names: Sequence[str] = ()) -> dict[str, Any]:
        """Return forward's keyword arguments for a batch, with flags for extra outputs and router logits."""
        arguments = build_forward_arguments(self._unwrapped_model, batch)
        arguments |= {f"output_{name}": True for name in output_names}
        return arguments | ({"output_router_logits": True} if self.outputs_router_logits() else {})

    def _register_with_zero_3(self) -> None:
        """Register the head's weights with ZeRO-3's hooks of the whole model, as the head's own are skipped.

        For the backward pass these hooks find the loss only in a tensor, tuple, list or dict.
        """
        import deepspeed  # type: ignore[import-not-found, unused-ignore]

        assert self._head_module is not None
        for parameter in self._head_module.parameters():
            deepspeed.zero.register_external_parameter(self.model, parameter)

    def compute_hidden(self, **arguments: Any) -> Tensor:
        """Run the model on these forward arguments and return its linear head's input, (N, T, H)."""
        return self._capture_head_input(arguments, 0.0)[0]

    def accepts_argument(self, argument: str) -> bool:
        """Check whether the model's forward has a parameter of this name."""
        return accepts_argument(self._unwrapped_model, argument)

    def _capture_head_input(self, arguments: dict[str, Any], stand_in_logit: float) -> tuple[Tensor, Any]:
        """Run the model with a stand-in head; return (the head's input (N, T, H), the model's output)."""
        assert self._head_module is not None
        with _replace_head(self._head_module, self._head_slots, stand_in_logit) as captured_inputs:
            output = self.model.forward(**arguments)
        assert len(captured_inputs) == 1, f"the head was called {len(captured_inputs)} times"
        return captured_inputs[0], output

    def _capture_completion_hidden(
        self, batch: Sequences, stand_in_logit: float, output_names: Sequence[str] = ()
    ) -> tuple[Tensor, Any]:
        """Run the model with a stand-in head; return (its input for completion tokens (N, C, H), output)."""
        hidden, output = self._capture_head_input(self._build_arguments(batch, output_names), stand_in_logit)
        return slice_completion_outputs(self._unwrapped_model, hidden, batch), output

    def read_projection(self) -> Projection:
        """Return the head's current weight and bias with the config's scale and soft-cap as a `Projection`.

        Not cached: a pack may have selected some of its cells, and a wrapper may have moved the weights.
        """
        weight, bias = self._get_weight_and_bias()
        final_bias = self._get_final_logits_bias()
        if final_bias is not None:
            bias = final_bias if bias is None else bias + final_bias
        scale, softcap = _read_scale_and_softcap(self._text_config)
        return Projection(weight, bias, scale, softcap)

    def _get_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias or None) of the linear head, with a cell axis first if it is packed."""
        head = self._head_module
        if isinstance(head, PackedLinear):
            return head.get_active_weight(), head.get_active_tensor("bias")
        assert isinstance(head, nn.Linear)
        return head.weight, head.bias

    def _get_final_logits_bias(self) -> Tensor | None:
        """Return the bias that BART and related models add to the head's output, (V,); None for others."""
        buffer = dict(self._unwrapped_model.named_buffers(recurse=False)).get("final_logits_bias")
        return None if buffer is None else buffer[0]

    def outputs_router_logits(self) -> bool:
        """Check whether the config sets `output_router_logits`, so that an auxiliary loss is trained on."""
        return bool(getattr(self._text_config, "output_router_logits", False))

    def _compute_aux_loss(self, output: Any) -> Tensor | None:
        """Return a mixture of experts' load-balancing loss times its coefficient; None if not configured."""
        if not self.outputs_router_logits():
            return None
        loss, weight = output.get("aux_loss"), getattr(self._text_config, "router_aux_loss_coef", None)
        if loss is None or weight is None:
            raise ValueError(
                f"output_router_logits=True, but {type(self._unwrapped_model).__name__} returns no "
                "`aux_loss` or has no `router_aux_loss_coef`: set `model.config.output_router_logits = "
                "False` to train without it"
            )
        return weight * loss

    def has_unavailable_weights(self) -> bool:
        """Check whether any weight of the model is on the meta device or sharded (empty under ZeRO-3)."""
        weights = self.model.parameters()
        return any(p.is_meta or p.numel() == 0 or isinstance(p, DTensor) for p in weights)

    def _explain_nonlinear_head(self) -> str | None:
        """Return the reason why hidden states times head are not the model's logits; None if they are.

        Compares numbers on a few tokens, unless weights are unavailable: then the type of the head decides.
        """
        head = self._head_module
        if head is None:
            return "the model has no output embedding"
        if not isinstance(head, nn.Linear | PackedLinear):
            return f"its head is a {type(head).__name__}, not a plain linear layer"
        weight, _ = self._get_weight_and_bias()
        if type(weight) not in PLAIN_WEIGHT_TYPES or not weight.dtype.is_floating_point:
            return f"its head's weight is a {type(weight).__name__} of {weight.dtype}"
        if weight.is_meta and "forward" in vars(head):
            return "its head's weight is offloaded and loaded at each call"
        if self.has_unavailable_weights():
            return None
        with eval_mode(self.model), torch.no_grad():
            return self._find_logit_mismatch(_make_probe_batch(self.model, weight))

    def _find_logit_mismatch(self, batch: Sequences) -> str | None:
        """Return how the head's logits of a probe batch differ from the model's own; None if they agree.

        Also compares a large logit, which shows an unknown scale or soft-cap.
        """
        expected = slice_completion_outputs(
            self._unwrapped_model,
            self.model.forward(**build_forward_arguments(self._unwrapped_model, batch)).logits,
            batch,
        )
        try:
            hidden, output = self._capture_completion_hidden(batch, LARGE_LOGIT)
            projection, final_bias = self.read_projection(), self._get_final_logits_bias()
            weight = self._get_weight_and_bias()[0]
            cells = len(weight) if weight.dim() == 3 else 1
            projected = projection(hidden.reshape(cells, -1, hidden.shape[-1])).view(expected.shape)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return f"its forward does not run with a stand-in for the head ({error})"
        large = expected.new_tensor(LARGE_LOGIT) + (0 if final_bias is None else final_bias)
        capped = projection.scale_and_cap(large.to(expected.dtype))
        precision = max(torch.finfo(tensor.dtype).eps for tensor in (expected, hidden, weight))
        tolerance = 8 * max(precision, _get_matmul_rounding(expected))
        errors = {
            "logits": compute_relative_error(projected, expected),
            "a logit of 64": compute_relative_error(capped, output.logits),
        }
        for name, difference in errors.items():
            if not difference <= tolerance:
                return (
                    f"{name} by its head and configuration differ from its own by {difference:.1e} of the "
                    "largest"
                )
        return None


def _select_outputs(output: Any, output_names: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
    """Return name -> output for the requested names, with or without a prefix such as `decoder_`."""
    endings = tuple(f"_{name}" for name in output_names)
    return {
        name: value for name, value in output.items() if value is not None and f"_{name}".endswith(endings)
    }


def mark_untied_head(model: PreTrainedModel) -> None:
    """Set `tie_word_embeddings=False` in the config if head and input embeddings are different tensors.

    In transformers 5 a T5 configuration is always tied, whatever its file says, so that a later
    `tie_weights`, as by `resize_token_embeddings` or FSDP, would replace T5 v1.1's head by its embeddings.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def _make_probe_batch(model: PreTrainedModel, weight: Tensor) -> Sequences:
    """Make a batch of one row per cell: ids 0 to 4, of which three are the prompt and two the completion."""
    rows = len(weight) if weight.dim() == 3 else 1
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(5, device=device).expand(rows, -1) % weight.shape[-2]
    ones = torch.ones_like(ids)
    return Sequences(ids[:, :3], ones[:, :3], ids[:, 3:], ones[:, 3:])


def _get_matmul_rounding(logits: Tensor) -> float:
    """Return 2**-10 for float32 logits on CUDA, where products may use TF32 (10 bits); 0 otherwise."""
    return 2.0**-10 if logits.is_cuda and logits.dtype == torch.float32 else 0.0


def _find_head_slots(head: nn.Module | None, model: nn.Module) -> list[ModuleSlot]:
    """List (parent module, child name) of every place of the head in the model; empty for no head."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is head and head is not None
    ]


class _HeadStandIn(nn.Module):
    """A replacement for the output head that records its inputs and returns one logit, (1, 1, 1)."""

    def __init__(self, head: nn.Module, logit: float) -> None:
        super().__init__()
        # Not as a child module: its weights would get a second name.
        self.__dict__["head"] = head
        self.logit, self.captured_inputs = logit, list[Tensor]()

    def forward(self, hidden: Tensor) -> Tensor:
        """Record the head's input, cast as autocast would, and return one constant logit, (1, 1, 1)."""
        self.captured_inputs.append(hidden.to(get_product_dtype(hidden.device, hidden.dtype)))
        return self.captured_inputs[-1].new_full((1, 1, 1), self.logit)

    def __getattr__(self, name: str) -> Any:
        """Return the head's attribute: models read its dtype or device."""
        return getattr(self.__dict__["head"], name)


@contextmanager
def _replace_head(head: nn.Module, slots: Sequence[ModuleSlot], logit: float) -> Iterator[list[Tensor]]:
    """Context manager: replace the head by a stand-in; yield the list that collects the inputs it receives.

    The head's hooks are not called either: those of ZeRO-3 expect a gradient through the head's output.
    """
    stand_in = _HeadStandIn(head, logit)
    for parent, name in slots:
        setattr(parent, name, stand_in)
    try:
        yield stand_in.captured_inputs
    finally:
        for parent, name in slots:
            setattr(parent, name, head)


def _read_scale_and_softcap(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return (factor of the logits, 1.0 by default; `final_logit_softcapping` or None) from the config."""
    scale = next(
        (value for name in LOGIT_FACTOR_FIELDS if (value := getattr(config, name, None)) is not None), None
    )
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        # Granite divides by it, HyperCLOVA X multiplies.
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return 1.0 if scale is None else float(scale), getattr(config, "final_logit_softcapping", None)


def compute_relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected|, a float; NaN or equal infinity in both counts as 0.

    The largest expected number ignores NaN and infinity.
    """
    actual, expected = torch.broadcast_tensors(actual.double(), expected.double())
    equal = (actual == expected) | (actual.isnan() & expected.isnan())
    largest = expected.nan_to_num(0, 0, 0).abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float(torch.where(equal, 0, (actual - expected).abs() / largest).max())
