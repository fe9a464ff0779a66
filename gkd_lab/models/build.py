"""Train tokenizers, build nano models with random weights, and load checkpoints.

Nano models are Llama decoders, T5 encoder-decoders (gated GELU, relative bias, tied head) and ModernBERT
classifiers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, Architecture, Family, TokenizerSpec
from gkd_lab.config.errors import ConfigError
from gkd_lab.models.classifiers import parse_classifier_kind
from gkd_lab.models.heads import mark_untied_head

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def train_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train and return a word-level or byte-level BPE tokenizer of at most `vocab_size` (or 1024) entries."""
    special = [PAD, END, UNKNOWN]
    size = spec.vocab_size or 1024
    if spec.kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: trainers.Trainer = trainers.WordLevelTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
    else:
        if size < 300:
            raise ConfigError(f"tokenizer.vocab_size: {size} is too small for bpe: 300 at least")
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def make_model(
    family: Family,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    max_tokens: int,
    dropout: float,
    labels: Sequence[str] = (),
) -> PreTrainedModel:
    """Build a Llama decoder, T5 or ModernBERT classifier, by family, with random weights drawn from `seed`.

    Args:
        max_tokens: Limit of input plus output tokens.
        labels: Labels of a classifier, in the order of its logits; none for a regression.
    """
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if parse_classifier_kind(family):
            return _build_classifier(family, architecture, len(tokenizer), max_tokens, dropout, labels, ids)
        if family == "decoder-only":
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=architecture.width,
                    intermediate_size=architecture.feed_forward,
                    num_hidden_layers=architecture.layers,
                    num_attention_heads=architecture.heads,
                    max_position_embeddings=max_tokens,
                    attention_dropout=dropout,
                    tie_word_embeddings=True,
                    bos_token_id=None,
                    **ids,
                )
            )
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=architecture.width,
                d_kv=architecture.width // architecture.heads,
                d_ff=architecture.feed_forward,
                num_layers=architecture.layers,
                num_decoder_layers=architecture.layers,
                num_heads=architecture.heads,
                dropout_rate=dropout,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=tokenizer.pad_token_id,
                **ids,
            )
        )


def _build_classifier(
    family: Family,
    architecture: Architecture,
    vocab_size: int,
    max_tokens: int,
    dropout: float,
    labels: Sequence[str],
    ids: dict[str, int],
) -> PreTrainedModel:
    """Build an untrained ModernBERT for token or sequence classification, or for regression (one output).

    Not a BERT: of this size and trained from scratch, that only predicts the commonest label.
    """
    problem = "regression" if family == "regression" else "single_label_classification"
    config = ModernBertConfig(
        vocab_size=vocab_size,
        hidden_size=architecture.width,
        intermediate_size=architecture.feed_forward,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        max_position_embeddings=max_tokens,
        embedding_dropout=dropout,
        attention_dropout=dropout,
        mlp_dropout=dropout,
        classifier_pooling="mean",
        initializer_range=0.1,  # ours: at widths of a few dozen the default of 0.02 learns slower
        problem_type=problem,
        id2label=dict(enumerate(labels or ("score",))),
        label2id={label: n for n, label in enumerate(labels or ("score",))},
        bos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        **ids,
    )
    if family == "token-classification":
        return ModernBertForTokenClassification(config)
    return ModernBertForSequenceClassification(config)


def get_auto_class(family: Family) -> Any:
    """Return transformers' auto class for `family`; sequence classification also stands for regression."""
    return {
        "decoder-only": AutoModelForCausalLM,
        "encoder-decoder": AutoModelForSeq2SeqLM,
        "token-classification": AutoModelForTokenClassification,
    }.get(family, AutoModelForSequenceClassification)


def load_model(
    folder: str | Path, family: Family, precision: str = "fp32", **arguments: Any
) -> PreTrainedModel:
    """Load a checkpoint folder or hub name as a model of `family`; precision: "fp32", "bf16" or "fp64".

    Corrects `tie_word_embeddings` in its config. arguments: further ones of `from_pretrained`, such as
    `revision`. ConfigError: a language model's files lack weights, which the library would draw at random.
    """
    with hide_progress_bars():
        model, report = get_auto_class(family).from_pretrained(
            str(folder),
            dtype=PRECISION_DTYPES[precision],
            trust_remote_code=False,
            output_loading_info=True,
            **arguments,
        )
    missing = sorted(report["missing_keys"])
    if missing and family not in CLASSIFIER_FAMILIES:  # a classifier's head may be new
        raise ConfigError(
            f"{folder}: its files lack {len(missing)} of the model's weights, such as {missing[0]}: copy all "
            "of the model's files"
        )
    mark_untied_head(model)
    return model


def load_tokenizer(folder: str | Path, **arguments: Any) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder or hub name; if it has no pad token, its EOS token becomes that.

    ConfigError: the folder or hub name has none, or files that cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **arguments)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{str(folder)!r} has no tokenizer that transformers can read: tokenizer.json, or another form "
            "of it, is missing or damaged; save the model's tokenizer there"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Context manager: turn transformers' progress bars off within the block, then restore them."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def count_trainable_parameters(model: PreTrainedModel) -> int:
    """Return the number of trainable weights (scalars) of a model; a pack's are summed over its cells."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
