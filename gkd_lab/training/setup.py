"""Prepare a run: the user's arguments, student, tokenizer, teachers and task, brought into one form."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    set_seed,
)

from gkd_lab.losses.attentions import enable_attention_maps
from gkd_lab.losses.auxiliary_modules import AuxiliaryModules
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.terms import required_outputs
from gkd_lab.models.classifiers import get_classifier_kind
from gkd_lab.models.forward import unwrap_model
from gkd_lab.models.heads import OutputHead
from gkd_lab.models.loading import load_student
from gkd_lab.models.packing import Pack
from gkd_lab.models.peft_base import is_base_of
from gkd_lab.teachers.load_teachers import TeacherInputs, TeacherSet
from gkd_lab.training.adapters import TaskAdapter, build_adapter
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.config_fields import check_options
from gkd_lab.training.rollout import GenerateSampler, GenerationLimits, StudentSampler


@dataclass(frozen=True)
class StudentInputs:
    """The arguments of `GKDTrainer` that describe its students and their rows; see there."""

    model: PreTrainedModel | nn.Module | str | None
    processing_class: Any = None
    tokenizer: Any = None
    peft_config: Any = None
    formatting_func: Callable[[Any], Any] | None = None
    pack: Pack | None = None
    cells: Sequence[CellArguments] | None = None
    quantization_config: Any = None


@dataclass(frozen=True)
class TrainingSetup:
    """The resolved parts of a run."""

    args: GKDConfig
    tokenizer: PreTrainedTokenizerBase
    pack: Pack
    teachers: TeacherSet
    adapter: TaskAdapter

    def build_trainer_options(self, data_collator: Any, compute_metrics: Any) -> dict[str, Any]:
        """Return a dict of four Trainer arguments; a collator or metrics of None become the task's."""
        return {
            "args": self.args,
            "processing_class": self.tokenizer,
            "data_collator": data_collator or self.adapter.collate,
            "compute_metrics": compute_metrics or self.adapter.compute_metrics,
        }


def prepare_training(
    args: GKDConfig | None, student_inputs: StudentInputs, teacher_inputs: TeacherInputs, dataset: Any
) -> TrainingSetup:
    """Resolve arguments, student, tokenizer, teachers, task and pack; return them as one TrainingSetup.

    `dataset`: the training rows, of which only whether they are a stream is read; models given by name are
    loaded. Raises ValueError and TypeError for what does not fit together.
    """
    has_default_args = args is None
    model, pack = student_inputs.model, student_inputs.pack
    args = resolve_arguments(args, model)
    student = pack.model if pack is not None else _load_student(student_inputs, args)
    tokenizer = resolve_tokenizer(student_inputs.processing_class, student_inputs.tokenizer, student, args)
    if has_default_args and get_classifier_kind(unwrap_model(student)) is not None:
        args.lmbda = 0.0  # A classifier writes nothing.
    cells = student_inputs.cells or [CellArguments.build(args)]
    is_copy = teacher_inputs.model in (None, model) and not args.teacher_model_name_or_path
    is_copy |= is_base_of(student, teacher_inputs.model)
    teachers = TeacherSet.load(teacher_inputs, student, tokenizer, cells, args, is_copy=is_copy)
    adapter = build_adapter(
        student,
        tokenizer,
        teachers,
        cells,
        args,
        student_inputs.formatting_func,
        teacher_inputs.prompts,
        is_stream=not hasattr(dataset, "__len__"),
    )
    if pack is None:
        prepared = prepare_student(student, student_inputs.peft_config, args)
        _check_is_trainable(prepared)
        pack = Pack.build_single(prepared)
    if args.disable_dropout:
        disable_dropout(pack.model)
    return TrainingSetup(args, tokenizer, pack, teachers, adapter)


# ---- arguments ----


