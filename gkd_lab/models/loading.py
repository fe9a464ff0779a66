"""Student and teacher as the trainer gets them: a model, a name, or nothing. The teacher comes out frozen."""

import copy
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled

from gkd_lab.models.classifiers import get_classifier_auto_class, get_classifier_kind
from gkd_lab.models.forward import unwrap_model
from gkd_lab.models.heads import mark_untied_head
from gkd_lab.models.sharding import is_quantized

InitKwargs = Mapping[str, Any] | str | None
TEACHER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILE_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
"""Arguments of `from_pretrained` that say which files are meant, and so hold for the configuration too."""


def load_teacher(
    teacher_model: PreTrainedModel | nn.Module | str | None,
    *,
    name_or_path: str | None,
    init_kwargs: InitKwargs,
    student: PreTrainedModel,
    dtype: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The teacher in eval mode, without gradients, its weights in `dtype` (None: as they are).

    Args:
        teacher_model: A model, which is frozen and cast in place, or a name. None: `name_or_path`, and
            without that a copy of `student` as it is now, with a warning.
        init_kwargs: For `from_pretrained`, with a name only; never changed. A quantized teacher
            (`quantization_config`) keeps its weights' types.

    Raises:
        ValueError: for `init_kwargs` without a name, two dtypes, and a teacher that is no transformers model
            or of another family (encoder-decoder or decoder-only) than the student.
    """
    wanted = name_or_path if teacher_model is None else teacher_model
    if isinstance(wanted, str):
        teacher = load_auto_model(
            wanted, _merge_dtype(init_kwargs, dtype), trust_remote_code=trust_remote_code
        )
    elif init_kwargs:
        raise ValueError(
            f"teacher_model_init_kwargs {init_kwargs!r} can only be used when the teacher is loaded by name, "
            f"but it is {'a copy of the student' if wanted is None else 'already a model'}: drop them"
        )
    else:
        teacher = _copy_student(student) if wanted is None or wanted is student else wanted
        teacher = teacher if dtype is None or is_quantized(teacher) else teacher.to(TEACHER_DTYPES[dtype])
    _check_same_family(student, teacher)
    return teacher.eval().requires_grad_(False)


def load_student(
    model: PreTrainedModel | str, *, init_kwargs: InitKwargs, trust_remote_code: bool
) -> PreTrainedModel:
    """The student; loaded by name its weights are float32 unless `init_kwargs` say otherwise, as in TRL."""
    if isinstance(model, str):
        kwargs = {"dtype": "float32", **_parse_init_kwargs(init_kwargs)}
        return load_auto_model(model, kwargs, trust_remote_code=trust_remote_code)
    if init_kwargs:
        warnings.warn(
            f"model_init_kwargs {init_kwargs!r} are ignored: the student is already a model", stacklevel=2
        )
    return model


def load_auto_model(name: str, init_kwargs: InitKwargs, *, trust_remote_code: bool) -> PreTrainedModel:
    """`from_pretrained` of the class that the configuration of `name` asks for, in either family, or of the
    classifier that its configuration names.

    `dtype` in `init_kwargs` may be a torch.dtype, its name, "auto" or None.
    """
    kwargs = {"trust_remote_code": trust_remote_code, **_parse_init_kwargs(init_kwargs)}
    if "dtype" in kwargs:
        kwargs["dtype"] = _parse_dtype(kwargs["dtype"])
    files = {key: kwargs[key] for key in FILE_ARGUMENTS if key in kwargs}
    config = kwargs.get("config")
    if config is None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs["trust_remote_code"], **files)
    writer = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto = get_classifier_auto_class(config) or writer
    with _disable_zero3_init() if _misreports_tied_head(name, config, files) else nullcontext():
        model = auto.from_pretrained(name, **kwargs)
    mark_untied_head(model)
    return model


def _misreports_tied_head(name: str, config: PretrainedConfig, files: Mapping[str, Any]) -> bool:
    """Whether the configuration says that head and embeddings are tied though its file says no, as T5's.

    transformers then compares their weights, and takes any two that ZeRO-3 has split for equal.
    """
    if not is_deepspeed_zero3_enabled() or not config.tie_word_embeddings:
        return False
    return PretrainedConfig.get_config_dict(name, **files)[0].get("tie_word_embeddings") is False


@contextmanager
def _disable_zero3_init() -> Iterator[None]:
    """ZeRO-3 splits what is loaded within only when it makes its engine."""
    chosen = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(chosen)


@contextmanager
def use_on_device(teacher: nn.Module, device: torch.device | str, *, parked: bool) -> Iterator[nn.Module]:
    """The teacher on `device` for the duration of the block, if it is `parked` on the CPU otherwise.

    The weights on the CPU stay there, so going back copies nothing. A model under FSDP moves its own shards
    (see `place_teacher`) and gives back here what it gathered. So nothing may read the teacher's weights
    after the block, the backward pass included.
    """
    if isinstance(teacher, FSDPModule):
        try:
            yield teacher
        finally:
            teacher.reshard()
        return
    if not parked:
        yield teacher
        return
    home = [(tensor, tensor.data) for tensor in itertools.chain(teacher.parameters(), teacher.buffers())]
    try:
        for tensor, data in home:
            tensor.data = data.to(device, non_blocking=True)
        yield teacher
    finally:
        for tensor, data in home:
            tensor.data = data


def _parse_init_kwargs(init_kwargs: InitKwargs) -> dict[str, Any]:
    """A copy; on the command line the arguments are JSON. `torch_dtype` is what `dtype` was called."""
    kwargs = dict(json.loads(init_kwargs) if isinstance(init_kwargs, str) else init_kwargs or {})
    if "torch_dtype" in kwargs:
        warnings.warn("torch_dtype is deprecated: use dtype", FutureWarning, stacklevel=3)
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    return kwargs


def _merge_dtype(init_kwargs: InitKwargs, dtype: str | None) -> dict[str, Any]:
    kwargs = _parse_init_kwargs(init_kwargs)
    if dtype is not None and _parse_dtype(kwargs.setdefault("dtype", dtype)) != TEACHER_DTYPES[dtype]:
        raise ValueError(
            f"teacher_dtype={dtype!r}, but teacher_model_init_kwargs have dtype={kwargs['dtype']!r}: "
            "give one of them"
        )
    return kwargs


def _parse_dtype(value: Any) -> Any:
    if value in ("auto", None) or isinstance(value, torch.dtype):
        return value
    named = getattr(torch, str(value), None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f"dtype {value!r} is neither a torch dtype nor the name of one, such as 'bfloat16'")
    return named


def _copy_student(student: PreTrainedModel) -> PreTrainedModel:
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 has split the student's weights, so it cannot be copied as its own teacher: "
            "name it with `teacher_model_name_or_path`"
        )
    warnings.warn(
        "no teacher was given, so a frozen copy of the initial student teaches: pass `teacher_model` or "
        "`teacher_model_name_or_path` if that is not meant",
        stacklevel=3,
    )
    return copy.deepcopy(student)


def _check_same_family(student: PreTrainedModel, teacher: Any) -> None:
    if getattr(teacher, "config", None) is None:
        name = type(teacher).__name__
        raise ValueError(f"teacher_model is a {name}, which has no config: pass a transformers model")
    kinds = [get_classifier_kind(unwrap_model(model)) for model in (student, teacher)]
    if kinds[0] != kinds[1]:
        shown = [kind or "language modelling" for kind in kinds]
        raise ValueError(
            f"the student is made for {shown[0]} and the teacher for {shown[1]}: choose a teacher for "
            f"{shown[0]}"
        )
    if kinds[0] is not None:
        return
    names = {True: "encoder-decoder", False: "decoder-only"}
    families = [names[bool(model.config.is_encoder_decoder)] for model in (student, teacher)]
    if families[0] != families[1]:
        raise ValueError(
            f"the student is {families[0]} and the teacher {families[1]}, so they do not read the same "
            f"input: choose a teacher that is {families[0]}"
        )
