"""Whether two models speak of the same tokens, which a loss between their distributions assumes.

Sizes prove nothing: padded heads of one family differ in size, tokenizers of two families may agree in it.
Shapes: V rows of an output head; the ids of a tokenizer are below V.
"""

import itertools
import warnings
from collections.abc import Collection
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import has_file

PROBE_TEXTS = (
    "Hello, world! Don't we'll I've",
    "  two spaces\n\n\tand a tab \r\n  ",
    "naïve café, Ünïcödé ﬁ ｆｕｌｌ, 漢字かな, 한국어, العربية, हिन्दी, ру́сский, 🙂👩‍👩‍👧 e\u0301",
    "0 007 3.14159 1,000,000 2024-01-31 ½ ²",
    "def f(x):\n    return {'a': x ** 2}  # <b>&amp;</b> \\n $x_1$\n",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
MISMATCH_ADVICE = (
    "choose a teacher of the student's family, or let this one read the text in its own tokens, `objectives: "
    "[{type: uld}, {type: cross_entropy}]`"
)


def get_shared_vocabulary_size(
    student: PreTrainedModel,
    teacher: PreTrainedModel | int,
    student_tokenizer: Any,
    teacher_tokenizer: Any | None,
) -> int:
    """How many leading vocabulary entries both models can be compared on: the smaller of both heads.

    What lies beyond is padding of the larger head, as in Qwen2.5 (0.5B: 151936 rows, 7B: 152064, one
    tokenizer). Warns where only the equal size speaks for the pair, and where the ends of sequence differ.
    `teacher` may be the number of its entries alone.

    Raises:
        ValueError: if the tokenizers differ, or heads of two sizes come with no proof that they agree, or a
            head has no row for one of the tokenizer's ids.
    """
    of_teacher = teacher if isinstance(teacher, int) else get_head_size(teacher)
    sizes = {"student": get_head_size(student), "teacher": of_teacher}
    if teacher_tokenizer is None:
        _check_sizes_without_tokenizer(sizes)
    else:
        spare = _list_appended_tokens(student_tokenizer, teacher_tokenizer)
        reason = find_tokenizer_difference(student_tokenizer, teacher_tokenizer, spare)
        if reason is not None:
            raise ValueError(
                f"teacher and student do not share a tokenizer: {reason}; {MISMATCH_ADVICE}. If the teacher was "
                "trained with another tokenizer than its folder's, give it as `teacher_processing_class`"
            )
        _warn_appended_tokens(spare)
        _warn_different_eos(student_tokenizer, teacher_tokenizer)
    _check_ids_fit(student_tokenizer, sizes)
    return min(sizes.values())


def get_compared_vocabulary_size(
    student: PreTrainedModel,
    teacher: PreTrainedModel | int,
    student_tokenizer: Any,
    teacher_tokenizer: Any | None,
    *,
    compares_tokens: bool,
) -> int:
    """`shared_vocabulary`; the student's own where tokens differ and nothing is compared token by token."""
    if compares_tokens or teacher_tokenizer is None:
        return get_shared_vocabulary_size(student, teacher, student_tokenizer, teacher_tokenizer)
    spare = _list_appended_tokens(student_tokenizer, teacher_tokenizer)
    if find_tokenizer_difference(student_tokenizer, teacher_tokenizer, spare) is None:
        return get_shared_vocabulary_size(student, teacher, student_tokenizer, teacher_tokenizer)
    own = get_head_size(student)
    _check_ids_fit(student_tokenizer, {"student": own})
    return own


def get_head_size(model: PreTrainedModel) -> int:
    """V, the width of the logits: rows of the output head, which `config.vocab_size` need not tell."""
    head = model.get_output_embeddings()
    # Not `weight.shape`: that is 0 under ZeRO-3 and has a cell axis in a pack.
    return model.config.get_text_config().vocab_size if head is None else head.out_features


def find_tokenizer_difference(a: Any, b: Any, ignored_tokens: Collection[str] = ()) -> str | None:
    """Why the ids of two tokenizers do not mean the same, with an example; None if they do.

    Compared: every entry of the vocabulary but `spare` ones of `a`, and the ids of probe texts. Padding, end
    and beginning of sequence and chat template may differ, as they do between base and instruct models of
    one family.
    """
    entries = {token: number for token, number in a.get_vocab().items() if token not in ignored_tokens}
    return _find_entry_difference(entries, b.get_vocab()) or _find_text_difference(a, b, ignored_tokens)


def _list_appended_tokens(student: Any, teacher: Any) -> list[str]:
    """Tokens that a script added to the student's tokenizer, behind all of the teacher's."""
    known = teacher.get_vocab()
    last = max(known.values())
    return sorted(t for t, n in student.get_added_vocab().items() if t not in known and n > last)


def _warn_appended_tokens(tokens: Collection[str]) -> None:
    if tokens:
        warnings.warn(
            f"the teacher's tokenizer lacks {', '.join(map(repr, tokens))}: the teacher never learnt what they"
            " mean, so they should be padding, not text",
            stacklevel=3,
        )


def load_model_tokenizer(model: PreTrainedModel) -> Any | None:
    """The tokenizer in the folder or hub repository that `model` was loaded from; None if there is none.

    Remote code is never run. A tokenizer needs files: without them transformers makes up an empty one.
    """
    place = getattr(model, "name_or_path", "")
    if not place:
        return None
    try:
        if not any(has_file(place, name) for name in TOKENIZER_FILES):
            return None
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        # No such repository, no connection, a class of its own, or a missing package: unknown.
        return None


def _check_sizes_without_tokenizer(sizes: dict[str, int]) -> None:
    prove = "pass the teacher's tokenizer as `teacher_processing_class=...`"
    if sizes["student"] != sizes["teacher"]:
        raise ValueError(
            f"the student has {sizes['student']} vocabulary entries and the teacher {sizes['teacher']}, and "
            f"the teacher's tokenizer is unknown, so the extra ones may be more than padding: {prove}, "
            f"or {MISMATCH_ADVICE}"
        )
    warnings.warn(
        f"teacher and student have {sizes['student']} vocabulary entries each, but the teacher's "
        f"tokenizer is unknown and was not compared: {prove}",
        stacklevel=3,
    )


def _warn_different_eos(student: Any, teacher: Any) -> None:
    if student.eos_token_id != teacher.eos_token_id:
        warnings.warn(
            f"the student's sequences end with {student.eos_token!r}, the teacher's with "
            f"{teacher.eos_token!r}, so the teacher rates the student's end as unlikely: set "
            "`tokenizer.eos_token` of the student if that is not meant",
            stacklevel=3,
        )


def _check_ids_fit(tokenizer: Any, sizes: dict[str, int]) -> None:
    token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    for owner, size in sizes.items():
        if last >= size:
            raise ValueError(
                f"the tokenizer's token {token!r} has id {last}, but the {owner} has {size} vocabulary "
                f"entries: call `resize_token_embeddings({last + 1})` on the {owner}, or remove added tokens"
            )


def _find_entry_difference(a: dict[str, int], b: dict[str, int]) -> str | None:
    differing = a.items() ^ b.items()
    if not differing:
        return None
    token, _ = min(differing, key=lambda entry: (entry[1], entry[0]))
    ids = " and ".join("no id" if ids.get(token) is None else f"id {ids[token]}" for ids in (a, b))
    # An entry that moved counts twice, under its old and its new id.
    count = len({name for name, _ in differing})
    return f"{count} vocabulary entries differ, for example {token!r} has {ids}"


def _find_text_difference(a: Any, b: Any, ignored_tokens: Collection[str]) -> str | None:
    special = dict.fromkeys(
        t for t in [*a.all_special_tokens, *b.all_special_tokens] if t not in ignored_tokens
    )
    for text in (*PROBE_TEXTS, *(f"a{token}b {token}" for token in special)):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (a, b)]
        if ids[0] != ids[1]:
            agreed = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False))
            n = sum(1 for _ in agreed)
            tokens = [a.convert_ids_to_tokens(found[n : n + 3]) for found in ids]
            return f"they split {text!r} differently: token {n} and on are {tokens[0]} and {tokens[1]}"
    return None
