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

from gkd_lab.config.fingerprint import DefaultFrom, Frozen, NotHashed
from gkd_lab.config.loss_terms import ResolvedTerm, Share

Family = Literal[
    "decoder-only", "encoder-decoder", "sequence-classification", "token-classification", "regression"
]
CLASSIFIER_FAMILIES: tuple[Family, ...] = ("sequence-classification", "token-classification", "regression")
"""Families of models that write nothing: encoders with a label for a text, or for each token."""
Precision = Literal["fp32", "bf16", "fp64"]
OptimizerName = Literal["adamw", "adafactor"]
LossNormalization = Literal["sequence", "token"]
Decoding = Literal["greedy", "sample", "beam"]
Split = Literal["train", "validation", "test"]
Role = Literal["teacher", "start"]
ScoreType = Literal["float16", "bfloat16", "float32"]


class DataSpec(Frozen):
    """Rows that a task learns from and is judged on, known by their content."""

    kind: Literal["made", "folder", "hub"]
    name: str | None = Field(default=None, description="generator of made data, or hub name")
    config: str | None = Field(default=None, description="configuration of a hub data set")
    path: Annotated[str | None, NotHashed()] = None
    revision: str = Field(description="commit, SHA-256 of the files, or version of the generator")
    seed: int = 0
    train: PositiveInt | None = Field(default=None, description="rows; None: all there are")
    validation: Annotated[PositiveInt | None, NotHashed()] = None  # enter by an evaluation's `examples`
    test: Annotated[PositiveInt | None, NotHashed()] = None
    shots: Annotated[NonNegativeInt, DefaultFrom(0)] = Field(
        default=0, description="worked examples before every question"
    )
    calculator_marks: Annotated[bool, DefaultFrom(False)] = Field(
        default=False, description="targets keep marks such as <<48/2=24>>"
    )


class TokenizerSpec(Frozen):
    """A tokenizer trained on the data's train split, or the one of a pretrained model."""

    kind: Literal["word", "bpe", "pretrained"]
    vocab_size: PositiveInt | None = Field(default=None, description="upper bound for a trained one")


class Architecture(Frozen):
    """A model made from scratch: Llama-like decoder, T5-like encoder-decoder, ModernBERT-like classifier."""

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

    name: Annotated[str, NotHashed()]
    architecture: Architecture | None = None
    pretrained: str | None = Field(default=None, description="hub name; a local folder is known by content")
    path: Annotated[str | None, NotHashed()] = None
    revision: str | None = None
    init_seed: int = 0
    server: Annotated[str | None, NotHashed()] = Field(
        default=None, description="address of one that is served"
    )
    served: Annotated[str | None, DefaultFrom(None)] = Field(default=None, description="its name there")
    top_k: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="tokens that are read of each of its distributions"
    )
    patience: Annotated[PositiveFloat | None, NotHashed()] = Field(
        default=None, description="seconds to wait for the server; None: five minutes"
    )
    keep_layers: Annotated[PositiveInt | tuple[NonNegativeInt, ...] | None, DefaultFrom(None)] = Field(
        default=None, description="of a loaded model; a number: evenly spaced, the first and last among them"
    )


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


class TeacherText(Frozen):
    """Text that the teacher writes once for every training prompt, in the place of the data's targets."""

    decoding: Decoding = "sample"
    temperature: PositiveFloat | None = Field(default=None, description="of sampling", validate_default=True)
    num_beams: PositiveInt | None = Field(default=None, validate_default=True)
    length_penalty: float | None = Field(default=None, validate_default=True)
    seed: int = 0

    @field_validator("temperature")
    @classmethod
    def _resolve_temperature(cls, value: float | None, info: ValidationInfo) -> float | None:
        return (value or 1.0) if info.data.get("decoding") == "sample" else None

    @field_validator("num_beams")
    @classmethod
    def _resolve_num_beams(cls, value: int | None, info: ValidationInfo) -> int | None:
        return (value or 4) if info.data.get("decoding") == "beam" else None

    @field_validator("length_penalty")
    @classmethod
    def _resolve_length_penalty(cls, value: float | None, info: ValidationInfo) -> float | None:
        return (0.6 if value is None else value) if info.data.get("decoding") == "beam" else None


class TeacherScores(Frozen):
    """Distributions that the teacher gives once of every token that is trained on, in the place of itself.

    With `top_k` the mass of all other tokens is spread evenly over them.
    """

    top_k: PositiveInt | None = Field(
        default=None, description="tokens named of each distribution; null: all of the vocabulary"
    )
    dtype: ScoreType = Field(default="float32", description="of the log-probabilities that are kept")

    @property
    def name(self) -> str:
        """`full`, `top32`."""
        return "full" if self.top_k is None else f"top{self.top_k}"


