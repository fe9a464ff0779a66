"""What a discriminator reads of a forward pass, and the scores that it gives to tokens.

Shapes: B rows, C completion tokens, H hidden width, V vocabulary, W numbers read of a token, n real tokens.
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
"""Of the leaky ReLU below 0, as in the discriminators of Mescheder et al. (2018)."""
CHUNK_BYTES = 128 * 2**20
"""Size of the distributions over tokens that are there at once."""


class TokenFeatures(nn.Module, ABC):
    """What is read of a pass: (B, C, W), of norm sqrt(W) at most, and 0 for what is no real token.

    Bounded, so that neither a gradient penalty is evaded by scale nor a score grows with a model's own.
    """

    width: int
    """W."""
    learns_with_student: bool
    """Whether its parameters learn to fool the discriminator, or else with it, if it has any."""

    @abstractmethod
    def forward(self, outputs: ModelOutputs, mask: Tensor, is_teacher: bool) -> Tensor:
        """real: (B, C), which tokens are."""


class HiddenStateFeatures(TokenFeatures):
    """Last hidden states, normalized; a student's of another width are first projected to the teacher's.

    The projection is on the student's side of the game: were it on the discriminator's, any two models could
    be told apart by it.
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
        expected, found = self.width if is_teacher else self.student_width, outputs.last_hidden.shape[-1]
        if outputs.projection.weight is None or found != expected:
            model = "teacher" if is_teacher else "student"
            raise ValueError(
                f"adversarial finds {found} numbers a token where the {model}'s {expected} hidden states "
                "should be, as its head is not linear: set `reads` to 'sequences'"
            )
        hidden = outputs.last_hidden.masked_fill(~mask[..., None], 0)
        if not is_teacher and self.projection is not None:
            hidden = self.projection(hidden.to(self.projection.weight.dtype))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return functional.layer_norm(hidden.to(wide), (self.width,))


class SoftTokenFeatures(TokenFeatures):
    """The mean embedding of the next token under a pass's distribution; embeddings have the norm sqrt(W)."""

    learns_with_student = False

    def __init__(self, vocabulary: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Parameter(torch.randn(vocabulary, width, generator=generator))

    def forward(self, outputs: ModelOutputs, mask: Tensor, is_teacher: bool) -> Tensor:
        embedding = functional.normalize(self.embedding, dim=-1) * self.width**0.5
        found = embedding.new_zeros(*mask.shape, self.width)
        found[mask] = mean_embeddings(outputs.last_hidden[mask], outputs.projection, embedding)
        return found


def mean_embeddings(hidden: Tensor, head: Projection, embedding: Tensor) -> Tensor:
    """softmax(logits) times embedding (V, W) for hidden states (n, H): (n, W), over the first V tokens.

    Where the distributions are large they are made piece by piece, and again in the backward pass. Raises
    ValueError for a head that has fewer tokens.
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
    # As autocast does to a head: its operands in the dtype of what it reads.
    weight = None if head.weight is None else head.weight.to(hidden.dtype)
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    logits = replace(head, weight=weight, bias=bias)(hidden)[..., : len(embedding)]
    return logits.to(embedding.dtype).softmax(-1) @ embedding


class Discriminator(nn.Module):
    """`layers` hidden layers that read `window` neighbouring tokens each, and a score that starts at 0."""

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
        """Scores (B, C) of what is read of each token, (B, C, W); what is not `real` reaches no other."""
        for layer in self.hidden:
            features = functional.leaky_relu(layer(self._concatenate_neighbours(features)), LEAKY_RELU_SLOPE)
            features = features.masked_fill(~mask[..., None], 0)
        scores: Tensor = self.score(features)[..., 0]
        return scores

    def _concatenate_neighbours(self, features: Tensor) -> Tensor:
        """Each token with its neighbours, (B, C, window * W)."""
        aside = self.window // 2
        padded = functional.pad(features, (0, 0, aside, aside))
        return padded.unfold(1, self.window, 1).mT.flatten(2)


def create_linear(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """Weights of the generator's own draw (He et al. 2015), in float32, and a bias of 0."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float32)
    nn.init.kaiming_normal_(layer.weight, a=LEAKY_RELU_SLOPE, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