def resolve_arguments(args: GKDConfig | None, model: Any) -> GKDConfig:
    """Return `args`, changed in place where GKD needs it, or defaults if None; ValueError if they do not fit.

    TypeError if they are not a GKDConfig. Warns of fields without effect.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        folder = f"{os.path.basename(name.rstrip('/')) or 'student'}-GKD"
        args = GKDConfig(output_dir=folder, use_cpu=not torch.accelerator.is_available())
    if not isinstance(args, GKDConfig):
        raise TypeError(
            f"args is a {type(args).__name__}; give a gkd_lab.GKDConfig, which takes TRL's fields"
        )
    check_options(args)
    if args.activation_offloading:
        warnings.warn(
            "activation_offloading is not used: activations stay on the device; activation_checkpointing "
            "keeps few of them",
            stacklevel=4,
        )
    # The Trainer would drop the texts, since a model's forward does not name them.
    args.remove_unused_columns = False
    if args.n_gpu > 1:
        warnings.warn(
            f"{args.n_gpu} GPUs in one process: only the first is used; start one process a GPU with "
            "`accelerate launch` or `torchrun`",
            stacklevel=4,
        )
        args._n_gpu = 1
    return args


# ---- tokenizer ----


def resolve_tokenizer(
    processing_class: Any, tokenizer: Any, model: PreTrainedModel, args: GKDConfig
) -> PreTrainedTokenizerBase:
    """Return the given or the model's tokenizer, with `args`' special tokens and chat template set in place.

    ValueError for a processor of images or sound, and TypeError for what is no tokenizer.
    """
    if tokenizer is not None:
        warnings.warn("tokenizer is deprecated: use processing_class", FutureWarning, stacklevel=4)
        processing_class = processing_class or tokenizer
    if processing_class is None:
        processing_class = _load_model_tokenizer(model, args)
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"{type(processing_class).__name__} reads images or sound; GKDTrainer distils text: give its "
            "`.tokenizer` and a dataset of texts"
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is a {type(processing_class).__name__}, not a tokenizer")
    _set_special_tokens(processing_class, args)
    return processing_class


def _load_model_tokenizer(model: PreTrainedModel, args: GKDConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the folder or hub name that the model came from; ValueError if it has none."""
    name = model.config._name_or_path
    if not name:
        raise ValueError("the model does not say where its tokenizer is: give it as `processing_class`")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, args: GKDConfig) -> None:
    """Set end token, pad token (default: the end token) and chat template file of `args`, in place.

    ValueError for a token outside of the vocabulary, a missing file, and if no pad token is left.
    """
    vocabulary = tokenizer.get_vocab()
    for field in ("eos_token", "pad_token"):
        token = getattr(args, field)
        if token is not None:
            if token not in vocabulary:
                raise ValueError(f"{field} {token!r} is not in the tokenizer's vocabulary")
            setattr(tokenizer, field, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has neither a pad nor an end token: set `tokenizer.pad_token`")
    template = args.chat_template_path
    if template is not None:
        if not os.path.isfile(template):
            raise ValueError(
                f"chat_template_path {template!r} is not a file; to take another model's template, call "
                "trl.clone_chat_template on model and tokenizer first"
            )
        with open(template, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()


# ---- student ----


def _load_student(inputs: StudentInputs, args: GKDConfig) -> PreTrainedModel:
    """Return the model, loaded first if it is a name (float32 by default); ValueError if it is None."""
    if inputs.model is None:
        raise ValueError("give the student as `model`, or several of them as `pack`")
    return load_student(
        inputs.model,
        init_kwargs=args.model_init_kwargs,
        trust_remote_code=args.trust_remote_code,
        quantization_config=inputs.quantization_config,
    )


def prepare_student(model: PreTrainedModel, peft_config: Any, args: GKDConfig) -> PreTrainedModel:
    """Seed all generators, set the router loss's weight, return the model with its new adapter, if any."""
    set_seed(args.seed)
    for adapter in getattr(model, "peft_config", {}).values():
        _refuse_prompt_learning(adapter)
    if args.router_aux_loss_coef is not None:
        _set_router_loss_weight(model, args.router_aux_loss_coef)
    if peft_config is not None:
        model = _add_peft_adapter(model, peft_config)
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        # Frozen embeddings give checkpointed layers no input that asks for a gradient.
        model.enable_input_require_grads()
    return model


def _check_is_trainable(model: nn.Module) -> None:
    """Raise ValueError if no weight of the student asks for a gradient, so that it could not learn."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    way_out = (
        "load its adapter with PeftModel.from_pretrained(..., is_trainable=True)"
        if hasattr(model, "peft_config")
        else "call requires_grad_(True) on what is to learn, or give a `peft_config`"
    )
    raise ValueError(f"all weights of the student are frozen, so it cannot learn: {way_out}")


def _set_router_loss_weight(model: PreTrainedModel, weight: float) -> None:
    """Set the router loss's weight in the model's config (0: off); ValueError if not 0 without a router."""
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits, config.router_aux_loss_coef = weight != 0, weight
    elif weight:
        raise ValueError(
            f"router_aux_loss_coef={weight}, but {type(model).__name__} returns no router logits, so "
            "there is no such loss: leave it out"
        )


def _add_peft_adapter(model: PreTrainedModel, peft_config: Any) -> PreTrainedModel:
    """Wrap the model with a new peft adapter; ImportError, TypeError, or ValueError if it has one."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs the package peft: `pip install 'gkd-lab[peft]'`") from error
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}, not a peft.PeftConfig")
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already: merge and unload it, or leave peft_config out")
    _refuse_prompt_learning(peft_config)
    return get_peft_model(model, peft_config)


