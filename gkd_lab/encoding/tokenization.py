"""Texts as the token ids that a model learnt to read: what its tokenizer puts around a text is kept."""

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

TokenIds = list[int]


def tokenize_prompts(tokenizer: Any, texts: Sequence[str], *, is_encoder_decoder: bool) -> list[TokenIds]:
    """Prompts that are texts, not written by a chat template, which says itself what surrounds them.

    A source ends as the tokenizer ends it; a decoder's prompt gets what belongs in front of a text, such as
    Gemma's `<bos>`, and nothing behind it, where the completion follows.
    """
    whole = _tokenize(tokenizer, texts, special=True)
    if is_encoder_decoder:
        return whole
    bare = _tokenize(tokenizer, texts, special=False)
    end = tokenizer.eos_token_id
    return [_find_prefix(ids, inner, end) + inner for ids, inner in zip(whole, bare, strict=True)]


def tokenize_targets(tokenizer: Any, texts: Sequence[str], *, is_encoder_decoder: bool) -> list[TokenIds]:
    """Completions that are texts; an encoder-decoder's have what its decoder writes first, such as `<s>`."""
    if not is_encoder_decoder or not texts:
        return _tokenize(tokenizer, texts, special=False)
    found: list[TokenIds] = tokenizer(text_target=list(texts), verbose=False)["input_ids"]
    return found


def ensure_end_id(ids: TokenIds, end_ids: Sequence[int]) -> TokenIds:
    """With an end of sequence, the first of `end_ids`, if it holds none of them.

    A chat template may write more behind it, such as a newline: that is trained on, as in TRL.
    """
    return ids if any(i in end_ids for i in ids) else [*ids, end_ids[0]]


def truncate_prompt(tokenizer: Any, ids: TokenIds, limit: int, *, is_encoder_decoder: bool) -> TokenIds:
    """At most `limit` ids: a source's first ones and its own end; a decoder's last ones and its own begin."""
    if len(ids) <= limit:
        return ids
    if not is_encoder_decoder:
        head = [i for i in ids[:1] if i == tokenizer.bos_token_id and limit > 1]
        return head + ids[-(limit - len(head)) :]
    special: Collection[int] = tokenizer.all_special_ids
    tail = list(takewhile(lambda i: i in special, reversed(ids)))[: limit - 1][::-1]
    return ids[: limit - len(tail)] + tail


def _tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[TokenIds]:
    if not texts:
        return []
    # Not verbose: it would warn of long texts, which are cut later.
    found: list[TokenIds] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return found


def _find_prefix(whole: TokenIds, inner: TokenIds, end: int | None) -> TokenIds:
    """What stands before `inner` in `whole`; before nothing that is all but the end of sequence."""
    if not inner:
        return [i for i in whole if i != end]
    starts = range(len(whole) - len(inner) + 1)
    found = next((n for n in starts if whole[n : n + len(inner)] == inner), 0)
    return whole[:found]
