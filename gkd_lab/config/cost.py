"""Estimate the cost of a training from its spec: FLOPs, and a nominal rate to convert them to seconds.

Counts 2 FLOPs per parameter and token forward and 4 backward, with sequences of the maximum length.
"""

from collections.abc import Mapping

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Training

NOMINAL_FLOPS_PER_SECOND = 80e9
"""Two CPU cores on nano models, overhead included: measured with the quickstart."""


_T5_SIZES = {"small": 60_506_624, "base": 222_903_552, "large": 737_668_096, "3b": 2_851_598_336}
_T5_V1_1_SIZES = {"small": 76_961_152, "base": 247_577_856, "large": 783_150_080, "xl": 2_849_757_184}
KNOWN_SIZES: Mapping[str, int] = {
    **{f"google-t5/t5-{size}": count for size, count in _T5_SIZES.items()},
    **{
        name.format(size): count
        for size, count in _T5_V1_1_SIZES.items()
        for name in ("google/t5-v1_1-{}", "google/t5-{}-lm-adapt", "google/flan-t5-{}")
    },
}
"""Hub name -> number of parameters: the T5s of Raffel et al. (2020), version 1.1, LM-adapted, and FLAN-T5."""


def count_model_parameters(model: SftModel) -> int | None:
    """Return the parameter count of a model made from scratch, tied embeddings once, or of a standard T5.

    None for any other loaded model.
    """
    architecture = model.model.architecture
    if architecture is None:
        is_whole = model.model.keep_layers is None
        return KNOWN_SIZES.get(model.model.pretrained or "") if is_whole else None
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
