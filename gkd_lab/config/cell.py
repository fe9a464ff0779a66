"""A cell: the fully resolved, frozen spec of one training run, with its evaluations."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from gkd_lab.config.artifact_specs import (
    DataSpec,
    Decoding,
    LengthPenaltyForm,
    OptimizerSpec,
    Precision,
    ScoreType,
    SftModel,
    TeacherScores,
    TeacherScoresSpec,
    TeacherText,
    TeacherTextSpec,
)
from gkd_lab.config.fingerprint import DefaultFrom, Frozen, NotHashed
from gkd_lab.config.lora import LoraSpec
from gkd_lab.config.loss_terms import ResolvedTerm, Share

LossNormalization = Literal["sequence", "token"]
Split = Literal["train", "validation", "test"]
Role = Literal["teacher", "start"]
Implementation = Literal["gkd_lab", "trl"]


class CorruptedText(Frozen):
    """The data's targets with random tokens in place of some, other ones in each epoch."""

    share: Share = Field(description="chance of a token to be replaced")
    samples: PositiveInt = Field(description="texts per target, a new one in each epoch")
    seed: NonNegativeInt = 0


class Source(Frozen):
    """Source of the completions trained on: one coin per optimizer step (Algorithm 1)."""

    lmbda: Share = Field(description="share of student-written batches")
    temperature: PositiveFloat | None = Field(
        default=None, description="sampling from the student; None: no sampling"
    )
    text: Annotated[TeacherText | None, DefaultFrom(None)] = Field(
        default=None, description="teacher-written text that replaces the data's targets"
    )
    corrupted: Annotated[CorruptedText | None, DefaultFrom(None)] = Field(
        default=None, description="the data's targets with some random tokens; for divergences alone"
    )

    @property
    def copies(self) -> int:
        """Number of texts of each prompt that the student does not write; every epoch takes the next."""
        text = self.corrupted or self.text
        return (None if text is None else text.samples) or 1


class Selection(Frozen):
    """Choice of a checkpoint by a score on validation rows, decoded greedily during training."""

    every: PositiveInt = Field(description="optimizer steps between two scores; the last step has one too")
    rows: PositiveInt | None = Field(default=None, description="validation rows, from the first; None: all")
    metric: str = Field(description="the largest is the best")


