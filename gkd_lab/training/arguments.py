"""GKDConfig: the arguments of TRL's trainer, with TRL's defaults, and the choices of the paper."""

import warnings
from dataclasses import dataclass, field
from typing import Any

from gkd_lab.config.loss_terms import DIVERGENCE_KINDS

with warnings.catch_warnings():
    # TRL warns that its experimental names may move; constraints.txt pins where they are.
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.gkd import GKDConfig as TrlGKDConfig

NORMALIZATIONS = ("token", "sequence")
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
            are comparable; the ends are unchanged.
        objectives: The terms of the loss, such as `[{"type": "divergence", "beta": 0.1, "weight": 1},
            {"type": "cross_entropy", "weight": 0.5}]`; a divergence takes the fields above as defaults.
            None: that one divergence. Each term is logged by itself.
        log_term_gradients: Log the norm of each term's gradient on a step's last micro-batch,
            `grad_norm/NAME`; it costs a forward and a backward pass a term, on the steps that are logged.
        teacher_model_revision: Branch, tag or commit of a teacher that is loaded by name, as in TRL's
            `DistillationConfig`.
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
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the hub."}
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
            ("divergence", DIVERGENCE_KINDS),
            ("teacher_dtype", (None, *TEACHER_DTYPES)),
            ("vllm_mode", ("colocate", "server")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {valid}")
