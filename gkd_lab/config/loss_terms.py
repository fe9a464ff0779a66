"""Terms of a loss: one description and validation for YAML, `GKDConfig(objectives=...)` and the trainer.

`gkd_lab.config.loss_registry` maps each `type` to the loss that computes it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError, PydanticKnownError

from gkd_lab.config.errors import ConfigError
from gkd_lab.config.fingerprint import DefaultFrom, Frozen, NotHashed
from gkd_lab.config.layer_maps import UNIFORM, LayerMapField
from gkd_lab.config.loss_registry import LOSSES, load_loss_class
from gkd_lab.config.reward_names import check_reward_baseline, check_reward_model, check_reward_name

Share = Annotated[float, Field(ge=0, le=1)]
DivergenceKind = Literal["jsd", "tv"]
DIVERGENCE_KINDS: tuple[DivergenceKind, ...] = get_args(DivergenceKind)
NAMES_WITHOUT_BETA: Mapping[str, str] = {"tv": "total variation"}
"""Readable names of the kinds that have no beta; those of the others are made from beta."""
FIRST_TEACHER = "teacher"
"""Name of the run's main teacher, number 0."""
RewardBaseline = Literal["leave_one_out", "none"]


class WeightedTerm(Frozen):
    """Weight of a term in the loss."""

    weight: NonNegativeFloat = 1.0
    final_weight: Annotated[NonNegativeFloat | None, DefaultFrom(None)] = Field(
        default=None, description="to which the weight moves linearly; null: it stays"
    )

    @field_validator("final_weight")
    @classmethod
    def _normalize_final_weight(cls, final_weight: float | None, info: ValidationInfo) -> float | None:
        """Return `final_weight`, but None where the weight stays what it is."""
        return None if final_weight == info.data.get("weight") else final_weight


class LossTerm(WeightedTerm):
    """Base class of all terms that are no divergence; a subclass adds its `type` and its settings."""

    type: str

    @property
    def beta(self) -> None:
        """None: only divergences have a beta."""

    @property
    def divergence(self) -> str:
        """The term's type, which tables show in the column of divergences."""
        return self.type


