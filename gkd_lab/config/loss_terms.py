"""The terms of a loss, as an experiment describes them."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticKnownError

from gkd_lab.config.fingerprint import DefaultFrom, Frozen, NotHashed
from gkd_lab.config.layer_maps import UNIFORM, LayerMapField

Share = Annotated[float, Field(ge=0, le=1)]
DivergenceKind = Literal["jsd", "tv"]
FIRST_TEACHER = "teacher"
"""Name of the run's own teacher, number 0."""
RewardBaseline = Literal["leave_one_out", "none"]


class WeightedTerm(Frozen):
    """A term of the loss and its weight."""

    weight: NonNegativeFloat = 1.0
    final_weight: Annotated[NonNegativeFloat | None, DefaultFrom(None)] = Field(
        default=None, description="to which the weight moves linearly; null: it stays"
    )


class LossTerm(WeightedTerm):
    """A term that is no divergence; its type stands in the place of one."""

    @property
    def beta(self) -> None:
        """It has none."""

    @property
    def divergence(self) -> str:
        """Its type."""
        return str(self.type)  # type: ignore[attr-defined]


class DivergenceFields(WeightedTerm):
    """A divergence between teacher and student, token by token (Eq. 2).

    `jsd` is JSD(beta), the two KLs at its ends (Eq. 1); `tv` is total variation, half the sum of |p - q|,
    with which f-distill trains (Wen et al. 2023; Fig. 2). What a divergence does not read is resolved to
    one value, so that objectives that cannot differ are equal.
    """

    type: Literal["divergence"] = "divergence"
    divergence: Annotated[DivergenceKind, DefaultFrom("jsd")] = Field(
        default="jsd", description="`jsd`: JSD(beta); `tv`: total variation, which has no beta"
    )
    beta: Share | None = Field(
        default=None,
        validate_default=True,
        description="weight of the teacher; 0 forward KL, 1 reverse KL; null for `tv`",
    )
    rescale: Annotated[bool, DefaultFrom(False)] = Field(
        default=False,
        description="divide JSD(beta) by beta (1 - beta), so that betas compare; the KLs stay as they are",
    )
    teacher_temperature: PositiveFloat
    student_temperature: PositiveFloat
    square_temperature: Annotated[bool, DefaultFrom(False)] = Field(
        default=False,
        description="multiply by the product of the temperatures, Hinton's T^2; nothing where it is 1",
    )
    mixture: Annotated[tuple[PositiveFloat, ...] | None, DefaultFrom(None)] = Field(
        default=None,
        description="weights of several teachers' probabilities, which sum to 1; null: all alike",
    )
    mixture_temperatures: Annotated[tuple[PositiveFloat, ...] | None, DefaultFrom(None)] = Field(
        default=None, description="of each of several teachers, before they are mixed; null: 1"
    )

    @field_validator("beta")
    @classmethod
    def _check_beta(cls, beta: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("divergence") == "tv":
            return None
        if beta is None:
            raise PydanticKnownError("missing")
        return beta

    @field_validator("rescale")
    @classmethod
    def _normalize_rescale(cls, rescale: bool, info: ValidationInfo) -> bool:
        """The limits of JSD(beta) / (beta (1 - beta)) at 0 and 1 are the KLs that stand there already."""
        return rescale and info.data.get("beta") not in (None, 0, 1)

    @field_validator("square_temperature")
    @classmethod
    def _normalize_square_temperature(cls, squared: bool, info: ValidationInfo) -> bool:
        values = [info.data.get(name) or 1.0 for name in ("teacher_temperature", "student_temperature")]
        return squared and values[0] * values[1] != 1


class ResolvedDivergence(DivergenceFields):
    """A divergence whose teachers are numbered: 0 is the run's own, 1 and on are its `teachers`."""

    teachers: Annotated[tuple[NonNegativeInt, ...], DefaultFrom((0,))] = Field(default=(0,), min_length=1)
    routes: Annotated[tuple[str, ...] | None, DefaultFrom(None)] = Field(
        default=None, description="what the data calls these teachers, where each row has one of them"
    )


class CrossEntropyConfig(LossTerm):
    """-log q of the tokens that the data or the teacher wrote.

    Alone it is supervised fine-tuning, and sequence-level KD (Kim and Rush 2016) on the teacher's text. Of
    what the student wrote itself it teaches nothing.
    """

    type: Literal["cross_entropy"] = "cross_entropy"


class LayerTerm(LossTerm):
    """A distance between layers of student and teacher."""

    first: ClassVar[int] = 0
    """The lowest layer that a pair may name."""

    layers: LayerMapField = Field(
        default=UNIFORM,
        description="pairs [student's layer, teacher's layer], or a rule: `uniform`, evenly spaced; `last_k`",
    )
    stack: Literal["decoder", "encoder"] = Field(
        default="decoder", description="`encoder`: that of an encoder-decoder model"
    )


class HiddenStatesConfig(LayerTerm):
    """The student's hidden states drawn to the teacher's (PKD, Sun et al. 2019; TinyBERT, Jiao et al. 2020).

    Layer 0: the embeddings; n: after layer n. Where widths differ a projection is learnt along, which is no
    part of the student.
    """

    type: Literal["hidden_states"] = "hidden_states"
    loss: Literal["mse", "cosine"] = Field(
        default="mse", description="`cosine`: 1 - cos, which does not see lengths"
    )


class AttentionsConfig(LayerTerm):
    """The student's attention maps drawn to the teacher's (TinyBERT; MiniLM, Wang et al. 2020)."""

    first: ClassVar[int] = 1

    type: Literal["attentions"] = "attentions"
    loss: Literal["mse", "kl"] = Field(
        default="mse", description="`mse`: of the scores before the softmax; `kl`: of the maps"
    )


class RewardFields(Frozen):
    """What is rewarded, and what rewards are compared with."""

    name: str = Field(
        description="`exact_match`, `rouge2`, `rougeL` against the data's completion, `entailment` by a "
        "model, or your own function's import path, such as my_package.rewards:brevity"
    )
    model: str | None = Field(
        default=None, description="of `entailment`: a sequence-classification model, a folder or a hub name"
    )
    baseline: RewardBaseline = Field(
        default="leave_one_out", description="taken from a reward: the mean of the step's others, or nothing"
    )
    normalize: bool = Field(default=False, description="divide by the standard deviation of a step's rewards")


class RewardConfig(RewardFields, LossTerm):
    """A policy gradient towards what a function likes of the student's own text (Eq. 5), by REINFORCE.

    Of what others wrote it teaches nothing.
    """

    type: Literal["reward"] = "reward"


class ResolvedReward(RewardConfig):
    """A reward, known by content: its model at a revision, or its function's module."""

    path: Annotated[str | None, NotHashed()] = None
    revision: str | None = None
    content: str | None = Field(default=None, description="SHA-256 of the module that has the function")

    def reweight(self, weight: float) -> "ResolvedReward":
        """The same with another weight."""
        return self.model_copy(update={"weight": weight})


class AdversarialConfig(LossTerm):
    """A discriminator learns to tell the student from the teacher, and the student to pass for the teacher.

    The non-saturating game of Goodfellow et al. (2014), which goes on beside the other terms. The
    discriminator is no part of the student.
    """

    type: Literal["adversarial"] = "adversarial"
    reads: Literal["hidden_states", "sequences"] = Field(
        default="hidden_states",
        description="what is told apart: last hidden states, or distributions over tokens, in sequence",
    )
    gradient_penalty: NonNegativeFloat = Field(
        default=10.0, description="gamma of R1, zero-centred, on the teacher's side (Mescheder et al. 2018)"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="taken from the teacher's label 1 (Salimans et al. 2016)"
    )
    learning_rate: PositiveFloat = Field(
        default=1e-3, description="the discriminator's own, which follows the student's schedule"
    )
    width: PositiveInt = Field(default=64, description="of the discriminator's hidden layers")
    layers: PositiveInt = Field(default=2, description="hidden layers of the discriminator")


class DivergenceConfig(DivergenceFields):
    """A divergence as it is stated: temperatures may be those of the other settings, teachers have names."""

    teacher: str | tuple[str, ...] | None = Field(
        default=None,
        description="`teacher`, `start` (the student as it starts), one of `teachers`, or a list of them",
    )
    routed: bool = Field(
        default=False,
        description="each row has one of several teachers, which the data's column `teacher` names",
    )
    teacher_temperature: PositiveFloat | None = None  # type: ignore[assignment]
    student_temperature: PositiveFloat | None = None  # type: ignore[assignment]

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Of those that it compares with."""
        named = FIRST_TEACHER if self.teacher is None else self.teacher
        return (named,) if isinstance(named, str) else named

    def resolve(self, settings: Mapping[str, Any], teacher_numbers: Mapping[str, int]) -> ResolvedDivergence:
        """The whole objective, its teachers by number."""
        # A mixture of one is that one.
        single = {"mixture"} if len(self.teacher_names) == 1 else set()
        stated = self.model_dump(exclude_none=True, exclude={"teacher", "routed"} | single)
        names = ("teacher_temperature", "student_temperature")
        teachers = tuple(teacher_numbers[name] for name in self.teacher_names)
        known = {"teachers": teachers, "routes": self.teacher_names if self.routed else None}
        return ResolvedDivergence(**{**{name: settings[name] for name in names}, **stated, **known})


class ULDConfig(LossTerm):
    """Universal logit distillation, for a teacher with a tokenizer of its own (Boizard et al. 2024).

    The teacher reads the same text in its own tokens; probabilities are compared by size, the largest with
    the largest: L1. That says how sure the teacher is, not of what: put cross_entropy beside it.
    """

    type: Literal["uld"] = "uld"
    teacher_temperature: PositiveFloat = Field(default=1.0, description="divides the teacher's logits here")
    student_temperature: PositiveFloat = Field(default=1.0, description="divides the student's logits here")


class SquaredErrorConfig(LossTerm):
    """(student - teacher)^2 of a regression's number, or the mean of it over logits (Ba and Caruana 2014)."""

    type: Literal["squared_error"] = "squared_error"
    against: Literal["teacher", "labels"] = Field(
        default="teacher", description="`labels`: the data's own numbers, in a regression"
    )


NON_DIVERGENCE_TERMS: tuple[type[LossTerm], ...] = (
    CrossEntropyConfig,
    SquaredErrorConfig,
    ResolvedReward,
    HiddenStatesConfig,
    AttentionsConfig,
    AdversarialConfig,
    ULDConfig,
)
"""Every objective but the divergence; a new one is one more class, here and in the two unions."""


def _class_of(objective: Any, divergence: str) -> str:
    """Name of the class that describes an objective, for pydantic; a divergence may leave its type out."""
    said = objective if isinstance(objective, dict) else {"type": getattr(objective, "type", "divergence")}
    given = said.get("type", "divergence")
    known = {"divergence": divergence, **{term_type(other): other.__name__ for other in NON_DIVERGENCE_TERMS}}
    return known.get(given, given) if isinstance(given, str) else str(given)


def term_type(objective: type[LossTerm]) -> str:
    """The `type` of a class of objectives."""
    return str(objective.model_fields["type"].default)


def _resolved(objective: Any) -> str:
    return _class_of(objective, "ResolvedDivergence")


def _stated(objective: Any) -> str:
    name = _class_of(objective, "DivergenceConfig")
    return "RewardConfig" if name == "ResolvedReward" else name


AnyOther = (
    Annotated[CrossEntropyConfig, Tag("CrossEntropyConfig")]
    | Annotated[SquaredErrorConfig, Tag("SquaredErrorConfig")]
    | Annotated[HiddenStatesConfig, Tag("HiddenStatesConfig")]
    | Annotated[AttentionsConfig, Tag("AttentionsConfig")]
    | Annotated[AdversarialConfig, Tag("AdversarialConfig")]
    | Annotated[ULDConfig, Tag("ULDConfig")]
)
ResolvedTerm = Annotated[
    Annotated[ResolvedDivergence, Tag("ResolvedDivergence")]
    | AnyOther
    | Annotated[ResolvedReward, Tag("ResolvedReward")],
    Discriminator(_resolved),
]
TermConfig = Annotated[
    Annotated[DivergenceConfig, Tag("DivergenceConfig")]
    | AnyOther
    | Annotated[RewardConfig, Tag("RewardConfig")],
    Discriminator(_stated),
]
