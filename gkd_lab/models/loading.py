"""Load the trainer's student and its frozen teacher, given as a model, a name or (the teacher) nothing."""

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
from transformers.utils import find_adapter_config_file, is_peft_available

from gkd_lab.models.classifiers import get_classifier_auto_class, get_classifier_kind
from gkd_lab.models.forward import unwrap_model
from gkd_lab.models.heads import mark_untied_head
from gkd_lab.models.peft_base import is_base_of
from gkd_lab.models.sharding import is_quantized

InitKwargs = Mapping[str, Any] | str | None
TEACHER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILE_ARGUMENTS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
"""Arguments of `from_pretrained` that select files, and so hold for the configuration too."""


def load_teacher(
    teacher_model: PreTrainedModel | nn.Module | str | None,
    *,
    name_or_path: str | None,
    init_kwargs: InitKwargs,
    student: PreTrainedModel,
    dtype: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Return the frozen teacher in eval mode: the given model itself, one loaded by name, or a student copy.

    Its weights are cast to `dtype` unless that is None. The base of a PEFT student is returned unchanged: it
    teaches `without_adapters`.

    Args:
        teacher_model: A model, which is frozen and cast in place, or a name. None stands for `name_or_path`,
            and without that for a copy of the current `student`, with a warning.
        init_kwargs: Arguments of `from_pretrained`, for a teacher loaded by name; not modified. A quantized
            teacher (`quantization_config`) keeps its weights' dtypes.

    Raises:
        ValueError: for `init_kwargs` without a name, two dtypes, a teacher that shares weights with the
            student or is no transformers model, and one of another family (encoder-decoder or decoder-only).
    """
    source = name_or_path if teacher_model is None else teacher_model
    if isinstance(source, str):
        kwargs = _merge_dtype(init_kwargs, dtype)
        teacher = load_auto_model(source, kwargs, trust_remote_code=trust_remote_code)
        if hasattr(teacher, "merge_and_unload"):  # an adapter, which the teacher has no need to keep apart
            teacher = teacher.merge_and_unload()
    elif init_kwargs:
        raise ValueError(
            f"teacher_model_init_kwargs {init_kwargs!r} can only be used when the teacher is loaded by name, "
            f"but it is {'a copy of the student' if source is None else 'already a model'}: drop them"
        )
    elif is_base_of(student, source):
        _refuse_base_dtype(dtype)
        return unwrap_model(student)
    else:
        teacher = _copy_student(student) if source is None or source is student else source
        _check_own_weights(student, teacher)
        teacher = teacher if dtype is None or is_quantized(teacher) else teacher.to(TEACHER_DTYPES[dtype])
    _check_same_family(student, teacher)
    return teacher.eval().requires_grad_(False)


def load_student(
    model: PreTrainedModel | str,
    *,
    init_kwargs: InitKwargs,
    trust_remote_code: bool,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """Return the student: a model as it is, or one loaded by name, in float32 unless a dtype is given.

    As in TRL. `quantization_config` is one more of the `init_kwargs`; ValueError if they have another. Warns
    if either is ignored because the student is already a model.
    """
    if isinstance(model, str):
        kwargs = {"dtype": "float32", **_parse_init_kwargs(init_kwargs)}
        _add_argument(kwargs, "quantization_config", quantization_config, "model_init_kwargs")
        return load_auto_model(model, kwargs, trust_remote_code=trust_remote_code)
    if quantization_config is not None:
        warnings.warn("quantization_config is ignored: the student is already a model", stacklevel=2)
    if init_kwargs:
        warnings.warn(
            f"model_init_kwargs {init_kwargs!r} are ignored: the student is already a model", stacklevel=2
        )
    return model


def load_auto_model(name: str, init_kwargs: InitKwargs, *, trust_remote_code: bool) -> PreTrainedModel:
    """Load a model by name as decoder-only model, encoder-decoder or classifier, as its config says.

    `dtype` in `init_kwargs` may be a torch.dtype, its name, "auto" or None. An adapter's name gives its base
    with the adapter, trainable (a `PeftModel`).
    """
    kwargs = {"trust_remote_code": trust_remote_code, **_parse_init_kwargs(init_kwargs)}
    if "dtype" in kwargs:
        kwargs["dtype"] = _parse_dtype(kwargs["dtype"])
    files = {key: kwargs[key] for key in FILE_ARGUMENTS if key in kwargs}
    if is_peft_available() and find_adapter_config_file(name, **_select_adapter_files(files)) is not None:
        return _load_adapter(name, kwargs, files)
    config = kwargs.get("config")
    if config is None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=kwargs["trust_remote_code"], **files)
    language_model = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto_class = get_classifier_auto_class(config) or language_model
    with _disable_zero3_init() if _misreports_tied_head(name, config, files) else nullcontext():
        model = auto_class.from_pretrained(name, **kwargs)
    mark_untied_head(model)
    return model


def _select_adapter_files(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that `find_adapter_config_file` takes."""
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
    return {name: files[name] for name in names if name in files}


def _load_adapter(name: str, kwargs: Mapping[str, Any], files: Mapping[str, Any]) -> Any:
    """Return the base of a saved adapter with the adapter, trainable. ValueError if it names no base."""
    from peft import PeftConfig, PeftModel

    base_name = PeftConfig.from_pretrained(name, **files).base_model_name_or_path
    if not base_name:
        raise ValueError(
            f"{name} holds an adapter and does not say of which model: load the model, give it to "
            "PeftModel.from_pretrained(model, ..., is_trainable=True), and pass that"
        )
    base_kwargs = {key: value for key, value in kwargs.items() if key not in FILE_ARGUMENTS}
    trust_remote_code = base_kwargs.pop("trust_remote_code")
    base = load_auto_model(base_name, base_kwargs, trust_remote_code=trust_remote_code)
    return PeftModel.from_pretrained(base, name, is_trainable=True, **files)


def _misreports_tied_head(name: str, config: PretrainedConfig, files: Mapping[str, Any]) -> bool:
    """Check under ZeRO-3 whether the loaded config ties the head though its file says untied, as T5 v1.1's.

    transformers would then compare head and embeddings, and take any two tensors split by ZeRO-3 for equal.
    """
    if not is_deepspeed_zero3_enabled() or not config.tie_word_embeddings:
        return False
    return PretrainedConfig.get_config_dict(name, **files)[0].get("tie_word_embeddings") is False


@contextmanager
def _disable_zero3_init() -> Iterator[None]:
    """Context manager: models loaded within the block are not split by ZeRO-3; its engine does so later."""
    deepspeed_config = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(deepspeed_config)


@contextmanager
def use_on_device(teacher: nn.Module, device: torch.device | str, *, parked: bool) -> Iterator[nn.Module]:
    """Context manager: a `parked` teacher's weights are on `device` within the block, then on the CPU again.

    Without `parked` nothing moves. The CPU tensors are kept, so nothing is copied back. FSDP moves its own
    shards (see `place_teacher`), and the end of the block frees the gathered weights. Nothing may read the
    teacher's weights after the block, not even a backward pass.
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
    cpu_data = [(tensor, tensor.data) for tensor in itertools.chain(teacher.parameters(), teacher.buffers())]
    try:
        for tensor, data in cpu_data:
            tensor.data = data.to(device, non_blocking=True)
        yield teacher
    finally:
        for tensor, data in cpu_data:
            tensor.data = data


def _parse_init_kwargs(init_kwargs: InitKwargs) -> dict[str, Any]:
    """Return the arguments (dict, JSON or None) as a new dict; deprecated `torch_dtype` becomes `dtype`."""
    kwargs = dict(json.loads(init_kwargs) if isinstance(init_kwargs, str) else init_kwargs or {})
    if "torch_dtype" in kwargs:
        warnings.warn("torch_dtype is deprecated: use dtype", FutureWarning, stacklevel=3)
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
    return kwargs


def merge_revision(init_kwargs: InitKwargs, revision: str | None) -> InitKwargs:
    """Return a teacher's arguments with `revision`, unless it is None; ValueError if they have another."""
    if revision is None:
        return init_kwargs
    kwargs = _parse_init_kwargs(init_kwargs)
    _add_argument(kwargs, "revision", revision, "teacher_model_init_kwargs")
    return kwargs


def _add_argument(kwargs: dict[str, Any], name: str, value: Any, source: str) -> None:
    """Set `kwargs[name]` unless the value is None; ValueError if `kwargs`, of `source`, have another."""
    if value is not None and kwargs.setdefault(name, value) != value:
        raise ValueError(f"{name}={value!r}, but {source} have {name}={kwargs[name]!r}: give one of them")


def _merge_dtype(init_kwargs: InitKwargs, dtype: str | None) -> dict[str, Any]:
    """Return the arguments as a new dict, with `dtype` set unless None; ValueError if they have another."""
    kwargs = _parse_init_kwargs(init_kwargs)
    if dtype is not None and _parse_dtype(kwargs.setdefault("dtype", dtype)) != TEACHER_DTYPES[dtype]:
        raise ValueError(
            f"teacher_dtype={dtype!r}, but teacher_model_init_kwargs have dtype={kwargs['dtype']!r}: "
            "give one of them"
        )
    return kwargs


def _parse_dtype(value: Any) -> Any:
    """Return the torch.dtype of a name, else ValueError; "auto", None and a torch.dtype stay as they are."""
    if value in ("auto", None) or isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, str(value), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {value!r} is neither a torch dtype nor the name of one, such as 'bfloat16'")
    return dtype


def _copy_student(student: PreTrainedModel) -> PreTrainedModel:
    """Warn, and return a deep copy of the initial student as its own teacher; ValueError under ZeRO-3."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 has split the student's weights, so it cannot be copied as its own teacher: "
            "name it with `teacher_model_name_or_path`"
        )
    warnings.warn(
        "no teacher was given, so a frozen copy of the initial student is the teacher: pass "
        "`teacher_model` or `teacher_model_name_or_path` for another one",
        stacklevel=3,
    )
    return copy.deepcopy(student)


def _refuse_base_dtype(dtype: str | None) -> None:
    """Raise ValueError if a dtype is given for a teacher whose weights are the student's."""
    if dtype is not None:
        raise ValueError(
            f"teacher_dtype={dtype!r} would cast the student too, whose base the teacher is: leave it out, "
            "or pass a teacher with weights of its own"
        )


def _check_own_weights(student: nn.Module, teacher: Any) -> None:
    """Raise ValueError if the teacher shares weights with the student: freezing it would freeze both."""
    if not isinstance(teacher, nn.Module):
        return
    students_weights = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in students_weights]
    if shared:
        raise ValueError(
            f"the teacher shares {len(shared)} weights with the student ({shared[0]}, ...), and a teacher is "
            "frozen: load it a second time, or pass copy.deepcopy of it; for a PEFT student without its "
            "adapter pass student.get_base_model(), which needs no copy"
        )


def _check_same_family(student: PreTrainedModel, teacher: Any) -> None:
    """Raise ValueError unless both are encoder-decoders, both decoder-only, or classifiers of one kind."""
    if getattr(teacher, "config", None) is None:
        name = type(teacher).__name__
        raise ValueError(f"teacher_model is a {name}, which has no config: pass a transformers model")
    kinds = [get_classifier_kind(unwrap_model(model)) for model in (student, teacher)]
    if kinds[0] != kinds[1]:
        student_kind, teacher_kind = (kind or "language modelling" for kind in kinds)
        raise ValueError(
            f"the student is a model for {student_kind} and the teacher for {teacher_kind}: choose a "
            f"teacher for {student_kind}"
        )
    if kinds[0] is not None:
        return
    names = {True: "encoder-decoder", False: "decoder-only"}
    families = [names[bool(model.config.is_encoder_decoder)] for model in (student, teacher)]
    if families[0] != families[1]:
        raise ValueError(
            f"the student is {families[0]} and the teacher {families[1]}, so their inputs differ: choose a "
            f"teacher that is {families[0]}"
        )
