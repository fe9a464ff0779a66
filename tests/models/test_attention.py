"""Compute attention in float32 within a forward pass in bfloat16."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gkd_lab.config.artifact_specs import Family
from gkd_lab.models.attention import ATTENTION_KERNEL, upcast_cpu_attention
from gkd_lab.models.forward import Sequences, compute_completion_logits

from .tiny import FAMILIES, tiny_model


class RecordAttention(TorchDispatchMode):
    """Record the dtypes of the queries of all attention kernels, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.queries |= {a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
        return func(*args, **kwargs or {})


def rows() -> Sequences:
    ids = torch.tensor([[0, 3, 4, 5], [6, 7, 8, 9]])
    mask = (ids != 0).long()
    return Sequences(ids, mask, ids.flip(0), torch.ones_like(ids))


def student(family: Family) -> PreTrainedModel:
    return tiny_model(family, 0, dtype=torch.float32).train()


def collect_attention_dtypes(model: PreTrainedModel, *, upcast: bool) -> set[torch.dtype]:
    with upcast_cpu_attention(upcast), RecordAttention() as recorded:
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute_completion_logits(model, rows()).float().square().mean()
        loss.backward()
    return recorded.queries


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("decoder-only", False), ("decoder-only", True), ("encoder-decoder", False)],
)
def test_no_attention_of_a_step_is_in_bfloat16(family: Family, checkpointing: bool) -> None:
    model = student(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert collect_attention_dtypes(model, upcast=True) == {torch.float32}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_without_upcasting_attention_is_in_bfloat16() -> None:
    assert torch.bfloat16 in collect_attention_dtypes(student("decoder-only"), upcast=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_bfloat16_model_stay_in_bfloat16(family: Family) -> None:
    model = student(family).bfloat16().eval()
    with torch.no_grad(), upcast_cpu_attention():
        assert compute_completion_logits(model, rows()).dtype == torch.bfloat16


def test_float64_attention_is_unchanged() -> None:
    model = student("decoder-only").double().eval()
    with torch.no_grad():
        plain = compute_completion_logits(model, rows())
        with upcast_cpu_attention():
            assert torch.equal(compute_completion_logits(model, rows()), plain)


def test_the_kernel_is_restored_after_an_error() -> None:
    attention = ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL]
    with pytest.raises(KeyError), upcast_cpu_attention():
        assert ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL] is not attention
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS[ATTENTION_KERNEL] is attention
