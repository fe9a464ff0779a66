"""A user's view of the trainer: a chat tokenizer, tiny models in folders, plain rows, plain arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.models.build import train_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WORDS = "user assistant system one two three four five six seven eight nine ten plus is what ? ."
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def chat_tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """Words apart by blanks; turns end with <|im_end|>, which is also the end of sequence."""
    tokenizer = train_tokenizer(TokenizerSpec(kind="word", vocab_size=64), [f"{WORDS} {extra}"])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def conversations(count: int = 8) -> list[dict[str, Any]]:
    """Rows with `messages`; questions and answers of different lengths."""
    words = WORDS.split()[3:13]
    return [
        {"messages": chat(" ".join(words[: 1 + n % 5]) + " ?", " ".join(words[n % 3 : n % 3 + 1 + n % 4]))}
        for n in range(count)
    ]


def llama(seed: int = 0, *, width: int = 16, vocabulary: int = 28, dropout: float = 0.0) -> LlamaForCausalLM:
    """Two layers, float32; weights spread so that the next token depends on what came before."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            attention_dropout=dropout,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=chat_tokenizer().eos_token_id,
        )
    )
    _spread(model, 6)
    return model


def t5(seed: int = 0, *, width: int = 16, vocabulary: int = 28, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=4,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=chat_tokenizer().eos_token_id,
        )
    )
    _spread(model, 3)
    return model


def _spread(model: PreTrainedModel, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


def saved(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> str:
    """The model, and the tokenizer if one is given, in a folder of the hub's form."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def config(folder: Path, **changes: Any) -> GKDConfig:
    """Two steps of two rows on the CPU in float32; everything else as TRL has it."""
    return GKDConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_new_tokens": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            **changes,
        }
    )


def trainer(
    folder: Path,
    rows: Sequence[dict[str, Any]] | None = None,
    *,
    model: Any = None,
    teacher: Any = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> GKDTrainer:
    """A trainer on tiny models, as a user would make it."""
    return GKDTrainer(
        **{
            "model": model if model is not None else llama(0),
            "teacher_model": teacher if teacher is not None else llama(1, width=24),
            "args": config(folder, **arguments or {}),
            "train_dataset": conversations() if rows is None else list(rows),
            "processing_class": chat_tokenizer(),
            **options,
        }
    )


def losses(made: GKDTrainer) -> list[float]:
    """The loss of each step."""
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def logged(made: GKDTrainer, name: str) -> list[float]:
    return [row[name] for row in made.state.log_history if name in row]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}