def _refuse_prompt_learning(peft_config: Any) -> None:
    """Raise ValueError for adapters of virtual tokens, such as prompt and prefix tuning.

    They stand before the padding of a batch, so that a row's loss would depend on its neighbours' lengths.
    """
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} puts virtual tokens before a batch's padding, so a row's loss "
            "depends on the other rows: use LoRA or another adapter of the weights"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the model to 0, in place, also those that attention reads from attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# ---- parts of the trainer ----


def create_auxiliary_modules(
    cells: Sequence[CellArguments],
    student_head: OutputHead,
    teacher_head: OutputHead | None,
    teacher_config: PretrainedConfig | None,
    accelerator: Accelerator,
) -> AuxiliaryModules:
    """Create the cells' modules of loss terms that read hidden states or attentions, not logits alone.

    Lets the models return attentions if a term reads them. ValueError for learning modules under fp16.
    """
    model = student_head.model
    if "attentions" in required_outputs(cell.list_terms() for cell in cells):
        for head in (student_head, teacher_head):
            if head is not None:
                enable_attention_maps(unwrap_model(head.model))
    average_over_ranks = partial(accelerator.reduce, reduction="mean")
    modules = AuxiliaryModules(
        cells, model.config, teacher_config, accelerator.device, model.dtype, average_over_ranks
    )
    if modules.has_parameters and accelerator.mixed_precision == "fp16":
        raise ValueError("a term of the loss learns, which fp16's scaled gradients do not fit: use bf16")
    return modules


def create_student_sampler(
    pack: Pack,
    tokenizer: Any,
    accelerator: Accelerator,
    args: GKDConfig,
    limits: GenerationLimits,
    precision: Callable[[], AbstractContextManager[Any]],
) -> StudentSampler:
    """Return a VllmSampler if `args.use_vllm`, else a GenerateSampler; `precision`: context for sampling."""
    if args.use_vllm:
        from gkd_lab.training.vllm_sampling import VllmSampler

        return VllmSampler(pack.model, tokenizer, accelerator, args, limits.end_ids, limits.vocabulary_size)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return GenerateSampler(pack, limits, dtype, precision)
