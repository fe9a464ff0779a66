"""Two tokenizations of one text, cut at the places where both of them have a token's end."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

REPLACEMENT_CHARACTER = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""
TokenEnds = list[int | None]
"""For each token how many characters of the text are there once it is read; None: it adds none."""
Span = tuple[list[int], list[int]]
"""Numbers of the tokens on either side that cover the same stretch of text."""


@dataclass(frozen=True)
class DecodedText:
    """The text that token ids stand for; the end of sequence counts as one more character behind it.

    Tokens that are no text (special ones, what follows the end, the beginning of a character that never came)
    have no place in it.
    """

    text: str
    ends: TokenEnds
    is_complete: bool


def non_text_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that a text has no place for: padding, the ends, what a chat template writes, the unknown token."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def decode_completion(
    tokenizer: Any, ids: Sequence[int], end_ids: Collection[int], non_text: Collection[int]
) -> DecodedText:
    """The text of a completion, whatever way it was split: a student need not split as its tokenizer would.

    tokenizer: a fast one. end_ids: the first of them ends the text. special: its `no_text`.
    """
    stop = next((n for n, i in enumerate(ids) if i in end_ids), len(ids))
    written = [n for n in range(stop) if ids[n] not in non_text]
    text, lengths = _decode_prefixes(tokenizer, [ids[n] for n in written])
    ends: TokenEnds = [None] * len(ids)
    for n, length in zip(written, lengths, strict=True):
        ends[n] = length
    if stop < len(ids):
        ends[stop] = len(text) + 1
    return DecodedText(text, ends, stop < len(ids))


def _decode_prefixes(tokenizer: Any, ids: Sequence[int]) -> tuple[str, TokenEnds]:
    """The text as far as it has whole characters, and how much of it is there after each token.

    Every beginning is decoded by itself, as what a token adds depends on those before it: 8 ms for 320 tokens
    of a byte-level tokenizer. `DecodeStream`, which takes 0.3, raises for bytes that make up no character.
    """
    beginnings = [list(ids[: n + 1]) for n in range(len(ids))]
    texts = tokenizer.backend_tokenizer.decode_batch(beginnings, skip_special_tokens=False)
    whole = texts[-1] if texts else ""
    ends: TokenEnds = []
    waiting = 0
    for text in texts:
        waiting += 1
        if whole.startswith(text) and not text.endswith(REPLACEMENT_CHARACTER) and text:
            ends += [len(text)] * waiting
            waiting = 0
    told = next((end for end in reversed(ends) if end is not None), 0)
    return whole[:told], [*ends, *[None] * waiting]


def encode_completion(
    tokenizer: Any, decoded: DecodedText, non_text: Collection[int], *, is_encoder_decoder: bool
) -> tuple[list[int], TokenEnds]:
    """The same completion in a tokenizer's own ids, as `target_ids` would give them, and their ends.

    special: its `no_text`; where it reads something as unknown, that is text.
    """
    kind: dict[str, Any] = {"text_target": decoded.text} if is_encoder_decoder else {"text": decoded.text}
    found = tokenizer(
        **kind, add_special_tokens=is_encoder_decoder, return_offsets_mapping=True, verbose=False
    )
    end = tokenizer.eos_token_id
    ids: list[int] = list(found["input_ids"])
    ends: TokenEnds = [
        None if i in non_text and i != tokenizer.unk_token_id else last
        for i, (_, last) in zip(ids, found["offset_mapping"], strict=True)
    ]
    if ids and ids[-1] == end:
        ids, ends = ids[:-1], ends[:-1]
    return ([*ids, end], [*ends, len(decoded.text) + 1]) if decoded.is_complete else (ids, ends)


def align_spans(first: TokenEnds, second: TokenEnds) -> list[Span]:
    """The shortest stretches of text that both sides cover with whole tokens, in their order.

    What lies behind the last common end, as where one side gave up within a word, is in none of them.
    """
    common = sorted({end for end in first if end is not None} & {end for end in second if end is not None})
    return list(zip(_group_by_span(first, common), _group_by_span(second, common), strict=True))


def _group_by_span(ends: TokenEnds, marks: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in marks]
    for position, end in enumerate(ends):
        if end is not None and marks and end <= marks[-1]:
            found[bisect_left(marks, end)].append(position)
    return found


def check_token_ends(owner: str, tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer that is not there, is not fast, or has no end of sequence."""
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