class DivergenceFields(WeightedTerm):
    """A divergence between teacher and student, token by token (Eq. 2).

    `jsd` is JSD(beta), the two KLs at its ends (Eq. 1); `tv` is total variation, half the sum of |p - q|,
    with which f-distill trains (Wen et al. 2023; Fig. 2). Settings that a divergence does not read are
    reset to one value, so that terms that compute the same are equal.
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

    @field_validator("beta")
    @classmethod
    def _normalize_beta(cls, beta: float | None, info: ValidationInfo) -> float | None:
        """Return beta, but None for `tv`, which has none; a missing beta of `jsd` is an error."""
        if info.data.get("divergence") in NAMES_WITHOUT_BETA:
            return None
        if beta is None:
            raise PydanticKnownError("missing")
        return beta

    @field_validator("rescale")
    @classmethod
    def _normalize_rescale(cls, rescale: bool, info: ValidationInfo) -> bool:
        """Return `rescale`, but False at beta 0 and 1, where rescaled JSD(beta) tends to the KLs anyway."""
        return rescale and info.data.get("beta") not in (None, 0, 1)

    @field_validator("square_temperature")
    @classmethod
    def _normalize_square_temperature(cls, squared: bool, info: ValidationInfo) -> bool:
        """Return `square_temperature`, but False where the product of the temperatures is 1."""
        values = [info.data.get(name) or 1.0 for name in ("teacher_temperature", "student_temperature")]
        return squared and values[0] * values[1] != 1


class ResolvedDivergence(DivergenceFields):
    """A divergence as records store it: teachers by number, 0 the run's own, 1 and on its `teachers`."""

    teachers: Annotated[tuple[NonNegativeInt, ...], DefaultFrom((0,))] = Field(default=(0,), min_length=1)
    mixture: Annotated[tuple[PositiveFloat, ...] | None, DefaultFrom(None)] = Field(
        default=None, description="the teachers' `weights`; null: all alike"
    )
    mixture_temperatures: Annotated[tuple[PositiveFloat, ...] | None, DefaultFrom(None)] = Field(
        default=None, description="the teachers' `temperatures`; null: 1"
    )
    routes: Annotated[tuple[str, ...] | None, DefaultFrom(None)] = Field(
        default=None, description="names of these teachers in the data, where each row has one of them"
    )

    @field_validator("mixture")
    @classmethod
    def _normalize_mixture(cls, weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
        """Return the weights, but None where all are alike."""
        is_even = weights is not None and max(weights) - min(weights) <= 1e-6 / len(weights)
        return None if is_even else weights

    @field_validator("mixture_temperatures")
    @classmethod
    def _normalize_mixture_temperatures(
        cls, temperatures: tuple[float, ...] | None
    ) -> tuple[float, ...] | None:
        """Return the temperatures, but None where all are 1."""
        return None if temperatures is not None and set(temperatures) == {1.0} else temperatures


class DivergenceConfig(DivergenceFields):
    """A divergence as a user states it: temperatures default to the settings beside it."""

    teachers: str | int | tuple[str | int, ...] | None = Field(
        default=None,
        description="`teacher`, `start` (the student as it starts), one of the experiment's `teachers`, or a "
        "list of them; in `GKDConfig` their numbers",
    )
    weights: tuple[PositiveFloat, ...] | None = Field(
        default=None,
        description="weights of several teachers' probabilities, which sum to 1; null: all alike",
    )
    temperatures: tuple[PositiveFloat, ...] | None = Field(
        default=None, description="of each of several teachers, before they are mixed; null: 1"
    )
    routed: bool = Field(
        default=False,
        description="each row has one of several teachers, which the data's column `teacher` names",
    )
    teacher_temperature: PositiveFloat | None = None  # type: ignore[assignment]
    student_temperature: PositiveFloat | None = None  # type: ignore[assignment]

    _OLD_NAMES: ClassVar[Mapping[str, str]] = {
        "teacher": "teachers",
        "mixture": "weights",
        "mixture_temperatures": "temperatures",
    }

    @model_validator(mode="before")
    @classmethod
    def _rename_old_fields(cls, fields: Any) -> Any:
        """Return the fields with older names replaced; an error if both names of a field are given."""
        if not isinstance(fields, dict):
            return fields
        for old, new in cls._OLD_NAMES.items():
            if old in fields and new in fields:
                raise _build_pydantic_error(f"{old} is the older name of {new}: leave it out")
        return {cls._OLD_NAMES.get(name, name): value for name, value in fields.items()}

    @model_validator(mode="after")
    def _check_teachers(self) -> "DivergenceConfig":
        """Raise a pydantic error unless teachers, weights, temperatures and routing fit together."""
        names, weights = self.teacher_names, self.weights
        if not names:
            raise _build_pydantic_error(
                "teachers []: name at least one, or leave `teachers` out for the run's own"
            )
        if len(set(names)) < len(names):
            raise _build_pydantic_error(f"teachers {list(names)} names a teacher twice")
        for field in ("weights", "temperatures"):
            values = getattr(self, field)
            if values and len(values) != len(names):
                raise _build_pydantic_error(
                    f"{len(values)} {field} for {len(names)} teachers: give one of each"
                )
        if weights and abs(sum(weights) - 1) > 1e-6:
            raise _build_pydantic_error(f"weights {list(weights)} must sum to 1, not {sum(weights):g}")
        if self.routed and (len(names) == 1 or weights):
            raise _build_pydantic_error(
                "routed takes one of several teachers for each row: list them in `teachers`, and leave "
                "`weights` out"
            )
        return self

    @property
    def teacher_names(self) -> tuple[str | int, ...]:
        """The teachers that it compares with, always a tuple; by default the run's own, `teacher`."""
        teachers = FIRST_TEACHER if self.teachers is None else self.teachers
        return teachers if isinstance(teachers, tuple) else (teachers,)

    def resolve(
        self, settings: Mapping[str, Any], teacher_numbers: Mapping[str | int, int]
    ) -> ResolvedDivergence:
        """Return the ResolvedDivergence; `settings` has the temperatures that it does not state."""
        names = self.teacher_names
        stated = self.model_dump(include=set(DivergenceFields.model_fields), exclude_none=True)
        temperatures = {name: settings[name] for name in ("teacher_temperature", "student_temperature")}
        return ResolvedDivergence(
            **{**temperatures, **stated},
            teachers=tuple(teacher_numbers[name] for name in names),
            mixture=self.weights if len(names) > 1 else None,  # a mixture of one is that one
            mixture_temperatures=self.temperatures,
            routes=tuple(map(str, names)) if self.routed else None,
        )


class CrossEntropyConfig(LossTerm):
    """-log q of the tokens that the dataset has or the teacher wrote.

    Alone it is supervised fine-tuning, and sequence-level KD (Kim and Rush 2016) on the teacher's text. Its
    weight is 0 on text that the student sampled.
    """

    type: Literal["cross_entropy"] = "cross_entropy"


class LayerTerm(LossTerm):
    """A distance between layers of student and teacher."""

    first: ClassVar[int] = 0
    """The lowest layer that a pair may contain."""

    layers: LayerMapField = Field(
        default=UNIFORM,
        description="pairs [student's layer, teacher's layer], or a rule: `uniform`, evenly spaced; `last_k`",
    )
    stack: Literal["decoder", "encoder"] = Field(
        default="decoder", description="`encoder`: that of an encoder-decoder model"
    )


class HiddenStatesConfig(LayerTerm):
    """Distance between hidden states (PKD, Sun et al. 2019; TinyBERT, Jiao et al. 2020).

    Layer 0: the embeddings; n: the output of layer n. Where widths differ, a projection is learnt, which is
    not part of the exported student.
    """

    type: Literal["hidden_states"] = "hidden_states"
    loss: Literal["mse", "cosine"] = Field(
        default="mse", description="`cosine`: 1 - cos, which ignores lengths"
    )


class AttentionsConfig(LayerTerm):
    """Distance between attention maps (TinyBERT; MiniLM, Wang et al. 2020)."""

    first: ClassVar[int] = 1

    type: Literal["attentions"] = "attentions"
    loss: Literal["mse", "kl"] = Field(
        default="mse", description="`mse`: of the scores before the softmax; `kl`: of the maps"
    )


class RewardFields(Frozen):
    """A reward and its baseline."""

    name: str = Field(
        description="`exact_match`, `rouge2`, `rougeL` against the data's completion, `entailment` by a "
        "model, or your own function's import path, such as my_package.rewards:brevity"
    )
    model: str | None = Field(
        default=None, description="of `entailment`: a sequence-classification model, a folder or a hub name"
    )
    revision: str | None = Field(default=None, description="of `model` on the hub; null: its newest")
    baseline: RewardBaseline = Field(
        default="leave_one_out",
        description="subtracted from a reward: the mean of the step's other rewards, or nothing",
    )
    normalize: bool = Field(default=False, description="divide by the standard deviation of a step's rewards")


class RewardConfig(RewardFields, LossTerm):
    """A policy gradient that increases a reward of the student's own text (Eq. 5), by REINFORCE.

    On text that the student did not sample its gradient is zero.
    """

    type: Literal["reward"] = "reward"

    @model_validator(mode="after")
    def _check_reward(self) -> "RewardConfig":
        """Raise a pydantic error for an unknown reward name, or a model or baseline that does not fit."""
        try:
            check_reward_name(self.name)
            check_reward_model(self.name, self.model)
            check_reward_baseline(self.baseline, self.normalize)
        except ConfigError as error:
            raise _build_pydantic_error(str(error)) from error
        return self


class ResolvedReward(RewardFields, LossTerm):
    """A reward as records store it, with the revision of its model and the hash of its function's module."""

    type: Literal["reward"] = "reward"
    path: Annotated[str | None, NotHashed()] = None
    content: str | None = Field(default=None, description="SHA-256 of the module that has the function")

    def reweight(self, weight: float) -> "ResolvedReward":
        """Return a copy of the reward with another weight."""
        return self.model_copy(update={"weight": weight})


class AdversarialConfig(LossTerm):
    """A discriminator learns to tell the student from the teacher, and the student learns to mislead it.

    The non-saturating game of Goodfellow et al. (2014), beside the other terms. The discriminator is not part
    of the exported student.
    """

    type: Literal["adversarial"] = "adversarial"
    reads: Literal["hidden_states", "sequences"] = Field(
        default="hidden_states",
        description="input of the discriminator: last hidden states, or distributions over tokens",
    )
    gradient_penalty: NonNegativeFloat = Field(
        default=10.0, description="gamma of R1, zero-centred, on the teacher's side (Mescheder et al. 2018)"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="subtracted from the teacher's label 1 (Salimans et al. 2016)"
    )
    learning_rate: PositiveFloat = Field(
        default=1e-3, description="of the discriminator, before the student's schedule"
    )
    width: PositiveInt = Field(default=64, description="of the discriminator's hidden layers")
    layers: PositiveInt = Field(default=2, description="hidden layers of the discriminator")


class ULDConfig(LossTerm):
    """Universal logit distillation, for a teacher with another tokenizer (Boizard et al. 2024).

    The teacher reads the same text in its own tokens; the sorted probabilities are compared by L1. They tell
    how sure the teacher is, not of which token: put cross_entropy beside it.
    """

    type: Literal["uld"] = "uld"
    teacher_temperature: PositiveFloat = Field(default=1.0, description="divides the teacher's logits")
    student_temperature: PositiveFloat = Field(default=1.0, description="divides the student's logits")


class SquaredErrorConfig(LossTerm):
    """(student - teacher)^2 of a regression's output, or its mean over logits (Ba and Caruana 2014)."""

    type: Literal["squared_error"] = "squared_error"
    against: Literal["teacher", "labels"] = Field(
        default="teacher", description="`labels`: the dataset's numbers, for a regression"
    )


TERMS_WITHOUT_REFERENCES = (
    CrossEntropyConfig,
    SquaredErrorConfig,
    HiddenStatesConfig,
    AttentionsConfig,
    AdversarialConfig,
    ULDConfig,
)
"""Terms that refer to no teacher and to no model, so that records store them as they are stated."""


def get_term_type(term_class: type[WeightedTerm]) -> str:
    """Return the `type` string that names a class of terms, such as `cross_entropy`."""
    return str(term_class.model_fields["type"].default)


def find_added_term(term_type: object) -> type[LossTerm] | None:
    """Return the config class of a loss type in `LOSSES`, imported (with torch); None for another type."""
    if not isinstance(term_type, str) or term_type not in LOSSES:
        return None
    term_class: type[LossTerm] = load_loss_class(term_type).config_class
    return term_class


def _validate_added_term(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Return a registered loss's term, validated by its config class; a LossTerm is returned as it is."""
    if isinstance(value, LossTerm):
        return value
    term_class = find_added_term(value["type"])
    assert term_class is not None, "the discriminator has found it"
    return term_class.model_validate(value)


def _build_union(*term_classes: type[WeightedTerm]) -> Any:
    """Return a pydantic union of these classes and registered terms, by `type`, default a divergence."""
    names = {get_term_type(term_class): term_class.__name__ for term_class in term_classes}

    def find_tag(term: Any) -> str:
        """Return the class name of a term's union member, by `type`; an unknown type is returned as it is."""
        fields = term if isinstance(term, dict) else {"type": getattr(term, "type", "divergence")}
        term_type = fields.get("type", "divergence")
        if isinstance(term_type, str) and term_type in names:
            return names[term_type]
        return str(term_type) if find_added_term(term_type) is None else LossTerm.__name__

    added_term = SkipJsonSchema[Annotated[SerializeAsAny[LossTerm], WrapValidator(_validate_added_term)]]
    members = [Annotated[term_class, Tag(term_class.__name__)] for term_class in term_classes]
    members.append(Annotated[added_term, Tag(LossTerm.__name__)])
    return Annotated[Union[tuple(members)], Discriminator(find_tag)]  # noqa: UP007


if TYPE_CHECKING:
    TermConfig = DivergenceConfig | LossTerm
    ResolvedTerm = ResolvedDivergence | LossTerm
else:
    TermConfig = _build_union(DivergenceConfig, *TERMS_WITHOUT_REFERENCES, RewardConfig)
    """A term as YAML and `GKDConfig` state it."""
    ResolvedTerm = _build_union(ResolvedDivergence, *TERMS_WITHOUT_REFERENCES, ResolvedReward)
    """A term as records store it and losses are built from it."""


def _build_pydantic_error(message: str) -> PydanticCustomError:
    """Return (not raise) a pydantic error with a message that `explain_validation_error` shows unchanged."""
    return PydanticCustomError("config", "{reason}", {"reason": message})
