"""The terms of a loss, as an experiment describes them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticKnownError

from gkd_lab.spec.identity import Frozen, Since

Share = Annotated[float, Field(ge=0, le=1)]
Divergence = Literal["jsd", "tv"]


class Weighted(Frozen):
    """A term of the loss and its weight."""

    weight: NonNegativeFloat = 1.0
    final_weight: Annotated[NonNegativeFloat | None, Since(None)] = Field(
        default=None, description="to which the weight moves linearly; null: it stays"
    )


class Other(Weighted):
    """A term that is no divergence; its type stands in the place of one."""

    @property
    def beta(self) -> None:
        """It has none."""

    @property
    def divergence(self) -> str:
        """Its type."""
        return str(self.type)  # type: ignore[attr-defined]


class Objective(Weighted):
    """A divergence between teacher and student, token by token (Eq. 2).

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


class CrossEntropyObjective(Other):
    """-log q of the tokens that the data or the teacher wrote.

    Alone it is supervised fine-tuning, and sequence-level KD (Kim and Rush 2016) on the teacher's text. Of
    what the student wrote itself it teaches nothing.
    """

    type: Literal["cross_entropy"] = "cross_entropy"


class Divergent(Objective):
    """A divergence as it is stated: its temperatures may be those of the other settings."""

    teacher_temperature: PositiveFloat | None = None  # type: ignore[assignment]
    student_temperature: PositiveFloat | None = None  # type: ignore[assignment]

    def filled(self, settings: Mapping[str, Any]) -> Objective:
        """The whole objective."""
        stated = self.model_dump(exclude_none=True)
        names = ("teacher_temperature", "student_temperature")
        return Objective(**{**{name: settings[name] for name in names}, **stated})


OTHERS: tuple[type[Other], ...] = (CrossEntropyObjective,)
"""Every objective but the divergence; a new one is one more class, here and in the two unions."""


def _class_of(objective: Any, divergence: str) -> str:
    """Name of the class that describes an objective, for pydantic; a divergence may leave its type out."""
    given = objective.get("type") if isinstance(objective, dict) else getattr(objective, "type", None)
    known = {"divergence": divergence, **{kind_of(other): other.__name__ for other in OTHERS}}
    return known.get(given or "divergence", str(given))


def kind_of(objective: type[Other]) -> str:
    """The `type` of a class of objectives."""
    return str(objective.model_fields["type"].default)


def _resolved(objective: Any) -> str:
    return _class_of(objective, "Objective")


def _stated(objective: Any) -> str:
    return _class_of(objective, "Divergent")


AnyOther = Annotated[CrossEntropyObjective, Tag("CrossEntropyObjective")]
AnyObjective = Annotated[Annotated[Objective, Tag("Objective")] | AnyOther, Discriminator(_resolved)]
AnyObjectiveSettings = Annotated[Annotated[Divergent, Tag("Divergent")] | AnyOther, Discriminator(_stated)]
