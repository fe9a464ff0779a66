"""What a training costs, from its description alone: its FLOPs, and seconds at a nominal rate.

Counts 2 FLOPs per weight and token forward and 4 backward; sequences are taken at their longest.
"""

from gkd_lab.config.artifact_specs import Architecture, Family, SftModel
from gkd_lab.config.cell import Training

NOMINAL_FLOPS_PER_SECOND = 80e9
"""FLOP/s of two CPU cores on nano models, overhead included: measured with the quickstart."""


def count_architecture_parameters(architecture: Architecture, family: Family, vocab_size: int) -> int:
    """Parameters of a model made from scratch, tied embeddings counted once."""
    width, forward = architecture.width, architecture.feed_forward
    attention, mlp = 4 * width * width, 3 * width * forward
    stacks = attention + mlp
    if family == "encoder-decoder":
        stacks += 2 * attention + mlp
    return architecture.layers * stacks + vocab_size * width


def count_model_parameters(model: SftModel) -> int | None:
    """Parameters; None for a model that is loaded."""
    architecture = model.model.architecture
    if architecture is None:
        return None
    return count_architecture_parameters(architecture, model.family, model.tokenizer.vocab_size or 1024)


def estimate_sft_flops(model: SftModel, parameters: int | None = None) -> float | None:
    """Of building a teacher or a starting student; 0 without fine-tuning.

    `count`: its parameters, needed of a model that is loaded; None where they are not known.
    """
    parameters = count_model_parameters(model) if parameters is None else parameters
    if model.sft is None:
        return 0.0
    if parameters is None:
        return None
    tokens = model.max_input_tokens + model.max_output_tokens
    return 6.0 * parameters * tokens * model.sft.batch_size * model.sft.steps


def estimate_training_flops(
    training: Training, student_parameters: int | None = None, teacher_parameters: int | None = None
) -> float | None:
    """Of one cell alone: student forward and backward, teacher forward unless its scores are kept, sampling.

    `student` and `teacher`: their parameters, as in `sft_flops`.
    """
    student_parameters = (
        count_model_parameters(training.start) if student_parameters is None else student_parameters
    )
    teacher_parameters = (
        count_model_parameters(training.teacher) if teacher_parameters is None else teacher_parameters
    )
    if student_parameters is None or teacher_parameters is None:
        return None
    tokens = training.max_input_tokens + training.max_output_tokens
    reads = 0 if training.teacher_scores else 2 * teacher_parameters
    per_token = 6 * student_parameters + reads + 2 * student_parameters * training.source.lmbda
    return float(per_token * tokens * training.batch_size * training.steps)
