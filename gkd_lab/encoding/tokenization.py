"""Tokenize prompts and targets with the special tokens that the model's tokenizer puts around a text."""

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

TokenIds = list[int]


def tokenize_prompts(tokenizer: Any, texts: Sequence[str], *, is_encoder_decoder: bool) -> list[TokenIds]:
    """Return each prompt's ids with special tokens: an encoder's all, a decoder's only those in front.

    For texts that no chat template has rendered. Those in front are such as Gemma's `<bos>`; at its end a
    decoder's prompt gets none, as the completion follows.
    """
    with_special = _tokenize(tokenizer, texts, special=True)
    if is_encoder_decoder:
        return with_special
    plain = _tokenize(tokenizer, texts, special=False)
    end = tokenizer.eos_token_id
    return [_find_prefix(ids, inner, end) + inner for ids, inner in zip(with_special, plain, strict=True)]


def tokenize_targets(tokenizer: Any, texts: Sequence[str], *, is_encoder_decoder: bool) -> list[TokenIds]:
    """Return the ids of each completion: without special tokens, or an encoder-decoder's as `text_target`.

    As a `text_target` it gets the first tokens of its decoder, such as `<s>`.
    """
    if not is_encoder_decoder or not texts:
        return _tokenize(tokenizer, texts, special=False)
    ids: list[TokenIds] = tokenizer(text_target=list(texts), verbose=False)["input_ids"]
    return ids


def check_is_text(text: str) -> None:
    """Raise ValueError for a text with half of a character, which no tokenizer reads, and show its place.

    JSON that was cut within an escaped emoji has one: a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 30) : error.start + 10]
        raise ValueError(
            f"a row's text holds half of a character, such as a cut emoji, in {near!r}: remove or replace it"
        ) from error


def ensure_end_id(tokenizer: Any, ids: TokenIds, end_ids: Sequence[int]) -> TokenIds:
    """Return the ids, with the first of `end_ids` appended unless they end with one of them.

    White space that a chat template puts after the end, such as a newline, is trained on, as in TRL. An end
    within the text, as in a text about tokens, does not end it.
    """
    last_end = max((index for index, token in enumerate(ids) if token in end_ids), default=None)
    is_ended = (
        last_end is not None and not tokenizer.decode(ids[last_end + 1 :], skip_special_tokens=True).strip()
    )
    return ids if is_ended else [*ids, end_ids[0]]


def truncate_prompt(tokenizer: Any, ids: TokenIds, limit: int, *, is_encoder_decoder: bool) -> TokenIds:
    """Keep `limit` ids: an encoder's first ids and final special tokens, a decoder's BOS and last ids."""
    if len(ids) <= limit:
        return ids
    if not is_encoder_decoder:
        bos = [i for i in ids[:1] if i == tokenizer.bos_token_id and limit > 1]
        return bos + ids[-(limit - len(bos)) :]
    special_ids: Collection[int] = tokenizer.all_special_ids
    end = list(takewhile(lambda i: i in special_ids, reversed(ids)))[: limit - 1][::-1]
    return ids[: limit - len(end)] + end


def _tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[TokenIds]:
    """Return the ids of each text, with or without the tokenizer's special tokens, untruncated."""
    if not texts:
        return []
    # verbose=False: no warning about long texts, which are truncated later.
    ids: list[TokenIds] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _find_prefix(ids: TokenIds, inner: TokenIds, end_id: int | None) -> TokenIds:
    """Return the ids in front of `inner` in `ids`; all but the end of sequence if `inner` is empty.

    Empty if `inner` is not in `ids`.
    """
    if not inner:
        return [i for i in ids if i != end_id]
    starts = range(len(ids) - len(inner) + 1)
    return ids[: next((n for n in starts if ids[n : n + len(inner)] == inner), 0)]