class Training(Frozen):
    """Everything that determines a distilled student."""

    task: str
    teacher: SftModel
    start: SftModel
    teachers: Annotated[tuple[SftModel, ...], DefaultFrom(())] = Field(
        default=(), description="teachers besides the first; divergences refer to them by number, from 1"
    )
    teacher_dtypes: Annotated[tuple[ScoreType | None, ...], DefaultFrom(())] = Field(
        default=(), description="type of each teacher's weights, by number; None, and (): as trained"
    )
    parked: Annotated[tuple[bool, ...], NotHashed()] = Field(
        default=(), description="which teachers, by number, wait on the CPU between uses; (): none"
    )
    objectives: tuple[ResolvedTerm, ...] = Field(min_length=1)
    source: Source
    teacher_scores: Annotated[TeacherScores | None, DefaultFrom(None)] = Field(
        default=None, description="cached teacher scores; None: the teacher reads every step's rows"
    )
    loss_normalization: LossNormalization
    implementation: Annotated[Implementation, DefaultFrom("gkd_lab")] = Field(
        default="gkd_lab", description="trainer of the cell; `trl`: TRL's GKDTrainer, a control arm"
    )
    trl_version: Annotated[str | None, DefaultFrom(None)] = Field(
        default=None, description="version of TRL, which defines what `trl` computes; None: not used"
    )
    steps: PositiveInt
    batch_size: PositiveInt = Field(description="sequences per optimizer step")
    train_rows: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="number of rows, from the first, to distil on; None: all"
    )
    selection: Annotated[Selection | None, DefaultFrom(None)] = Field(
        default=None, description="the checkpoint `best` beside the last; None: the last alone"
    )
    lora: Annotated[LoraSpec | None, DefaultFrom(None)] = Field(
        default=None, description="the adapter that is trained on the frozen SFT student; None: all weights"
    )
    optimizer: OptimizerSpec
    dropout: Share
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt
    precision: Precision
    tf32: Annotated[bool, DefaultFrom(False)] = Field(
        default=False, description="whether CUDA multiplies float32 in TF32"
    )
    seed: int = Field(description="seeds data order, coin, sampling and a LoRA adapter, nothing else")

    @property
    def reference_models(self) -> "tuple[tuple[Role, SftModel], ...]":
        """(role, model) pairs to build or load first: teacher (unless served), student, other teachers."""
        models: list[tuple[Role, SftModel]] = [("start", self.start)]
        if self.teacher.model.served is None:
            models.insert(0, ("teacher", self.teacher))
        models += [("teacher", model) for model in self.teachers if model != self.start]
        return tuple(models)

    def get_teacher_placement(self, number: int) -> tuple[ScoreType | None, bool]:
        """Return (dtype of a teacher's weights, None: as trained; whether it is parked on the CPU)."""
        dtype = self.teacher_dtypes[number] if number < len(self.teacher_dtypes) else None
        return dtype, self.parked[number] if number < len(self.parked) else False

    @property
    def data(self) -> DataSpec:
        """Spec of the data to distil on, which is the SFT student's."""
        return self.start.data

    @property
    def num_rows(self) -> int | None:
        """Number of rows to distil on; None where the size of the data is not known before it is read."""
        return self.train_rows or self.data.train

    @property
    def text_spec(self) -> TeacherTextSpec | None:
        """Spec of the teacher text that must exist before training; None: training uses no teacher text."""
        if self.source.text is None:
            return None
        return TeacherTextSpec(
            task=self.task,
            teacher=self.teacher,
            data=self.data,
            rows=self.train_rows if self.source.text.samples else None,
            text=self.source.text,
            max_input_tokens=self.max_input_tokens,
            max_output_tokens=self.max_output_tokens,
        )

    @property
    def scores_spec(self) -> TeacherScoresSpec | None:
        """Spec of the teacher scores that must exist before training; None: the teacher runs in training."""
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
    """A way of decoding a split and scoring the completions. Fields that the decoding ignores are None."""

    decoding: Decoding
    temperature: PositiveFloat | None = None
    num_beams: PositiveInt | None = None
    length_penalty: float | None = None
    length_penalty_form: Annotated[LengthPenaltyForm, DefaultFrom("transformers")] = "transformers"
    split: Split
    examples: PositiveInt | None = Field(
        default=None, description="number of rows, from the first; None: all"
    )
    max_output_tokens: PositiveInt
    seed: int | None = None
    samples: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="completions per prompt; None: one"
    )
    calculator: Annotated[bool, DefaultFrom(False)] = Field(
        default=False, description="compute the results of `<<48/2=24>>` marks"
    )
    checkpoint: Annotated[Literal["last", "best"], DefaultFrom("last")] = Field(
        default="last", description="weights of a trained cell: the last, or the best on validation rows"
    )
    metrics: Annotated[tuple[str, ...], NotHashed()] = Field(min_length=1)

    @property
    def name(self) -> str:
        """Short name: `greedy`, `sample0.5x8`, `beam4`, `greedy+best`; with `@split` if not test."""
        detail = {"greedy": "", "sample": f"{self.temperature:g}" if self.temperature else ""}
        label = self.decoding + detail.get(self.decoding, str(self.num_beams))
        label += f"x{self.samples}" if self.samples else ""
        label += "+calculator" if self.calculator else ""
        label += "+best" if self.checkpoint == "best" else ""
        return label if self.split == "test" else f"{label}@{self.split}"

    @property
    def folder(self) -> str:
        """Name of the evaluation's folder inside a record: `<decoding>-<fingerprint>`."""
        return f"{self.decoding}-{self.fingerprint}"


