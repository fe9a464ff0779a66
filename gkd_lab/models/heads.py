"""A model's last hidden states and its output head apart, so that a loss can project them piece by piece.

The model's own forward runs with a stand-in for its head: what the head would read is kept, and what the
model does with logits happens to a single number. Shapes: N rows (K packed students times B), C completion
tokens, H hidden width, V vocabulary.
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
from gkd_lab.models.projection import Projection

logger = logging.getLogger(__name__)

LOGIT_FACTOR_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Fields of a configuration that logits are multiplied by: Cohere's, and those of Falcon-H1 and its like."""
PLAIN_WEIGHT_TYPES = (Tensor, nn.Parameter, DTensor)
"""Kinds of weights that can be multiplied with; a quantized weight is another class, or of integers."""
LARGE_LOGIT = 64.0
"""A logit that every soft-cap in use bends: Gemma 2's is 30."""
ModuleSlot = tuple[nn.Module, str]
"""A module and the name of one of its children."""


@dataclass(frozen=True)
class UnprojectedOutput:
    """What a forward pass gives before its logits.

    hidden: what the output head reads for each completion token, (N, C, H); the logits themselves, (N, C, V),
        when `projection.weight` is None.
    aux_loss: a mixture of experts' load-balancing loss times its coefficient, when the model's configuration
        asks for router logits.
    outputs: what else was asked for, by transformers' name: `hidden_states`, `decoder_attentions`, ...
    """

    hidden: Tensor
    projection: Projection
    aux_loss: Tensor | None
    extra_outputs: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