class Source(Frozen):
    """Who writes the sequence that is trained on: one coin per step (Algorithm 1)."""

    lmbda: Share = Field(description="share of student-written batches")
    temperature: PositiveFloat | None = Field(
        default=None, description="of sampling; None where nothing samples"
    )
    text: Annotated[TeacherText | None, DefaultFrom(None)] = Field(
        default=None, description="of the teacher, where it takes the place of the data's targets"
    )


class TeacherTextSpec(Frozen):
    """An artifact that cells share: what a teacher writes for the prompts of a training split."""

    task: str
    teacher: SftModel
    data: DataSpec
    text: TeacherText
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt


class TeacherScoresSpec(Frozen):
    """An artifact that cells share: what a teacher says of a training split's targets, or of its own text."""

    task: str
    teacher: SftModel
    data: DataSpec
    text: TeacherText | None = Field(description="that is scored; None: the data's targets")
    scores: TeacherScores
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt
    precision: Precision

    @property
    def text_spec(self) -> TeacherTextSpec | None:
        """What the teacher must have written before this begins."""
        if self.text is None:
            return None
        return TeacherTextSpec(
            task=self.task,
            teacher=self.teacher,
            data=self.data,
            text=self.text,
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
        )


class Training(Frozen):
    """Everything that decides what a distilled student becomes."""

    task: str
    teacher: SftModel
    start: SftModel
    teachers: Annotated[tuple[SftModel, ...], DefaultFrom(())] = Field(
        default=(), description="besides the first, numbered from 1, as divergences name them"
    )
    teacher_dtypes: Annotated[tuple[ScoreType | None, ...], DefaultFrom(())] = Field(
        default=(), description="of each teacher's weights, by number; None, and (): as they were trained"
    )
    parked: Annotated[tuple[bool, ...], NotHashed()] = Field(
        default=(), description="which teachers, by number, are on the CPU between uses; (): none"
    )
    objectives: tuple[ResolvedTerm, ...] = Field(min_length=1)
    source: Source
    teacher_scores: Annotated[TeacherScores | None, DefaultFrom(None)] = Field(
        default=None, description="None: the teacher itself reads every step's rows"
    )
    loss_normalization: LossNormalization
    steps: PositiveInt
    batch_size: PositiveInt = Field(description="sequences per optimizer step")
    train_rows: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="the first rows of the split that are distilled on; None: all"
    )
    optimizer: OptimizerSpec
    dropout: Share
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt
    precision: Precision
    seed: int = Field(description="drives data order, coin and sampling, nothing else")

    @property
    def reference_models(self) -> "tuple[tuple[Role, SftModel], ...]":
        """All that it needs: its first teacher, its start, other teachers."""
        more: tuple[tuple[Role, SftModel], ...] = tuple(
            ("teacher", model) for model in self.teachers if model != self.start
        )
        first: tuple[tuple[Role, SftModel], ...] = (("teacher", self.teacher), ("start", self.start))
        # One that is served is neither built nor judged here.
        return *(first if self.teacher.model.served is None else first[1:]), *more

    def get_teacher_placement(self, number: int) -> tuple[ScoreType | None, bool]:
        """Type of a teacher's weights (None: as they were trained), and whether it is parked on the CPU."""
        dtype = self.teacher_dtypes[number] if number < len(self.teacher_dtypes) else None
        return dtype, self.parked[number] if number < len(self.parked) else False

    @property
    def data(self) -> DataSpec:
        """The data that is distilled on: that of the starting point."""
        return self.start.data

    @property
    def text_spec(self) -> TeacherTextSpec | None:
        """What the teacher must have written before this begins."""
        if self.source.text is None:
            return None
        return TeacherTextSpec(
            task=self.task,
            teacher=self.teacher,
            data=self.data,
            text=self.source.text,
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
        )

    @property
    def scores_spec(self) -> TeacherScoresSpec | None:
        """What must be known of the teacher's distributions before this begins."""
        if self.teacher_scores is None:
            return None
        return TeacherScoresSpec(
            task=self.task,
            teacher=self.teacher,
            data=self.data,
            text=self.source.text,
            scores=self.teacher_scores,
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
            precision=self.precision,
        )


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
    samples: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="texts a prompt, where there are several"
    )
    calculator: Annotated[bool, DefaultFrom(False)] = Field(
        default=False, description="compute the results of `<<48/2=24>>` marks"
    )
    metrics: Annotated[tuple[str, ...], NotHashed()] = Field(min_length=1)

    @property
    def name(self) -> str:
        """`greedy`, `sample0.5`, `sample1x8`, `beam4`, `greedy+calculator`; with a split other than test."""
        detail = {"greedy": "", "sample": f"{self.temperature:g}" if self.temperature else ""}
        label = self.decoding + detail.get(self.decoding, str(self.num_beams))
        label += f"x{self.samples}" if self.samples else ""
        label += "+calculator" if self.calculator else ""
        return label if self.split == "test" else f"{label}@{self.split}"

    @property
    def folder(self) -> str:
        """Name of its folder inside a record."""
        return f"{self.decoding}-{self.fingerprint}"


