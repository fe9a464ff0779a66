"""Alignment of two tokenizations of one text: spans that both cover with whole tokens."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT_CHARACTER = "\ufffd"
"""What tokenizers decode bytes to that are no character, or an incomplete one."""
TokenEnds = list[int | None]
"""For each token the number of characters up to its end; None: it adds no text."""
Span = tuple[list[int], list[int]]
"""Positions of the tokens on either side that cover the same stretch of text."""


@dataclass(frozen=True)
class DecodedText:
    """The text of token ids; the end of sequence counts as one more character behind it.

    ends: None for tokens that are no text (special ones, those behind the end, an incomplete character).
    is_complete: whether the end of sequence is there.
    """

    text: str
    ends: TokenEnds
    is_complete: bool


def non_text_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of all special tokens: padding, ends, those of chat templates, the unknown token."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def decode_completion(
    tokenizer: Any, ids: Sequence[int], end_ids: Collection[int], non_text: Collection[int]
) -> DecodedText:
    """Return a completion's text up to its end of sequence, and each token's end in characters, or None.

    tokenizer: a fast one. end_ids: the first of them ends the text. non_text: its `non_text_ids`.
    """
    stop = next((n for n, i in enumerate(ids) if i in end_ids), len(ids))
    text_positions = [n for n in range(stop) if ids[n] not in non_text]
    text, lengths = _decode_prefixes(tokenizer, [ids[n] for n in text_positions])
    ends: TokenEnds = [None] * len(ids)
    for n, length in zip(text_positions, lengths, strict=True):
        ends[n] = length
    if stop < len(ids):
        ends[stop] = len(text) + 1
    return DecodedText(text, ends, stop < len(ids))


def _decode_prefixes(tokenizer: Any, ids: Sequence[int]) -> tuple[str, TokenEnds]:
    """Return the text up to its last whole character, and its length after each token, None if incomplete.

    Every prefix is decoded by itself, as the text of a token depends on those before it: 8 ms for 320 tokens
    of a byte-level tokenizer. `DecodeStream`, which takes 0.3, raises for bytes that make up no character.
    """
    prefixes = [list(ids[: n + 1]) for n in range(len(ids))]
    texts = tokenizer.backend_tokenizer.decode_batch(prefixes, skip_special_tokens=False)
    whole = texts[-1] if texts else ""
    ends: TokenEnds = []
    incomplete = 0  # tokens since the last whole character
    for text in texts:
        incomplete += 1
        if whole.startswith(text) and not text.endswith(REPLACEMENT_CHARACTER) and text:
            ends += [len(text)] * incomplete
            incomplete = 0
    length = next((end for end in reversed(ends) if end is not None), 0)
    return whole[:length], [*ends, *[None] * incomplete]


def encode_completion(
    tokenizer: Any, decoded: DecodedText, non_text: Collection[int], *, is_encoder_decoder: bool
) -> tuple[list[int], TokenEnds]:
    """Return a decoded completion's ids in another tokenizer, and the character where each token ends.

    Encoded as a training target, with an end of sequence if the completion has one.
    non_text: its `non_text_ids`; an unknown token counts as text here.
    """
    text: dict[str, Any] = {"text_target": decoded.text} if is_encoder_decoder else {"text": decoded.text}
    encoding = tokenizer(
        **text, add_special_tokens=is_encoder_decoder, return_offsets_mapping=True, verbose=False
    )
    end = tokenizer.eos_token_id
    ids: list[int] = list(encoding["input_ids"])
    ends: TokenEnds = [
        None if i in non_text and i != tokenizer.unk_token_id else last
        for i, (_, last) in zip(ids, encoding["offset_mapping"], strict=True)
    ]
    if ids and ids[-1] == end:
        ids, ends = ids[:-1], ends[:-1]
    return ([*ids, end], [*ends, len(decoded.text) + 1]) if decoded.is_complete else (ids, ends)


def align_spans(first: TokenEnds, second: TokenEnds) -> list[Span]:
    """Return (first, second) token positions of each shortest span that both cover with whole tokens.

    Text behind the last common end, such as a word that one side did not finish, is in no span.
    """
    common = sorted({end for end in first if end is not None} & {end for end in second if end is not None})
    return list(zip(_group_by_span(first, common), _group_by_span(second, common), strict=True))


def _group_by_span(ends: TokenEnds, span_ends: Sequence[int]) -> list[list[int]]:
    """Return for each span the positions of its tokens; others, such as those without text, are left out."""
    positions: list[list[int]] = [[] for _ in span_ends]
    for position, end in enumerate(ends):
        if end is not None and span_ends and end <= span_ends[-1]:
            positions[bisect_left(span_ends, end)].append(position)
    return positions


def check_uld_tokenizer(owner: str, tokenizer: Any) -> None:
    """Raise ValueError if a tokenizer is missing, is not fast, or has no end-of-sequence token.

    owner: "student" or "teacher", for the message.
    """
    if tokenizer is None:
        raise ValueError(
            f"uld needs the {owner}'s tokenizer, and there is none in its folder: pass it as "
            "`teacher_processing_class=...`"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"uld needs to know where the tokens of a text end, and the {owner}'s {type(tokenizer).__name__} "
            "does not tell: load a fast tokenizer (`AutoTokenizer`, with its tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the {owner}'s tokenizer has no end of sequence: set `tokenizer.eos_token`")
