"""TF32 as cells choose it: on while such a cell trains, off before and after."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers.utils import is_torch_tf32_available

from gkd_lab.config.cell import Training
from gkd_lab.config.errors import ConfigError


def check_tf32(trainings: Iterable[Training]) -> None:
    """Raise ConfigError if one of the trainings asks for TF32 and this machine has none."""
    if any(training.tf32 for training in trainings) and not is_torch_tf32_available():
        raise ConfigError(
            "tf32: true needs an NVIDIA GPU with TF32 (Ampere or newer), and torch finds none here: leave "
            "tf32 out, which makes other cells, or run where there is one"
        )


@contextmanager
def use_tf32(is_on: bool) -> Iterator[None]:
    """Let CUDA multiply float32 in TF32 for the duration of the block, if `is_on`.

    transformers' argument `tf32` is not used: it stays on after a training, and transformers 5.23 caches the
    call that sets it, so that a process switches at most once each way.
    """
    if not is_on:
        yield
        return
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        yield
    finally:
        backend.fp32_precision = before