class OutputHead:
    """Where a model's logits come from: its output embedding and what its configuration does to logits.

    `is_linear` says whether hidden states times head are the model's own logits. It is settled here, once, on
    a few tokens; if they are not, a warning says why and `unprojected` gives the logits themselves. Weights
    that are not there yet (on the meta device or sharded) cannot be tried: then the head's type decides.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._unwrapped_model = unwrap_model(model)
        self._text_config = self._unwrapped_model.config.get_text_config(decoder=True)
        self.logit_indices: list[int] | None = None
        """Of a classifier: which of its logits are compared, in this order; None: all."""
        classifies = get_classifier_kind(self._unwrapped_model) is not None
        self._head_module: nn.Module | None = None if classifies else model.get_output_embeddings()
        self._head_slots = _find_head_slots(self._head_module, model)
        reason = self._find_nonlinearity()
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
        """Hidden states, head and auxiliary loss for the tokens of `batch`.

        It calls `model.forward`, not the model, so that it can itself run inside of a wrapper's forward.

        Args:
            asks: What else the pass is to record: of "hidden_states" and "attentions".

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
        named = build_forward_arguments(self._unwrapped_model, batch) | {
            f"output_{name}": True for name in output_names
        }
        return named | {"output_router_logits": True} if self.outputs_router_logits() else named

    def _register_with_zero_3(self) -> None:
        """Have the head gathered by the whole model's hooks, as its own are not called.

        For the backward pass they find the loss only in a tensor, tuple, list or dict.
        """
        import deepspeed  # type: ignore[import-not-found, unused-ignore]

        assert self._head_module is not None
        for parameter in self._head_module.parameters():
            deepspeed.zero.register_external_parameter(self.model, parameter)

    def compute_hidden(self, **arguments: Any) -> Tensor:
        """What a linear head reads after a forward pass with these arguments, (N, T, H)."""
        return self._capture_head_input(arguments, 0.0)[0]

    def accepts_argument(self, argument: str) -> bool:
        """Whether the model's forward has a parameter of this name."""
        return accepts_argument(self._unwrapped_model, argument)

    def _capture_head_input(self, arguments: dict[str, Any], stand_in_logit: float) -> tuple[Tensor, Any]:
        """What the head reads, (N, T, H), and the model's output when its head says `logit` alone."""
        assert self._head_module is not None
        with _replace_head(self._head_module, self._head_slots, stand_in_logit) as seen:
            output = self.model.forward(**arguments)
        assert len(seen) == 1, f"the head was called {len(seen)} times"
        return seen[0], output

    def _capture_completion_hidden(
        self, batch: Sequences, stand_in_logit: float, output_names: Sequence[str] = ()
    ) -> tuple[Tensor, Any]:
        """The same for the completions' tokens alone, (N, C, H)."""
        seen, output = self._capture_head_input(self._build_arguments(batch, output_names), stand_in_logit)
        return slice_completion_outputs(self._unwrapped_model, seen, batch), output

    def read_projection(self) -> Projection:
        """The head and what the configuration does to logits.

        Read anew each time: a pack's weights may be those of some cells, a wrapper may have moved them."""
        weight, bias = self._get_weight_and_bias()
        added = self._get_final_logits_bias()
        if added is not None:
            bias = added if bias is None else bias + added
        scale, softcap = _read_scale_and_softcap(self._text_config)
        return Projection(weight, bias, scale, softcap)

    def _get_weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        head = self._head_module
        if isinstance(head, PackedLinear):
            weight = head.get_active_tensor("weight")
            assert weight is not None
            return weight, head.get_active_tensor("bias")
        assert isinstance(head, nn.Linear)
        return head.weight, head.bias

    def _get_final_logits_bias(self) -> Tensor | None:
        """What BART and its like add to the head's output, (V,)."""
        buffer = dict(self._unwrapped_model.named_buffers(recurse=False)).get("final_logits_bias")
        return None if buffer is None else buffer[0]

    def outputs_router_logits(self) -> bool:
        """Whether the configuration asks for a mixture of experts' router logits."""
        return bool(getattr(self._text_config, "output_router_logits", False))

    def _compute_aux_loss(self, output: Any) -> Tensor | None:
        if not self.outputs_router_logits():
            return None
        loss, weight = output.get("aux_loss"), getattr(self._text_config, "router_aux_loss_coef", None)
        if loss is None or weight is None:
            raise ValueError(
                f"output_router_logits=True, but {type(self._unwrapped_model).__name__} returns no `aux_loss` or has no "
                "`router_aux_loss_coef`: set `model.config.output_router_logits = False` to train without it"
            )
        return weight * loss

    def has_unavailable_weights(self) -> bool:
        """Whether any weight is on the meta device or sharded; ZeRO-3 leaves an empty tensor of it."""
        weights = self.model.parameters()
        return any(p.is_meta or p.numel() == 0 or isinstance(p, DTensor) for p in weights)

    def _find_nonlinearity(self) -> str | None:
        """None if hidden states times head are the model's logits, else what is in the way."""
        head = self._head_module
        if head is None:
            return "the model names no output embedding"
        if not isinstance(head, nn.Linear | PackedLinear):
            return f"its head is a {type(head).__name__}, not a plain linear layer"
        weight, _ = self._get_weight_and_bias()
        if type(weight) not in PLAIN_WEIGHT_TYPES or not weight.dtype.is_floating_point:
            return f"its head's weight is a {type(weight).__name__} of {weight.dtype}"
        if weight.is_meta and "forward" in vars(head):
            return "its head's weight is offloaded and comes with each call"
        if self.has_unavailable_weights():
            return None
        with eval_mode(self.model), torch.no_grad():
            return self._find_logit_mismatch(_make_probe_batch(self.model, weight))

    def _find_logit_mismatch(self, batch: Sequences) -> str | None:
        """Compare with the model's own logits, and what it does to a large one with what is known of that."""
        own = slice_completion_outputs(
            self._unwrapped_model,
            self.model.forward(**build_forward_arguments(self._unwrapped_model, batch)).logits,
            batch,
        )
        try:
            hidden, output = self._capture_completion_hidden(batch, LARGE_LOGIT)
            projection, added = self.read_projection(), self._get_final_logits_bias()
            weight = self._get_weight_and_bias()[0]
            cells = len(weight) if weight.dim() == 3 else 1
            mine = projection(hidden.reshape(cells, -1, hidden.shape[-1])).view(own.shape)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return f"its forward does not run with a stand-in for the head ({error})"
        large = torch.as_tensor(
            LARGE_LOGIT if added is None else LARGE_LOGIT + added, dtype=own.dtype, device=own.device
        )
        precision = max(torch.finfo(tensor.dtype).eps for tensor in (own, hidden, weight))
        pairs = {"logits": (mine, own), "a logit of 64": (projection.scale_and_cap(large), output.logits)}
        for name, (found, expected) in pairs.items():
            off = compute_relative_error(found, expected)
            if not off <= 8 * max(precision, _get_matmul_rounding(own)):
                return f"{name} by its head and configuration differ from its own by {off:.1e} of the largest"
        return None


