"""Arguments that may differ between the cells of one pack: lmbda, loss, seed, temperatures, learning rate."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gkd_lab.config.reward_names import check_reward_sampling, format_off_policy_message
from gkd_lab.losses.build_terms import parse_terms
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.label_losses import RewardLoss
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses, zero_inapplicable_terms


@dataclass(frozen=True)
class CellArguments:
    """Arguments of one cell of a pack; all others are common to its cells."""

    lmbda: float
    beta: float
    seed: int
    temperature: float
    teacher_temperature: float
    student_temperature: float
    learning_rate: float
    output_dir: str
    """Folder of the cell's checkpoints."""
    divergence: str = "jsd"
    rescale_divergence: bool = False
    objectives: WeightedLosses = ()
    """Terms of the loss; empty: the divergence that the fields above describe."""

    def __post_init__(self) -> None:
        if self.lmbda > 0 and not any(term.is_applicable(on_policy=True) for term in self.list_terms()):
            raise ValueError(
                f"lmbda {self.lmbda} lets the student write, and cross-entropy has nothing to teach of its "
                "own text: set lmbda to 0, or add a divergence"
            )
        if any(isinstance(term.loss, RewardLoss) for term in self.list_terms()):
            self._check_reward_sampling()

    def _check_reward_sampling(self) -> None:
        """Raise ValueError unless the student samples at temperature 1 and off-policy steps have a term."""
        check_reward_sampling(self.lmbda, self.temperature)
        if self.lmbda < 1 and not any(term.is_applicable(on_policy=False) for term in self.list_terms()):
            raise ValueError(format_off_policy_message(self.lmbda))

    @classmethod
    def build(cls, args: Any) -> "CellArguments":
        """Return the one cell that a `GKDConfig` describes; its seed is `data_seed`, if set, or `seed`.

        Raises ConfigError for an invalid term.
        """
        seed = args.seed if args.data_seed is None else args.data_seed
        fields: dict[str, Any] = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        objectives = json.loads(args.objectives) if isinstance(args.objectives, str) else args.objectives
        defaults = {
            "divergence": args.divergence,
            "beta": args.beta,
            "rescale": args.rescale_divergence,
            "teacher_temperature": args.teacher_temperature,
            "student_temperature": args.student_temperature,
        }
        return cls(**{**fields, "seed": seed, "objectives": parse_terms(objectives or (), defaults)})

    def list_terms(self, *, on_policy: bool = False, progress: float = 0.0) -> WeightedLosses:
        """Return the loss's terms with their weights at this progress, 0 for those that do not apply.

        on_policy: whether the text is the student's own, from which cross-entropy, for one, learns nothing.
        progress: share of the steps that are finished. Without `objectives` the only term is the divergence.
        """
        terms = self.objectives or (WeightedLoss(self.build_divergence()),)
        weighted = tuple(term.interpolate_weight(progress) for term in terms)
        return zero_inapplicable_terms(weighted, on_policy=on_policy)

    def build_divergence(self) -> Divergence:
        """Return the divergence that the fields besides `objectives` describe, without a weight."""
        return Divergence(
            kind=self.divergence,  # type: ignore[arg-type]
            beta=self.beta,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            rescale=self.rescale_divergence,
        )


def distinct_seeds(cells: Sequence[CellArguments]) -> list[int]:
    """Return the cells' distinct seeds, in order of first appearance."""
    return list(dict.fromkeys(cell.seed for cell in cells))
