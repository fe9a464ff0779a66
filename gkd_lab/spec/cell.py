"""What one run is: the fully resolved, frozen description of a training and of its evaluations.

Nothing here knows of devices, folders of outputs or workers, so none of these can enter a fingerprint.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticKnownError

from gkd_lab.spec.identity import Frozen, Place, Since

Share = Annotated[float, Field(ge=0, le=1)]
Family = Literal["decoder-only", "encoder-decoder"]
Precision = Literal["fp32", "bf16", "fp64"]
OptimizerName = Literal["adamw", "adafactor"]
LossNormalization = Literal["sequence", "token"]
Divergence = Literal["jsd", "tv"]
Decoding = Literal["greedy", "sample", "beam"]
Split = Literal["train", "validation", "test"]


class DataSpec(Frozen):
    """Rows that a task learns from and is judged on, known by their content."""

    kind: Literal["made", "folder", "hub"]
    name: str | None = Field(default=None, description="generator of made data, or hub name")
    config: str | None = Field(default=None, description="configuration of a hub data set")
    path: Annotated[str | None, Place()] = None
    revision: str = Field(description="commit, SHA-256 of the files, or version of the generator")
    seed: int = 0
    train: PositiveInt | None = Field(default=None, description="rows; None: all there are")
    validation: Annotated[PositiveInt | None, Place()] = None  # enter by an evaluation's `examples`
    test: Annotated[PositiveInt | None, Place()] = None


class TokenizerSpec(Frozen):
    """A tokenizer trained on the data's train split, or the one of a pretrained model."""

    kind: Literal["word", "bpe", "pretrained"]
    vocab_size: PositiveInt | None = Field(default=None, description="upper bound for a trained one")


class Architecture(Frozen):
    """A model made from scratch: a Llama-like decoder or a T5-like encoder-decoder."""

    layers: PositiveInt = Field(description="in each stack")
    width: PositiveInt = Field(description="d_model")
    heads: PositiveInt
    feed_forward: PositiveInt


class OptimizerSpec(Frozen):
    """Step size over time: linear warm-up, constant, linear cool-down to 0 (Tables A.1 to A.4)."""

    name: OptimizerName
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: NonNegativeFloat = Field(description="per cell; 0: no clipping")
    warmup_steps: NonNegativeInt
    cooldown_steps: NonNegativeInt = Field(description="the last steps, over which it falls to 0")


class SftSpec(Frozen):
    """Supervised fine-tuning on the data's targets."""

    steps: PositiveInt
    batch_size: PositiveInt
    seed: int
    optimizer: OptimizerSpec


class ModelSpec(Frozen):
    """A model before it is trained on the task: made from scratch, or loaded."""

    name: Annotated[str, Place()]
    architecture: Architecture | None = None
    pretrained: str | None = Field(default=None, description="hub name; a local folder is known by content")
    path: Annotated[str | None, Place()] = None
    revision: str | None = None
    init_seed: int = 0


class SftModel(Frozen):
    """An artifact that cells share: a teacher, or the SFT student that every cell starts from (§3.1)."""

    task: str
    family: Family
    data: DataSpec
    tokenizer: TokenizerSpec
    model: ModelSpec
    sft: SftSpec | None = Field(description="None: as it was made or loaded")
    dropout: Share
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt
    precision: Precision


