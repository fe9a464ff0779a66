"""Estimate the cost of a training from its spec: FLOPs, and a nominal rate to convert them to seconds.

Counts 2 FLOPs per parameter and token forward and 4 backward, with sequences of the maximum length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Evaluation, Training

NOMINAL_FLOPS_PER_SECOND = 80e9
"""Two CPU cores on nano models, overhead included: measured with the quickstart."""
IMPORT_SECONDS = 10.0
"""Loading torch and the libraries on two CPU cores, where this machine has not measured its own yet."""
_ROWS_PER_BATCH = 64
"""Rows that are decoded together."""


@dataclass(frozen=True)
class DeviceRate:
    """Rate of the device that an estimate assumes at a scale."""

    name: str
    flops_per_second: float
    seconds_per_token: float = 0.0
    """Least time of one token of a batch that is written, whatever the size of the model."""
    is_gpu: bool = False


_CPU = DeviceRate(
    f"{NOMINAL_FLOPS_PER_SECOND / 1e9:.0f} GFLOP/s, two CPU cores on nano models", NOMINAL_FLOPS_PER_SECOND
)
# ours: 30 % of the peak is usual for T5-sized models; a step of `generate` starts about 1,000 kernels.
_GPU = DeviceRate(
    "94 TFLOP/s, 30 % of an A100's peak in bf16, and 5 ms for each token that a batch writes (assumed, not "
    "measured)",
    94e12,
    5e-3,
    is_gpu=True,
)


def get_device_rate(scale: str) -> DeviceRate:
    """Return the device that estimates at a scale assume: two CPU cores at nano, else one A100."""
    return _CPU if scale == "nano" else _GPU


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


def count_sequential_tokens(training: Training) -> float:
    """Return how many tokens a training's samples take one after the other: on-policy steps times length."""
    return training.source.lmbda * training.steps * training.max_output_tokens


def estimate_decoding_seconds(
    model: SftModel, evaluation: Evaluation, parameters: int | None, rate: DeviceRate
) -> float | None:
    """Return the seconds to decode an evaluation's rows, each to its full length.

    None if the size of the model or the number of rows is unknown.
    """
    rows = evaluation.examples or getattr(model.data, evaluation.split)
    if parameters is None or rows is None:
        return None
    texts = rows * (evaluation.num_beams or 1) * (evaluation.samples or 1)
    tokens = model.max_input_tokens + evaluation.max_output_tokens
    batches = math.ceil(rows / _ROWS_PER_BATCH) * (evaluation.samples or 1)
    sequential = batches * evaluation.max_output_tokens * rate.seconds_per_token
    return max(sequential, 2.0 * parameters * tokens * texts / rate.flops_per_second)