class LmEvalEvaluation(Frozen):
    """A task of lm-eval on the exported checkpoint: documents, prompts and metrics are the task's own."""

    lm_eval: str = Field(description="version of lm-eval: what a task's name stands for")
    task: str
    content: str | None = Field(default=None, description="SHA-256 of a task file and its data")
    path: Annotated[str | None, NotHashed()] = None
    limit: PositiveInt | None = Field(default=None, description="documents of each task; None: all")
    num_fewshot: NonNegativeInt | None = Field(default=None, description="None: the task's own")
    metric: Annotated[str | None, NotHashed()] = Field(default=None, description="to lead with; all are kept")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it must give; the task itself says what else it measures."""
        return () if self.metric is None else (self.metric,)

    @property
    def name(self) -> str:
        """`mmlu`, `mmlu_5shot`, `mmlu_first100`."""
        shots = "" if self.num_fewshot is None else f"_{self.num_fewshot}shot"
        return self.task + shots + (f"_first{self.limit}" if self.limit else "")

    @property
    def folder(self) -> str:
        """Name of its folder inside a record."""
        return f"lm_eval-{self.fingerprint}"


AnyEvaluation = Evaluation | LmEvalEvaluation


@dataclass(frozen=True)
class Cell:
    """One point of a grid: a training, its evaluations, and the axis values that it was asked for by."""

    scale: str
    training: Training
    evaluations: tuple[AnyEvaluation, ...]
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
    def divergence(self) -> str:
        """Of the first objective; `cross_entropy` where it is none."""
        return self.training.objectives[0].divergence

    @property
    def beta(self) -> float | None:
        """Of the first objective; None for total variation and cross-entropy."""
        return self.training.objectives[0].beta

    @property
    def seed(self) -> int:
        """Seed of data order, coin and sampling."""
        return self.training.seed

    @cached_property
    def folder(self) -> str:
        """Where its record lies below the outputs folder: readable first, fingerprint second."""
        divergence = self.divergence if self.beta is None else f"beta={self.beta:g}"
        divergence += "_teacher-text" if self.training.source.text else ""
        kept = self.training.teacher_scores
        divergence += f"_scores-{kept.name}" if kept else ""
        name = f"lmbda={self.lmbda:g}_{divergence}_seed={self.seed}-{self.fingerprint}"
        return f"{self.scale}/{self.task}/{name}"


class Reference(NamedTuple):
    """A teacher or a starting student, with the cells that need it."""

    role: Role
    model: SftModel
    cells: list[Cell]


def list_references(cells: Iterable[Cell]) -> list[Reference]:
    """The distinct teachers and starting students of some cells, in order of first appearance."""
    found: dict[tuple[Role, str], Reference] = {}
    for cell in cells:
        for role, model in cell.training.reference_models:
            key = (role, model.full_fingerprint)
            found.setdefault(key, Reference(role, model, [])).cells.append(cell)
    return list(found.values())


def get_text_folder(scale: str, text: TeacherTextSpec) -> str:
    """Where a teacher's text lies below the outputs folder."""
    return f"{scale}/{text.task}/text-{text.text.decoding}-{text.fingerprint}"


def get_scores_folder(scale: str, scores: TeacherScoresSpec) -> str:
    """Where a teacher's scores lie below the outputs folder."""
    return f"{scale}/{scores.task}/scores-{scores.scores.name}-{scores.fingerprint}"


def get_artifact_folder(scale: str, role: str, model: SftModel) -> str:
    """Where an artifact's record lies below the outputs folder; role is `teacher` or `start`."""
    made = model.model.architecture
    kind = f"{made.layers}x{made.width}" if made else (model.model.pretrained or "local")
    return f"{scale}/{model.task}/{role}-{kind.replace('/', '-')}-{model.fingerprint}"
