"""The discriminator of the adversarial loss, and the token features that it reads.

Shapes: B rows, C completion tokens, H hidden width, V vocabulary, W features of a token, n real tokens.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gkd_lab.losses.auxiliary_losses import ModelOutputs
from gkd_lab.models.projection import Projection

LEAKY_RELU_SLOPE = 0.2
"""Slope of the leaky ReLU below 0, as in the discriminators of Mescheder et al. (2018)."""
CHUNK_BYTES = 128 * 2**20
"""Memory of the distributions over tokens that exist at once."""


class TokenFeatures(nn.Module, ABC):
    """Features of each token, (B, C, W), of norm sqrt(W) at most, and 0 for padding.

    The bound keeps the scale of a model from evading the gradient penalty and from growing the scores.
    """

    width: int
    """Number of features of a token, W."""
    learns_with_student: bool
    """Whether its parameters, if any, learn the student's loss; otherwise the discriminator's."""

    @abstractmethod
    def forward(self, outputs: ModelOutputs, mask: Tensor, is_teacher: bool) -> Tensor:
        """Return each token's features, (B, C, W), 0 for padding; `mask`, (B, C), is true for real tokens."""


class HiddenStateFeatures(TokenFeatures):
    """Last hidden states, normalized; a student's of another width are first projected to the teacher's.

    The projection learns the student's loss: with the discriminator's it could tell any two models apart.
    """

    def __init__(self, student_width: int, teacher_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width, self.student_width = teacher_width, student_width
        self.learns_with_student = student_width != teacher_width
        self.projection = (
            create_linear(student_width, teacher_width, generator, bias=False)
            if self.learns_with_student
            else None
        )

    def forward(self, outputs: ModelOutputs, mask: Tensor, is_teacher: bool) -> Tensor:
        """Return layer-normalized last hidden states, (B, C, W); a student's are projected if widths differ.

        Raises ValueError for a model whose head is not linear.
        """
        expected, width = self.width if is_teacher else self.student_width, outputs.last_hidden.shape[-1]
        if outputs.projection.weight is None or width != expected:
            model = "teacher" if is_teacher else "student"
            raise ValueError(
                f"adversarial finds {width} numbers a token where the {model}'s {expected} hidden states "
                "should be, as its head is not linear: set `reads` to 'sequences'"
            )
        hidden = outputs.last_hidden.masked_fill(~mask[..., None], 0)
        if not is_teacher and self.projection is not None:
            hidden = self.projection(hidden.to(self.projection.weight.dtype))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return functional.layer_norm(hidden.to(wide), (self.width,))


class SoftTokenFeatures(TokenFeatures):
    """Mean embedding of the next token under the model's distribution; embeddings have the norm sqrt(W)."""

    learns_with_student = False

    def __init__(self, vocabulary: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Parameter(torch.randn(vocabulary, width, generator=generator))

    def forward(self, outputs: ModelOutputs, mask: Tensor, is_teacher: bool) -> Tensor:
        """Return each real token's mean embedding under the model's next-token distribution, (B, C, W)."""
        embedding = functional.normalize(self.embedding, dim=-1) * self.width**0.5
        features = embedding.new_zeros(*mask.shape, self.width)
        features[mask] = mean_embeddings(outputs.last_hidden[mask], outputs.projection, embedding)
        return features


def mean_embeddings(hidden: Tensor, head: Projection, embedding: Tensor) -> Tensor:
    """Return softmax(logits) @ embedding for each hidden state, (n, W), over the head's first V tokens.

    hidden: (n, H); embedding: (V, W). Large distributions are computed chunk by chunk, and again in the
    backward pass. Raises ValueError for a head that has fewer tokens.
    """
    vocabulary = len(embedding)
    if head.get_vocabulary_size(hidden) < vocabulary:
        raise ValueError(
            f"a head of {head.get_vocabulary_size(hidden)} tokens has no distribution over {vocabulary}"
        )
    mean = partial(_chunk_mean_embeddings, head=head.truncate_vocabulary(vocabulary), embedding=embedding)
    size = max(CHUNK_BYTES // (vocabulary * embedding.element_size()), 1)
    if len(hidden) > size and torch.is_grad_enabled():
        mean = partial(checkpoint, mean, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([mean(rows) for rows in hidden.split(size)])


def _chunk_mean_embeddings(hidden: Tensor, head: Projection, embedding: Tensor) -> Tensor:
    """Return one chunk's mean embeddings, (n, W), with the head cast to the hidden states' dtype."""
    weight = None if head.weight is None else head.weight.to(hidden.dtype)
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    logits = replace(head, weight=weight, bias=bias)(hidden)[..., : len(embedding)]
    return logits.to(embedding.dtype).softmax(-1) @ embedding


class Discriminator(nn.Module):
    """Scores tokens by hidden layers that read `window` neighbouring tokens each; scores start at 0."""

    def __init__(self, inputs: int, width: int, layers: int, window: int, generator: torch.Generator) -> None:
        super().__init__()
        self.window = window
        widths = [inputs] + [width] * layers
        self.hidden = nn.ModuleList(
            create_linear(window * before, after, generator) for before, after in pairwise(widths)
        )
        self.score = create_linear(width, 1, generator)
        nn.init.zeros_(self.score.weight)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return one score per token, (B, C), for features (B, C, W); tokens outside the mask are ignored."""
        for layer in self.hidden:
            features = functional.leaky_relu(layer(self._concatenate_neighbours(features)), LEAKY_RELU_SLOPE)
            features = features.masked_fill(~mask[..., None], 0)
        scores: Tensor = self.score(features)[..., 0]
        return scores

    def _concatenate_neighbours(self, features: Tensor) -> Tensor:
        """Return the features of each token's window, joined, (B, C, window * W); zeros beyond the ends."""
        aside = self.window // 2
        padded = functional.pad(features, (0, 0, aside, aside))
        return padded.unfold(1, self.window, 1).mT.flatten(2)


def create_linear(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """Return a new float32 layer: weights drawn from the generator by He et al. (2015), a bias of 0."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float32)
    nn.init.kaiming_normal_(layer.weight, a=LEAKY_RELU_SLOPE, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
