"""Specs of the artifacts that cells share: teachers, SFT students, teacher-written text, teacher scores.

A spec describes content only. Devices, output folders and workers are not fields, so none of them can enter a
fingerprint.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gkd_lab.config.fingerprint import DefaultFrom, Frozen, NotHashed
from gkd_lab.config.loss_terms import Share

Family = Literal[
    "decoder-only", "encoder-decoder", "sequence-classification", "token-classification", "regression"
]
CLASSIFIER_FAMILIES: tuple[Family, ...] = ("sequence-classification", "token-classification", "regression")
"""Encoder models that generate no text: they predict a label or a number per text, or a label per token."""
Precision = Literal["fp32", "bf16", "fp64"]
OptimizerName = Literal["adamw", "adafactor"]
Decoding = Literal["greedy", "sample", "beam"]
LengthPenaltyForm = Literal["transformers", "wu"]
"""Divisor of a text's log-probability: length^p, or ((5 + length) / 6)^p (Wu et al. 2016, as in T5X)."""
ScoreType = Literal["float16", "bfloat16", "float32"]
FindModel = Callable[[str], tuple[str | None, str | None, str | None]]
"""Maps a model's name or folder to (hub name or None, folder or None, revision or None)."""


class ColumnNames(Frozen):
    """Names of the columns that a task reads; None: the task's own name. `a.b` is the field b of column a."""

    prompt: str | None = Field(default=None, min_length=1, description="the input")
    target: str | None = Field(default=None, min_length=1, description="the completion to learn")
    references: str | None = Field(
        default=None, min_length=1, description="list of texts to score against, beside the target"
    )
    teacher: str | None = Field(
        default=None, min_length=1, description="name of the teacher that a row is routed to"
    )


class DataSpec(Frozen):
    """The rows of a task, for training and evaluation, identified by their content."""

    kind: Literal["made", "folder", "hub"]
    name: str | None = Field(default=None, description="generator of made data, or hub name")
    config: str | None = Field(default=None, description="configuration of a hub data set")
    path: Annotated[str | None, NotHashed()] = None
    revision: str = Field(description="commit, SHA-256 of the files, or version of the generator")
    seed: int = 0
    train: PositiveInt | None = Field(default=None, description="number of rows; None: all")
    # An evaluation hashes its number of rows as `examples`.
    validation: Annotated[PositiveInt | None, NotHashed()] = None
    test: Annotated[PositiveInt | None, NotHashed()] = None
    shots: Annotated[NonNegativeInt, DefaultFrom(0)] = Field(
        default=0, description="worked examples before every question"
    )
    calculator_marks: Annotated[bool, DefaultFrom(False)] = Field(
        default=False, description="targets keep marks such as <<48/2=24>>"
    )
    columns: Annotated[ColumnNames | None, DefaultFrom(None)] = Field(
        default=None, description="columns with other names than the task's; None: all have the task's names"
    )


class TokenizerSpec(Frozen):
    """A tokenizer trained on the train split, or the tokenizer of a pretrained model."""

    kind: Literal["word", "bpe", "pretrained"]
    vocab_size: PositiveInt | None = Field(default=None, description="upper bound for a trained tokenizer")


class Architecture(Frozen):
    """A model made from scratch: Llama-like decoder, T5-like encoder-decoder, ModernBERT-like classifier."""

    layers: PositiveInt = Field(description="in each stack")
    width: PositiveInt = Field(description="d_model")
    heads: PositiveInt
    feed_forward: PositiveInt


class OptimizerSpec(Frozen):
    """Optimizer and schedule: linear warm-up, constant rate, linear cool-down to 0 (Tables A.1 to A.4)."""

    name: OptimizerName
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: NonNegativeFloat = Field(description="per cell; 0: no clipping")
    warmup_steps: NonNegativeInt
    cooldown_steps: NonNegativeInt = Field(description="last steps, over which the rate falls to 0")


class SftSpec(Frozen):
    """Supervised fine-tuning on the targets of the data."""

    steps: PositiveInt
    batch_size: PositiveInt
    seed: int
    rows: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="number of training rows, from the first; None: all"
    )
    optimizer: OptimizerSpec


class ModelSpec(Frozen):
    """A model before SFT on the task: made from scratch, loaded, or behind a server."""

    name: Annotated[str, NotHashed()]
    architecture: Architecture | None = None
    pretrained: str | None = Field(default=None, description="hub name; a local folder is hashed by content")
    path: Annotated[str | None, NotHashed()] = None
    revision: str | None = None
    init_seed: int = 0
    server: Annotated[str | None, NotHashed()] = Field(default=None, description="address of a served model")
    served: Annotated[str | None, DefaultFrom(None)] = Field(default=None, description="name on the server")
    top_k: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="tokens read of each distribution of a served model"
    )
    patience: Annotated[PositiveFloat | None, NotHashed()] = Field(
        default=None, description="seconds to wait for the server; None: five minutes"
    )
    keep_layers: Annotated[PositiveInt | tuple[NonNegativeInt, ...] | None, DefaultFrom(None)] = Field(
        default=None,
        description="layers kept of a loaded model; a number: so many, evenly spaced from first to last",
    )