def _select_outputs(output: Any, output_names: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
    """What a forward pass recorded of `asks`, in each of its stacks."""
    return {
        name: value
        for name, value in output.items()
        if value is not None and any(name == one or name.endswith(f"_{one}") for one in output_names)
    }


def mark_untied_head(model: PreTrainedModel) -> None:
    """Note in the configuration that the head has weights of its own, if it has.

    T5's configuration says that they are tied whatever its file says (transformers 5), and a later
    `tie_weights`, as by `resize_token_embeddings` or FSDP, would replace T5 v1.1's head by its embeddings.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def _make_probe_batch(model: PreTrainedModel, weight: Tensor) -> Sequences:
    """One row of five tokens a cell, the same for all."""
    rows = len(weight) if weight.dim() == 3 else 1
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(5, device=device).expand(rows, -1) % weight.shape[-2]
    ones = torch.ones_like(ids)
    return Sequences(ids[:, :3], ones[:, :3], ids[:, 3:], ones[:, 3:])


def _get_matmul_rounding(logits: Tensor) -> float:
    """CUDA may multiply float32 with the 10 bits of TF32, by another algorithm for another shape."""
    return 2.0**-10 if logits.is_cuda and logits.dtype == torch.float32 else 0.0


def _find_head_slots(head: nn.Module | None, model: nn.Module) -> list[ModuleSlot]:
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is head and head is not None
    ]


class _HeadStandIn(nn.Module):
    """In the place of `head` it keeps what it is called with and returns one logit, (1, 1, 1)."""

    def __init__(self, head: nn.Module, logit: float) -> None:
        super().__init__()
        # Not as a child: its weights would have a second name.
        self.__dict__["head"] = head
        self.logit, self.captured_inputs = logit, list[Tensor]()

    def forward(self, hidden: Tensor) -> Tensor:
        self.captured_inputs.append(_cast_for_autocast(hidden))
        return self.captured_inputs[-1].new_full((1, 1, 1), self.logit)

    def __getattr__(self, name: str) -> Any:
        """Models ask for their head's dtype or device."""
        return getattr(self.__dict__["head"], name)


@contextmanager
def _replace_head(head: nn.Module, slots: Sequence[ModuleSlot], logit: float) -> Iterator[list[Tensor]]:
    """Within it the model calls a stand-in, which puts its input into the list, instead of its head.

    The head's hooks are not called either: those of ZeRO-3 expect a gradient to come back through its output.
    """
    stand_in = _HeadStandIn(head, logit)
    for parent, name in slots:
        setattr(parent, name, stand_in)
    try:
        yield stand_in.captured_inputs
    finally:
        for parent, name in slots:
            setattr(parent, name, head)


def _cast_for_autocast(hidden: Tensor) -> Tensor:
    """As a linear layer would convert it under autocast, which leaves float64 alone."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(device))


def _read_scale_and_softcap(config: PretrainedConfig) -> tuple[float, float | None]:
    """What the model does to its head's output: the factor, and Gemma's `final_logit_softcapping`."""
    scale = next(
        (value for name in LOGIT_FACTOR_FIELDS if (value := getattr(config, name, None)) is not None), None
    )
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        # Granite divides by it, HyperCLOVA X multiplies.
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return 1.0 if scale is None else float(scale), getattr(config, "final_logit_softcapping", None)


def compute_relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number. Where both are no number, or infinite alike, they agree."""
    one, other = torch.broadcast_tensors(actual.double(), expected.double())
    alike = (one == other) | (one.isnan() & other.isnan())
    largest = other.nan_to_num(0, 0, 0).abs().max().clamp_min(torch.finfo(other.dtype).tiny)
    return float(torch.where(alike, 0, (one - other).abs() / largest).max())
