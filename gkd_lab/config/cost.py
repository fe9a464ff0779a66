"""What a training costs, from its description alone: its FLOPs, and seconds at a nominal rate.

Counts 2 FLOPs per weight and token forward and 4 backward; sequences are taken at their longest.
"""

from gkd_lab.config.cell import Architecture, Family, SftModel, Training

NOMINAL_RATE = 80e9
"""FLOP/s of two CPU cores on nano models, overhead included: measured with the quickstart."""


def weights(architecture: Architecture, family: Family, vocab_size: int) -> int:
    """Parameters of a model made from scratch, tied embeddings counted once."""
    width, forward = architecture.width, architecture.feed_forward
    attention, mlp = 4 * width * width, 3 * width * forward
    stacks = attention + mlp
    if family == "encoder-decoder":
        stacks += 2 * attention + mlp
    return architecture.layers * stacks + vocab_size * width


def model_weights(model: SftModel) -> int | None:
    """Parameters; None for a model that is loaded."""
    architecture = model.model.architecture
    if architecture is None:
        return None
    return weights(architecture, model.family, model.tokenizer.vocab_size or 1024)


def sft_flops(model: SftModel, count: int | None = None) -> float | None:
    """Of building a teacher or a starting student; 0 without fine-tuning.

    `count`: its parameters, needed of a model that is loaded; None where they are not known.
    """
    count = model_weights(model) if count is None else count
    if model.sft is None:
        return 0.0
    if count is None:
        return None
    tokens = model.max_input_tokens + model.max_output_tokens
    return 6.0 * count * tokens * model.sft.batch_size * model.sft.steps


def training_flops(
    training: Training, student: int | None = None, teacher: int | None = None
) -> float | None:
    """Of one cell alone: student forward and backward, teacher forward unless its scores are kept, sampling.

    `student` and `teacher`: their parameters, as in `sft_flops`.
    """
    student = model_weights(training.start) if student is None else student
    teacher = model_weights(training.teacher) if teacher is None else teacher
    if student is None or teacher is None:
        return None
    tokens = training.max_input_tokens + training.max_output_tokens
    reads = 0 if training.teacher_scores else 2 * teacher
    per_token = 6 * student + reads + 2 * student * training.source.lmbda
    return float(per_token * tokens * training.batch_size * training.steps)
