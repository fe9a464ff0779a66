"""What a user hands to the trainer, brought into one shape: arguments, tokenizer, adapters, dropout."""

import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from gkd_lab.training.arguments import GKDConfig

UNSUPPORTED_FIELDS = {
    "packing": "rows are not packed: each prompt is answered by the student in its own row",
    "padding_free": "rows are padded: the student samples from a batch of prompts",
}
"""Fields of TRL's SFTConfig that TRL's own GKDTrainer cannot honour either."""
SAMPLING_STRATEGIES = ("random", "sequential")


def resolve_arguments(args: GKDConfig | None, model: Any) -> GKDConfig:
    """The arguments, or defaults for this model. Raises ValueError for those that do not fit GKD."""
    if args is None:
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        folder = f"{os.path.basename(name.rstrip('/')) or 'student'}-GKD"
        args = GKDConfig(output_dir=folder, use_cpu=not torch.accelerator.is_available())
    if not isinstance(args, GKDConfig):
        raise TypeError(
            f"args is a {type(args).__name__}; give a gkd_lab.GKDConfig, which takes TRL's fields"
        )
    for name, why in UNSUPPORTED_FIELDS.items():
        if getattr(args, name):
            raise ValueError(f"{name}=True does not fit GKD: {why}; leave it False")
    if args.train_sampling_strategy not in SAMPLING_STRATEGIES:
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} does not fit GKD: how long a row "
            f"gets is not known before it is written; choose one of {SAMPLING_STRATEGIES}"
        )
    if args.activation_offloading:
        warnings.warn(
            "activation_offloading is not used: activations stay on the device; activation_checkpointing "
            "keeps few of them",
            stacklevel=3,
        )
    # The Trainer would drop the texts, since a model's forward does not name them.
    args.remove_unused_columns = False
    if args.n_gpu > 1:
        warnings.warn(
            f"{args.n_gpu} GPUs in one process: only the first is used; start one process a GPU with "
            "`accelerate launch` or `torchrun`",
            stacklevel=3,
        )
        args._n_gpu = 1
    return args


def resolve_tokenizer(
    processing_class: Any, tokenizer: Any, model: PreTrainedModel, args: GKDConfig
) -> PreTrainedTokenizerBase:
    """The text tokenizer, with the pad token, end token and chat template that `args` names."""
    if tokenizer is not None:
        warnings.warn("tokenizer is deprecated: use processing_class", FutureWarning, stacklevel=3)
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
    _set_special_tokens(processing_class, model, args)
    return processing_class


def _load_model_tokenizer(model: PreTrainedModel, args: GKDConfig) -> PreTrainedTokenizerBase:
    name = model.config._name_or_path
    if not name:
        raise ValueError("the model does not say where its tokenizer is: give it as `processing_class`")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, args: GKDConfig) -> None:
    known = tokenizer.get_vocab()
    for field in ("eos_token", "pad_token"):
        token = getattr(args, field)
        if token is not None:
            if token not in known:
                raise ValueError(f"{field} {token!r} is not in the tokenizer's vocabulary")
            setattr(tokenizer, field, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has neither a pad nor an end token: set `tokenizer.pad_token`")
    template = args.chat_template_path
    if template is not None:
        if os.path.isfile(template):
            with open(template, encoding="utf-8") as file:
                tokenizer.chat_template = file.read()
        else:
            raise ValueError(
                f"chat_template_path {template!r} is not a file; to take another model's template, call "
                "trl.clone_chat_template on model and tokenizer first"
            )


def prepare_student(model: PreTrainedModel, peft_config: Any, args: GKDConfig) -> PreTrainedModel:
    """The model with what is asked for: a router's loss, an adapter, which is drawn from `args.seed`."""
    set_seed(args.seed)
    if args.router_aux_loss_coef is not None:
        _set_router_loss_weight(model, args.router_aux_loss_coef)
    if peft_config is not None:
        model = _add_peft_adapter(model, peft_config)
    if hasattr(model, "peft_config") and args.gradient_checkpointing:
        # Frozen embeddings give checkpointed layers no input that asks for a gradient.
        model.enable_input_require_grads()
    return model


def _set_router_loss_weight(model: PreTrainedModel, weight: float) -> None:
    """The configuration is where `gkd_lab.models.heads` reads whether and how much this loss counts."""
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits, config.router_aux_loss_coef = weight != 0, weight
    elif weight:
        raise ValueError(
            f"router_aux_loss_coef={weight}, but {type(model).__name__} returns no router logits, so "
            "there is no such loss: leave it out"
        )


def _add_peft_adapter(model: PreTrainedModel, peft_config: Any) -> PreTrainedModel:
    try:
        from peft import PeftConfig, PeftModel, get_peft_model
    except ImportError as missing:
        raise ImportError("peft_config needs the package peft: `pip install 'gkd-lab[peft]'`") from missing
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}, not a peft.PeftConfig")
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already: merge and unload it, or leave peft_config out")
    return get_peft_model(model, peft_config)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, also those that attention reads from an attribute."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def check_stream_collation(args: GKDConfig) -> None:
    """Raises ValueError where one process would collate a stream for others, which miss what it keeps."""
    if args.world_size > 1 and args.accelerator_config.dispatch_batches is not False:
        raise ValueError(
            "uld keeps the teacher's prompts where rows are collated, and of a stream only the first process "
            'collates: set accelerator_config={"dispatch_batches": False}'
        )
