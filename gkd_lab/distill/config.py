"""Arguments of the trainer: TRL's, with TRL's defaults, and what the paper needs besides."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

with warnings.catch_warnings():
    # TRL warns that its experimental names may move; constraints.txt pins where they are.
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.gkd import GKDConfig as TrlGKDConfig

NORMALIZATIONS = ("token", "sequence")


@dataclass
class GKDConfig(TrlGKDConfig):
    """TRL's `GKDConfig` and the choices of the paper; every new field defaults to TRL's behaviour.

    Args:
        teacher_temperature: Divides the teacher's logits in the loss (paper, Tables A.1 to A.4).
        student_temperature: Divides the student's logits in the loss; 1 in the paper (§2).
        loss_normalization: `"sequence"`: mean over the tokens of a sequence, then over sequences (Eq. 2);
            `"token"`: mean over all tokens. Both count the tokens that are really trained on.
    """

    teacher_temperature: float = field(
        default=1.0, metadata={"help": "Divides the teacher's logits in the loss."}
    )
    student_temperature: float = field(
        default=1.0, metadata={"help": "Divides the student's logits in the loss."}
    )
    loss_normalization: str = field(
        default="token", metadata={"help": "`sequence` (Eq. 2 of the paper) or `token`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "teacher_temperature", "student_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.loss_normalization not in NORMALIZATIONS:
            raise ValueError(f"loss_normalization {self.loss_normalization!r} is not one of {NORMALIZATIONS}")


@dataclass(frozen=True)
class CellArguments:
    """What may differ between the cells of a pack; everything else is common to them."""

    lmbda: float
    beta: float
    seed: int
    temperature: float
    teacher_temperature: float
    student_temperature: float
    learning_rate: float
    output_dir: str
    """Where the cell's own checkpoints go."""

    @classmethod
    def of(cls, args: GKDConfig) -> "CellArguments":
        """The one cell that plain arguments describe."""
        seed = args.seed if args.data_seed is None else args.data_seed
        own: dict[str, Any] = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        return cls(**{**own, "seed": seed})


def shared_seeds(cells: Sequence[CellArguments]) -> list[int]:
    """The distinct seeds of a pack, in order of first appearance."""
    return list(dict.fromkeys(cell.seed for cell in cells))
