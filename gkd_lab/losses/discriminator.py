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

from gkd_lab.losses.auxiliary_losses import Pass
from gkd_lab.models.projection import Projection

SLOPE = 0.2
"""Of the leaky ReLU below 0, as in the discriminators of Mescheder et al. (2018)."""
CHUNK_BYTES = 128 * 2**20
"""Size of the distributions over tokens that are there at once."""


class View(nn.Module, ABC):
    """What is read of a pass: (B, C, W), of norm sqrt(W) at most, and 0 for what is no real token.

    Bounded, so that neither a gradient penalty is evaded by scale nor a score grows with a model's own.
    """

    width: int
    """W."""
    helps_student: bool
    """Whether its parameters learn to fool the discriminator, or else with it, if it has any."""

    @abstractmethod
    def forward(self, of: Pass, real: Tensor, is_teacher: bool) -> Tensor:
        """real: (B, C), which tokens are."""


class States(View):
    """Last hidden states, normalized; a student's of another width are first projected to the teacher's.

    The projection is on the student's side of the game: were it on the discriminator's, any two models could
    be told apart by it.
    """

    def __init__(self, student: int, teacher: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width, self.of_student = teacher, student
        self.helps_student = student != teacher
        self.projection = linear(student, teacher, generator, bias=False) if self.helps_student else None

    def forward(self, of: Pass, real: Tensor, is_teacher: bool) -> Tensor:
        expected, found = self.width if is_teacher else self.of_student, of.last.shape[-1]
        if of.projection.weight is None or found != expected:
            model = "teacher" if is_teacher else "student"
            raise ValueError(
                f"adversarial finds {found} numbers a token where the {model}'s {expected} hidden states "
                "should be, as its head is not linear: set `reads` to 'sequences'"
            )
        hidden = of.last.masked_fill(~real[..., None], 0)
        if not is_teacher and self.projection is not None:
            hidden = self.projection(hidden.to(self.projection.weight.dtype))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return functional.layer_norm(hidden.to(wide), (self.width,))


class SoftTokens(View):
    """The mean embedding of the next token under a pass's distribution; embeddings have the norm sqrt(W)."""

    helps_student = False

    def __init__(self, vocabulary: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Parameter(torch.randn(vocabulary, width, generator=generator))

    def forward(self, of: Pass, real: Tensor, is_teacher: bool) -> Tensor:
        embedding = functional.normalize(self.embedding, dim=-1) * self.width**0.5
        found = embedding.new_zeros(*real.shape, self.width)
        found[real] = mean_embeddings(of.last[real], of.projection, embedding)
        return found


def mean_embeddings(hidden: Tensor, head: Projection, embedding: Tensor) -> Tensor:
    """softmax(logits) times embedding (V, W) for hidden states (n, H): (n, W), over the first V tokens.

    Where the distributions are large they are made piece by piece, and again in the backward pass. Raises
    ValueError for a head that has fewer tokens.
    """
    vocabulary = len(embedding)
    if head.rows(hidden) < vocabulary:
        raise ValueError(f"a head of {head.rows(hidden)} tokens has no distribution over {vocabulary}")
    mean = partial(_mean_embeddings, head=head.first(vocabulary), embedding=embedding)
    size = max(CHUNK_BYTES // (vocabulary * embedding.element_size()), 1)
    if len(hidden) > size and torch.is_grad_enabled():
        mean = partial(checkpoint, mean, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([mean(rows) for rows in hidden.split(size)])


def _mean_embeddings(hidden: Tensor, head: Projection, embedding: Tensor) -> Tensor:
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
            linear(window * before, after, generator) for before, after in pairwise(widths)
        )
        self.score = linear(width, 1, generator)
        nn.init.zeros_(self.score.weight)

    def forward(self, read: Tensor, real: Tensor) -> Tensor:
        """Scores (B, C) of what is read of each token, (B, C, W); what is not `real` reaches no other."""
        for layer in self.hidden:
            read = functional.leaky_relu(layer(self._beside(read)), SLOPE)
            read = read.masked_fill(~real[..., None], 0)
        scores: Tensor = self.score(read)[..., 0]
        return scores

    def _beside(self, read: Tensor) -> Tensor:
        """Each token with its neighbours, (B, C, window * W)."""
        aside = self.window // 2
        padded = functional.pad(read, (0, 0, aside, aside))
        return padded.unfold(1, self.window, 1).mT.flatten(2)


def linear(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """Weights of the generator's own draw (He et al. 2015), in float32, and a bias of 0."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float32)
    nn.init.kaiming_normal_(layer.weight, a=SLOPE, generator=generator)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
