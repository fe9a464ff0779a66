"""Pairs of tiny models that do not speak of the same tokens: words and pieces of the same text."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gkd_lab.config.artifact_specs import Architecture, Family, TokenizerSpec
from gkd_lab.losses.step_loss import MicroBatch
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits, TeacherLogits
from gkd_lab.models.build import make_model, train_tokenizer
from gkd_lab.models.forward import compute_completion_logits
from gkd_lab.models.projection import Projection
from gkd_lab.teachers.teacher import TeacherOutput

from ..models.tiny import WORDS

TEXT = f"{WORDS} 12 21 bad cab"


def words() -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSpec(kind="word", vocab_size=50), [TEXT])


def pieces() -> PreTrainedTokenizerFast:
    """`12`, `bad` and `cab` are several tokens of it."""
    return train_tokenizer(TokenizerSpec(kind="bpe", vocab_size=300), [WORDS])


def model_of(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    family: Family = "decoder-only",
    *,
    width: int = 16,
    dtype: torch.dtype = torch.float64,
) -> PreTrainedModel:
    """Weights spread enough for the next token to depend on what came before, and to be rather sure."""
    architecture = Architecture(layers=2, width=width, heads=4, feed_forward=2 * width)
    model = make_model(family, architecture, tokenizer, seed=seed, max_tokens=64, dropout=0.0).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "shared" not in name:
                parameter.mul_(8 if family == "decoder-only" else 4)
            if name in ("model.norm.weight", "decoder.final_layer_norm.weight"):
                parameter.mul_(4)
    return model.eval()


class Plain:
    """A teacher without head, cache or placement: its own logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config, self.reads = model, model.config, 0

    def activate(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def activate_head(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def compute_output(self, batch: MicroBatch, output_names: Any = ()) -> TeacherOutput:
        self.reads += 1
        with torch.no_grad():
            logits = compute_completion_logits(self.model, batch.teacher)
        guide: TeacherLogits = HiddenTeacherLogits(logits.reshape(1, -1, logits.shape[-1]), Projection(None))
        return TeacherOutput(guide)


def plain_distance(q: Tensor, p: Tensor) -> Tensor:
    """L1 distance of two distributions, sorted, the shorter with zeros behind."""
    size = max(len(q), len(p))
    first, second = (torch.cat([x, x.new_zeros(size - len(x))]).sort(descending=True).values for x in (q, p))
    return (first - second).abs().sum()
