"""Tiny encoder and decoder classifiers with random weights, and rows for them."""

import random
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
)

from gkd_lab.models.classifiers import ClassifierKind

from .tiny import WORDS, tiny_tokenizer

SIZES: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2}
PLAIN: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 32, "max_position_embeddings": 40}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, **PLAIN, **NO_DROPOUT, pad_token_id=0),
    "roberta": lambda: RobertaConfig(**SIZES, **PLAIN, **NO_DROPOUT, pad_token_id=0),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=16,
        dim=16,
        n_layers=2,
        n_heads=4,
        hidden_dim=32,
        max_position_embeddings=40,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        pad_token_id=0,
    ),
    "modernbert": lambda: ModernBertConfig(
        **SIZES, **PLAIN, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1
    ),
    "llama": lambda: LlamaConfig(**SIZES, **PLAIN, pad_token_id=None, bos_token_id=None, eos_token_id=1),
}


def tiny_classifier(
    family: str,
    kind: ClassifierKind,
    seed: int,
    *,
    labels: tuple[str, ...] = ("no", "maybe", "yes"),
    dtype: torch.dtype = torch.float64,
    spread: float = 6.0,
) -> PreTrainedModel:
    """Build a classifier of two layers, with weights large enough for its outputs to depend on the text."""
    config = CONFIGS[family]()
    if kind == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: n for n, label in enumerate(labels)}
    auto = (
        AutoModelForTokenClassification
        if kind == "token-classification"
        else AutoModelForSequenceClassification
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model


def tiny_rows(kind: ClassifierKind, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Make random texts of 2 to 7 words with a label, one label per word, or a number."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        words = [draw.choice(WORDS.split()) for _ in range(draw.randint(2, 7))]
        if kind == "token-classification":
            rows.append({"tokens": words, "labels": [draw.randrange(3) for _ in words]})
        elif kind == "regression":
            rows.append({"text": " ".join(words), "label": draw.uniform(-2, 2)})
        else:
            rows.append({"text": " ".join(words), "label": draw.randrange(3)})
    return rows


__all__ = ["CONFIGS", "tiny_classifier", "tiny_rows", "tiny_tokenizer"]
