"""Arguments of the trainer: TRL's, with TRL's defaults, and what the paper needs besides."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gkd_lab.distill.divergence import Divergence
from gkd_lab.distill.objectives import PolicyGradient, Term, Terms, parsed, where_they_apply
from gkd_lab.spec.rewards import check_sampling, nothing_off_policy

with warnings.catch_warnings():
    # TRL warns that its experimental names may move; constraints.txt pins where they are.
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.gkd import GKDConfig as TrlGKDConfig

NORMALIZATIONS = ("token", "sequence")
DIVERGENCES = ("jsd", "tv")
TEACHER_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class GKDConfig(TrlGKDConfig):
    """TRL's `GKDConfig` and the choices of the paper; every new field defaults to TRL's behaviour.

    Args:
        teacher_temperature: Divides the teacher's logits in the loss (paper, Tables A.1 to A.4).
        student_temperature: Divides the student's logits in the loss; 1 in the paper (section 2).
        loss_normalization: `"sequence"`: mean over the tokens of a sequence, then over sequences (Eq. 2);
            `"token"`: mean over all tokens. Both count the tokens that are really trained on.
        divergence: `"jsd"`: JSD(beta) with the two KLs at its ends (Eq. 1); `"tv"`: total variation, which
            has no beta.
        rescale_divergence: Divide JSD(beta) by beta (1 - beta), so that losses and gradients of all betas
            compare; the ends are unchanged.
        objectives: What the loss is made of, such as `[{"type": "divergence", "beta": 0.1, "weight": 1},
            {"type": "cross_entropy", "weight": 0.5}]`; what a divergence leaves out is that of the fields
            above. None: that one divergence. Each term is logged by itself.
        log_term_gradients: Log the norm of each term's gradient on a step's last micro-batch,
            `grad_norm/NAME`; it costs a forward and a backward pass a term, on the steps that are logged.
        teacher_dtype: Dtype of the teacher's weights; None leaves them as they are.
        park_teacher: Keep the teacher on the CPU while the student trains and samples.
        eval_on_policy: `evaluate` also lets the student write, and reports the loss on that.
        use_vllm: Sample with vLLM instead of transformers' `generate`. The `vllm_*` fields are those of
            TRL's `DistillationConfig`.
        max_seq_length: Deprecated name of `max_length`.
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
    divergence: str = field(default="jsd", metadata={"help": "`jsd` (Eq. 1) or `tv`, total variation."})
    rescale_divergence: bool = field(
        default=False, metadata={"help": "Divide JSD(beta) by beta (1 - beta), so that betas compare."}
    )
    objectives: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "The terms of the loss with their weights, as JSON."}
    )
    log_term_gradients: bool = field(
        default=False, metadata={"help": "Log the norm of each term's gradient."}
    )
    teacher_dtype: str | None = field(
        default=None, metadata={"help": "Dtype of the teacher's weights, such as `bfloat16`."}
    )
    park_teacher: bool = field(
        default=False, metadata={"help": "Keep the teacher on the CPU between its uses."}
    )
    eval_on_policy: bool = field(
        default=False, metadata={"help": "Let `evaluate` report the loss on the student's own text too."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM."})
    vllm_mode: str = field(default="colocate", metadata={"help": "`colocate` or `server`."})
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Address of the vLLM server."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the server."})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "Share of the GPU's memory."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share one vLLM model."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Longest sequence of vLLM."})
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Let vLLM give its memory back while the student trains."}
    )
    max_seq_length: int | None = field(default=None, metadata={"help": "Deprecated: use `max_length`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seq_length is not None:
            warnings.warn("max_seq_length is deprecated: use max_length", FutureWarning, stacklevel=3)
            self.max_length, self.max_seq_length = self.max_seq_length, None
        for name in ("temperature", "teacher_temperature", "student_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name, valid in (
            ("loss_normalization", NORMALIZATIONS),
            ("divergence", DIVERGENCES),
            ("teacher_dtype", (None, *TEACHER_DTYPES)),
            ("vllm_mode", ("colocate", "server")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {valid}")


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
    divergence: str = "jsd"
    rescale_divergence: bool = False
    objectives: Terms = ()
    """What the loss is made of; empty: the divergence that the fields above describe."""

    def __post_init__(self) -> None:
        if self.lmbda > 0 and not any(term.applies(on_policy=True) for term in self.terms()):
            raise ValueError(
                f"lmbda {self.lmbda} lets the student write, and cross-entropy has nothing to teach of its "
                "own text: set lmbda to 0, or add a divergence"
            )
        if any(isinstance(term.measure, PolicyGradient) for term in self.terms()):
            self._check_reward()

    def _check_reward(self) -> None:
        """A reward is of what the student samples, by the very distribution that it is trained as."""
        check_sampling(self.lmbda, self.temperature)
        if self.lmbda < 1 and not any(term.applies(on_policy=False) for term in self.terms()):
            raise ValueError(nothing_off_policy(self.lmbda))

    @classmethod
    def of(cls, args: GKDConfig) -> "CellArguments":
        """The one cell that plain arguments describe."""
        seed = args.seed if args.data_seed is None else args.data_seed
        own: dict[str, Any] = {name: getattr(args, name) for name in cls.__dataclass_fields__}
        plain = cls(**{**own, "lmbda": 0.0, "seed": seed, "objectives": ()})
        asked = args.objectives
        listed = json.loads(asked) if isinstance(asked, str) else asked or []
        return replace(plain, lmbda=args.lmbda, objectives=parsed(listed, plain.measure()))

    def terms(self, *, on_policy: bool = False, progress: float = 0.0) -> Terms:
        """The terms of the loss after a share of the steps.

        What teaches nothing of this text has the weight 0, as cross-entropy of what the student wrote itself.
        """
        own = tuple(term.at(progress) for term in self.objectives) or (Term(self.measure()),)
        return where_they_apply(own, on_policy=on_policy)

    def measure(self) -> Divergence:
        """The divergence that the cell's own fields describe."""
        return Divergence(
            kind=self.divergence,  # type: ignore[arg-type]
            beta=self.beta,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            rescale=self.rescale_divergence,
        )


def shared_seeds(cells: Sequence[CellArguments]) -> list[int]:
    """The distinct seeds of a pack, in order of first appearance."""
    return list(dict.fromkeys(cell.seed for cell in cells))
