"""Estimate the cost of a training from its spec: FLOPs, and a nominal rate to convert them to seconds.

Counts 2 FLOPs per parameter and token forward and 4 backward, with sequences of the maximum length.
"""

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Training

NOMINAL_FLOPS_PER_SECOND = 80e9
"""Two CPU cores on nano models, overhead included: measured with the quickstart."""


def count_model_parameters(model: SftModel) -> int | None:
    """Return a scratch-made model's parameter count, tied embeddings once; None for a loaded model."""
    architecture = model.model.architecture
    if architecture is None:
        return None
    width = architecture.width
    attention, mlp = 4 * width * width, 3 * width * architecture.feed_forward
    layer = attention + mlp
    if model.family == "encoder-decoder":
        layer += 2 * attention + mlp
    return architecture.layers * layer + (model.tokenizer.vocab_size or 1024) * width


def estimate_sft_flops(model: SftModel, parameters: int | None = None) -> float | None:
    """Return the total FLOPs of a model's fine-tuning; 0.0 without it, None if its size is unknown.

    parameters: Needed for a loaded model; without them the result is None.
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
    """Return the total FLOPs of training one cell alone; None if a model's size is unknown.

    Student forward and backward, sampling, and teacher forward unless its scores are cached. With LoRA the
    backward pass computes no gradients of the frozen weights, which are half of it.
    """
    if student_parameters is None:
        student_parameters = count_model_parameters(training.start)
    if teacher_parameters is None:
        teacher_parameters = count_model_parameters(training.teacher)
    if student_parameters is None or teacher_parameters is None:
        return None
    tokens = training.max_input_tokens + training.max_output_tokens
    teacher_flops = 0 if training.teacher_scores else 2 * teacher_parameters
    sampling_flops = 2 * student_parameters * training.source.lmbda
    passes = 6 if training.lora is None else 4
    flops_per_token = passes * student_parameters + teacher_flops + sampling_flops
    return float(flops_per_token * tokens * training.batch_size * training.steps)