class Objective(Frozen):
    """One term of the loss: a divergence between teacher and student, token by token (Eq. 2).

    `jsd` is JSD(beta), the two KLs at its ends (Eq. 1); `tv` is total variation, half the sum of |p - q|,
    with which f-distill trains (Wen et al. 2023; Fig. 2). What a divergence does not read is resolved to
    one value, so that objectives that cannot differ are equal.
    """

    type: Literal["divergence"] = "divergence"
    divergence: Annotated[Divergence, Since("jsd")] = Field(
        default="jsd", description="`jsd`: JSD(beta); `tv`: total variation, which has no beta"
    )
    beta: Share | None = Field(
        default=None,
        validate_default=True,
        description="weight of the teacher; 0 forward KL, 1 reverse KL; null for `tv`",
    )
    rescale: Annotated[bool, Since(False)] = Field(
        default=False,
        description="divide JSD(beta) by beta (1 - beta), so that betas compare; the KLs stay as they are",
    )
    teacher_temperature: PositiveFloat
    student_temperature: PositiveFloat
    weight: NonNegativeFloat = 1.0

    @field_validator("beta")
    @classmethod
    def _belongs_to_jsd(cls, beta: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("divergence") == "tv":
            return None
        if beta is None:
            raise PydanticKnownError("missing")
        return beta

    @field_validator("rescale")
    @classmethod
    def _changes_the_inside_only(cls, rescale: bool, info: ValidationInfo) -> bool:
        """The limits of JSD(beta) / (beta (1 - beta)) at 0 and 1 are the KLs that stand there already."""
        return rescale and info.data.get("beta") not in (None, 0, 1)


class Source(Frozen):
    """Who writes the sequence that is trained on: one coin per step (Algorithm 1)."""

    lmbda: Share = Field(description="share of student-written batches")
    temperature: PositiveFloat | None = Field(
        default=None, description="of sampling; None where nothing samples"
    )


class Training(Frozen):
    """Everything that decides what a distilled student becomes."""

    task: str
    teacher: SftModel
    start: SftModel
    objectives: tuple[Objective, ...] = Field(min_length=1)
    source: Source
    loss_normalization: LossNormalization
    steps: PositiveInt
    batch_size: PositiveInt = Field(description="sequences per optimizer step")
    optimizer: OptimizerSpec
    dropout: Share
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt
    precision: Precision
    seed: int = Field(description="drives data order, coin and sampling, nothing else")

    @property
    def data(self) -> DataSpec:
        """The data that is distilled on: that of the starting point."""
        return self.start.data


class Evaluation(Frozen):
    """One way of decoding and judging. Fields that do not matter for the decoding are None."""

    decoding: Decoding
    temperature: PositiveFloat | None = None
    num_beams: PositiveInt | None = None
    length_penalty: float | None = None
    split: Split
    examples: PositiveInt | None = Field(default=None, description="the first ones; None: all")
    max_output_tokens: PositiveInt
    seed: int | None = None
    metrics: Annotated[tuple[str, ...], Place()] = Field(min_length=1)

    @property
    def name(self) -> str:
        """`greedy`, `sample0.5`, `beam4`; with the split where it is not the test split."""
        detail = {"greedy": "", "sample": f"{self.temperature:g}" if self.temperature else ""}
        label = self.decoding + detail.get(self.decoding, str(self.num_beams))
        return label if self.split == "test" else f"{label}@{self.split}"

    @property
    def folder(self) -> str:
        """Name of its folder inside a record."""
        return f"{self.decoding}-{self.fingerprint}"


@dataclass(frozen=True)
class Cell:
    """One point of a grid: a training, its evaluations, and the axis values that it was asked for by."""

    scale: str
    training: Training
    evaluations: tuple[Evaluation, ...]
    labels: dict[str, Any] = field(hash=False)

    @property
    def fingerprint(self) -> str:
        """Identity of the training; 8 hexadecimal digits."""
        return self.training.fingerprint

    @property
    def full_fingerprint(self) -> str:
        """All 64 digits: what tells cells apart."""
        return self.training.full_fingerprint

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.training.task

    @property
    def lmbda(self) -> float:
        """Share of student-written batches."""
        return self.training.source.lmbda

    @property
    def divergence(self) -> Divergence:
        """Of the first objective."""
        return self.training.objectives[0].divergence

    @property
    def beta(self) -> float | None:
        """Of the first objective; None for total variation."""
        return self.training.objectives[0].beta

    @property
    def seed(self) -> int:
        """Seed of data order, coin and sampling."""
        return self.training.seed

    @cached_property
    def folder(self) -> str:
        """Where its record lies below the outputs folder: readable first, fingerprint second."""
        divergence = self.divergence if self.beta is None else f"beta={self.beta:g}"
        name = f"lmbda={self.lmbda:g}_{divergence}_seed={self.seed}-{self.fingerprint}"
        return f"{self.scale}/{self.task}/{name}"


Role = Literal["teacher", "start"]


class Reference(NamedTuple):
    """A teacher or a starting student, with the cells that need it."""

    role: Role
    model: SftModel
    cells: list[Cell]


def references(cells: Iterable[Cell]) -> list[Reference]:
    """The distinct teachers and starting students of some cells, in order of first appearance."""
    found: dict[tuple[Role, str], Reference] = {}
    for cell in cells:
        pair: tuple[tuple[Role, SftModel], ...] = (
            ("teacher", cell.training.teacher),
            ("start", cell.training.start),
        )
        for role, model in pair:
            key = (role, model.full_fingerprint)
            found.setdefault(key, Reference(role, model, [])).cells.append(cell)
    return list(found.values())


def artifact_folder(scale: str, role: str, model: SftModel) -> str:
    """Where an artifact's record lies below the outputs folder; role is `teacher` or `start`."""
    made = model.model.architecture
    kind = f"{made.layers}x{made.width}" if made else (model.model.pretrained or "local")
    return f"{scale}/{model.task}/{role}-{kind.replace('/', '-')}-{model.fingerprint}"