class SftModel(Frozen):
    """A shared reference model: a teacher, or the SFT student that cells start from (section 3.1)."""

    task: str
    family: Family
    data: DataSpec
    tokenizer: TokenizerSpec
    model: ModelSpec
    sft: SftSpec | None = Field(description="None: no fine-tuning")
    dropout: Share
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt
    precision: Precision

    @property
    def is_hub_checkpoint(self) -> bool:
        """Whether the model is a checkpoint of the hub as it is: all of its layers, and no fine-tuning."""
        return self.model.pretrained is not None and self.model.keep_layers is None and self.sft is None


class TeacherText(Frozen):
    """Decoding of the text that a teacher writes once per training prompt, instead of the targets."""

    decoding: Decoding = "sample"
    temperature: PositiveFloat | None = Field(default=None, description="sampling", validate_default=True)
    num_beams: PositiveInt | None = Field(default=None, validate_default=True)
    length_penalty: float | None = Field(default=None, validate_default=True)
    length_penalty_form: Annotated[LengthPenaltyForm, DefaultFrom("transformers")] = "transformers"
    seed: NonNegativeInt = 0
    samples: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="texts per prompt, a new one in each epoch; sampling only; None: one"
    )

    @field_validator("temperature")
    @classmethod
    def _resolve_temperature(cls, value: float | None, info: ValidationInfo) -> float | None:
        """Return the temperature for sampling, by default 1; None for other decodings."""
        return (value or 1.0) if info.data.get("decoding") == "sample" else None

    @field_validator("num_beams")
    @classmethod
    def _resolve_num_beams(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Return the number of beams for beam search, by default 4; None for other decodings."""
        return (value or 4) if info.data.get("decoding") == "beam" else None

    @field_validator("length_penalty")
    @classmethod
    def _resolve_length_penalty(cls, value: float | None, info: ValidationInfo) -> float | None:
        """Return the length penalty for beam search, by default 0.6; None for other decodings."""
        return (0.6 if value is None else value) if info.data.get("decoding") == "beam" else None

    @field_validator("length_penalty_form")
    @classmethod
    def _resolve_penalty_form(cls, value: LengthPenaltyForm, info: ValidationInfo) -> LengthPenaltyForm:
        """Return the form for beam search; the default for other decodings, which ignore it."""
        return value if info.data.get("decoding") == "beam" else "transformers"

    @model_validator(mode="after")
    def _check_samples(self) -> "TeacherText":
        """Refuse several texts of a decoding that always gives the same one."""
        if self.samples is not None and self.decoding != "sample":
            raise ValueError(f"samples: {self.decoding} decoding gives the same text {self.samples} times")
        return self


class TeacherScores(Frozen):
    """Format of teacher distributions that are computed once for all tokens trained on.

    With `top_k` the probability mass of all other tokens is spread evenly over them.
    """

    top_k: PositiveInt | None = Field(
        default=None, description="tokens kept of each distribution; null: the whole vocabulary"
    )
    dtype: ScoreType = Field(default="float32", description="type of the stored log-probabilities")

    @property
    def name(self) -> str:
        """Name in folders: `full` without top_k, else `top32` and the like."""
        return "full" if self.top_k is None else f"top{self.top_k}"


class TeacherTextSpec(Frozen):
    """A shared artifact: the text that a teacher writes for the prompts of a train split."""

    task: str
    teacher: SftModel
    data: DataSpec
    rows: Annotated[PositiveInt | None, DefaultFrom(None)] = Field(
        default=None, description="number of prompts, from the first; None: all"
    )
    text: TeacherText
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt


class TeacherScoresSpec(Frozen):
    """A shared artifact: teacher distributions on a train split's targets, or on the teacher's own text."""

    task: str
    teacher: SftModel
    data: DataSpec
    text: TeacherText | None = Field(description="the text that is scored; None: the data's targets")
    scores: TeacherScores
    max_input_tokens: PositiveInt
    max_output_tokens: PositiveInt
    precision: Precision

    @property
    def text_spec(self) -> TeacherTextSpec | None:
        """Spec of the teacher text that is scored; None: the data's targets are scored."""
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


def get_text_folder(scale: str, text: TeacherTextSpec) -> str:
    """Return `<scale>/<task>/text-<decoding>-<fingerprint>`, relative to the outputs folder."""
    return f"{scale}/{text.task}/text-{text.text.decoding}-{text.fingerprint}"


def get_scores_folder(scale: str, scores: TeacherScoresSpec) -> str:
    """Return `<scale>/<task>/scores-<full or topK>-<fingerprint>`, relative to the outputs folder."""
    return f"{scale}/{scores.task}/scores-{scores.scores.name}-{scores.fingerprint}"


def get_artifact_folder(scale: str, role: str, model: SftModel) -> str:
    """Return `<scale>/<task>/<role>-<2x64 or model name>-<fingerprint>`, relative to the outputs folder.

    role: "teacher" or "start" (the SFT student).
    """
    architecture = model.model.architecture
    if architecture is not None:
        kind = f"{architecture.layers}x{architecture.width}"
    else:
        kind = (model.model.pretrained or "local").replace("/", "-")
    return f"{scale}/{model.task}/{role}-{kind}-{model.fingerprint}"