class LmEvalEvaluation(Frozen):
    """An lm-eval task run on the exported checkpoint. Documents, prompts and metrics are the task's."""

    lm_eval: str = Field(description="version of lm-eval, which defines the task")
    task: str
    content: str | None = Field(default=None, description="SHA-256 of a task file and its data")
    path: Annotated[str | None, NotHashed()] = None
    limit: PositiveInt | None = Field(default=None, description="documents per task; None: all")
    num_fewshot: NonNegativeInt | None = Field(default=None, description="None: the task's default")
    metric: Annotated[str | None, NotHashed()] = Field(
        default=None, description="metric to show first; all metrics are kept"
    )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The one metric that the task must report, as a tuple; () if any metric will do."""
        return () if self.metric is None else (self.metric,)

    @property
    def name(self) -> str:
        """Short name of the task, its shots and limit: `mmlu`, `mmlu_5shot`, `mmlu_first100`."""
        shots = "" if self.num_fewshot is None else f"_{self.num_fewshot}shot"
        return self.task + shots + (f"_first{self.limit}" if self.limit else "")

    @property
    def folder(self) -> str:
        """Name of the evaluation's folder inside a record: `lm_eval-<fingerprint>`."""
        return f"lm_eval-{self.fingerprint}"


AnyEvaluation = Evaluation | LmEvalEvaluation


@dataclass(frozen=True)
class Cell:
    """A point of a grid: a training, its evaluations, and the point's axis values (`labels`)."""

    scale: str
    training: Training
    evaluations: tuple[AnyEvaluation, ...]
    labels: dict[str, Any] = field(hash=False)

    @property
    def fingerprint(self) -> str:
        """First 8 hexadecimal digits of the training's fingerprint; evaluations do not count."""
        return self.training.fingerprint

    @property
    def full_fingerprint(self) -> str:
        """All 64 hexadecimal digits of the training's fingerprint; evaluations do not count."""
        return self.training.full_fingerprint

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.training.task

    @property
    def lmbda(self) -> float:
        """Share of student-written batches, 0 to 1."""
        return self.training.source.lmbda

    @property
    def divergence(self) -> str:
        """Divergence of the first loss term (`jsd`, `tv`), or the term's type if it is no divergence."""
        return self.training.objectives[0].divergence

    @property
    def beta(self) -> float | None:
        """Beta of the first loss term; None if that term has none."""
        return self.training.objectives[0].beta

    @property
    def seed(self) -> int:
        """Seed of data order, coin and sampling."""
        return self.training.seed

    @cached_property
    def folder(self) -> str:
        """Path of the cell's record below the outputs folder: scale, task, readable name and fingerprint."""
        divergence = self.divergence if self.beta is None else f"beta={self.beta:g}"
        divergence += "_teacher-text" if self.training.source.text else ""
        divergence += "_corrupted-text" if self.training.source.corrupted else ""
        lora, scores = self.training.lora, self.training.teacher_scores
        divergence += f"_lora{lora.r}" if lora else ""
        divergence += f"_scores-{scores.name}" if scores else ""
        divergence += "" if self.training.implementation == "gkd_lab" else "_trl"
        name = f"lmbda={self.lmbda:g}_{divergence}_seed={self.seed}-{self.fingerprint}"
        return f"{self.scale}/{self.task}/{name}"


class Reference(NamedTuple):
    """A reference model (a teacher or an SFT student) and the cells that need it."""

    role: Role
    model: SftModel
    cells: list[Cell]


def list_references(cells: Iterable[Cell]) -> list[Reference]:
    """Return one Reference per distinct teacher or SFT student, with its cells, by first appearance."""
    references: dict[tuple[Role, str], Reference] = {}
    for cell in cells:
        for role, model in cell.training.reference_models:
            key = (role, model.full_fingerprint)
            references.setdefault(key, Reference(role, model, [])).cells.append(cell)
    return list(references.values())
