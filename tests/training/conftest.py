"""Fixtures of the tests of training."""

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms cast to float32, which would turn a difference of 1e-16 into one of 1e-8."""
    cast = torch.Tensor.to

    def to(tensor: Tensor, *args: Any, **more: Any) -> Tensor:
        hidden = tensor.dtype == torch.float64 and tensor.dim() == 3
        narrows = hidden and args[:1] == (torch.float32,)
        return tensor if narrows else cast(tensor, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", to)
