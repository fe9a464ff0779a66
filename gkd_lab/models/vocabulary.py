"""Check that student and teacher share a tokenizer, as a divergence of their distributions requires.

Vocabulary sizes prove nothing: padded heads of one family differ in size, and tokenizers of two families may
have the same size. Shapes: V rows of an output head; the ids of a tokenizer are below V.
"""

import itertools
import warnings
from collections.abc import Collection
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import has_file

from gkd_lab.config.tokenizer_files import PROBE_TEXTS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
MISMATCH_ADVICE = (
    "choose a teacher of the student's family, or use losses across tokenizers, `objectives: [{type: uld}, "
    "{type: cross_entropy}]`"
)


def get_shared_vocabulary_size(
    student: PreTrainedModel,
    teacher: PreTrainedModel | int,
    student_tokenizer: Any,
    teacher_tokenizer: Any | None,
) -> int:
    """Return the smaller head's size, the vocabulary shared; ValueError if the tokenizers' ids differ.

    Further rows are padding of the larger head, as in Qwen2.5 (0.5B: 151936 rows, 7B: 152064, one tokenizer).
    Warns if the teacher's tokenizer is unknown, and if the EOS tokens differ. `teacher` may be the size of
    its vocabulary.

    Raises:
        ValueError: if the tokenizers differ, if the heads differ in size and the teacher's tokenizer is
            unknown, or if a head has no row for one of the tokenizer's ids.
    """
    teacher_size = teacher if isinstance(teacher, int) else get_head_size(teacher)
    sizes = {"student": get_head_size(student), "teacher": teacher_size}
    if teacher_tokenizer is None:
        _check_sizes_without_tokenizer(sizes)
    else:
        appended_tokens = _list_appended_tokens(student_tokenizer, teacher_tokenizer)
        reason = find_tokenizer_difference(student_tokenizer, teacher_tokenizer, appended_tokens)
        if reason is not None:
            raise ValueError(
                f"teacher and student do not share a tokenizer: {reason}; {MISMATCH_ADVICE}. If the teacher "
                "was trained with another tokenizer than its folder's, pass that as "
                "`teacher_processing_class`"
            )
        _warn_appended_tokens(appended_tokens)
        _warn_different_eos(student_tokenizer, teacher_tokenizer)
    check_ids_fit(student_tokenizer, sizes)
    return min(sizes.values())


def get_compared_vocabulary_size(
    student: PreTrainedModel,
    teacher: PreTrainedModel | int,
    student_tokenizer: Any,
    teacher_tokenizer: Any | None,
    *,
    compares_tokens: bool,
) -> int:
    """Return the shared vocabulary size; the student's head size if tokenizers differ and need not match.

    `compares_tokens`: a loss compares token by token, so that tokenizers that differ raise ValueError.
    """
    if not compares_tokens and teacher_tokenizer is not None:
        appended_tokens = _list_appended_tokens(student_tokenizer, teacher_tokenizer)
        if find_tokenizer_difference(student_tokenizer, teacher_tokenizer, appended_tokens) is not None:
            student_size = get_head_size(student)
            check_ids_fit(student_tokenizer, {"student": student_size})
            return student_size
    return get_shared_vocabulary_size(student, teacher, student_tokenizer, teacher_tokenizer)


def get_head_size(model: PreTrainedModel) -> int:
    """Return V, the number of logits: `out_features` of the output head, else `config.vocab_size`."""
    head = model.get_output_embeddings()
    # Not `weight.shape`: that is 0 under ZeRO-3 and has a cell axis in a pack.
    return model.config.get_text_config().vocab_size if head is None else head.out_features


def find_tokenizer_difference(a: Any, b: Any, ignored_tokens: Collection[str] = ()) -> str | None:
    """Return a text with an example of how two tokenizers' ids differ in meaning; None if they are equal.

    Compares every vocabulary entry, except `ignored_tokens` of `a`, and the ids of probe texts. Padding, EOS
    and BOS tokens and chat template may differ, as they do between base and instruct models of one family.
    """
    entries = {token: token_id for token, token_id in a.get_vocab().items() if token not in ignored_tokens}
    return _find_entry_difference(entries, b.get_vocab()) or _find_text_difference(a, b, ignored_tokens)


def _list_appended_tokens(student: Any, teacher: Any) -> list[str]:
    """List, sorted, the student's added tokens that the teacher lacks, with ids beyond the teacher's last."""
    teacher_ids = teacher.get_vocab()
    last_id = max(teacher_ids.values())
    return sorted(t for t, n in student.get_added_vocab().items() if t not in teacher_ids and n > last_id)


def _warn_appended_tokens(tokens: Collection[str]) -> None:
    """Warn that the teacher was never trained on these tokens of the student; silent if there are none."""
    if tokens:
        warnings.warn(
            f"the teacher's tokenizer lacks {', '.join(map(repr, tokens))}: the teacher was not trained on "
            "them, so use them for padding only, not in text",
            stacklevel=3,
        )


def load_model_tokenizer(model: PreTrainedModel) -> Any | None:
    """Load the tokenizer from where `model` was loaded from; None if there is none or it cannot be loaded.

    Never runs remote code. Checks for files first: without them transformers creates an empty tokenizer.
    """
    location = getattr(model, "name_or_path", "")
    if not location:
        return None
    try:
        if not any(has_file(location, name) for name in TOKENIZER_FILES):
            return None
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        # No such repository, no connection, remote code, or a missing package.
        return None


def _check_sizes_without_tokenizer(sizes: dict[str, int]) -> None:
    """Raise ValueError if the heads differ in size, else warn that the teacher's tokenizer is unknown."""
    advice = "pass the teacher's tokenizer as `teacher_processing_class=...`"
    if sizes["student"] != sizes["teacher"]:
        raise ValueError(
            f"the student has {sizes['student']} vocabulary entries and the teacher {sizes['teacher']}, and "
            f"the teacher's tokenizer is unknown, so the extra ones may be more than padding: {advice}, "
            f"or {MISMATCH_ADVICE}"
        )
    warnings.warn(
        f"teacher and student have {sizes['student']} vocabulary entries each, but the teacher's "
        f"tokenizer is unknown and was not compared: {advice}",
        stacklevel=3,
    )


def _warn_different_eos(student: Any, teacher: Any) -> None:
    """Warn if the EOS ids of the student's and the teacher's tokenizer differ."""
    if student.eos_token_id != teacher.eos_token_id:
        warnings.warn(
            f"the student's sequences end with {student.eos_token!r}, the teacher's with "
            f"{teacher.eos_token!r}, so the teacher gives the student's a low probability: set "
            "`tokenizer.eos_token` of the student to the teacher's",
            stacklevel=3,
        )


def check_ids_fit(tokenizer: Any, sizes: dict[str, int]) -> None:
    """Raise ValueError if the tokenizer's highest id is not below each size in `sizes` (model name -> V)."""
    token, last_id = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    for owner, size in sizes.items():
        if last_id >= size:
            raise ValueError(
                f"the tokenizer's token {token!r} has id {last_id}, but the {owner} has {size} vocabulary "
                f"entries: call `resize_token_embeddings({last_id + 1})` on the {owner}, or remove added "
                "tokens"
            )


def _find_entry_difference(a: dict[str, int], b: dict[str, int]) -> str | None:
    """Return a text with the number of entries that differ and the first of them; None if all are equal."""
    differing = a.items() ^ b.items()
    if not differing:
        return None
    token, _ = min(differing, key=lambda entry: (entry[1], entry[0]))
    ids = " and ".join("no id" if ids.get(token) is None else f"id {ids[token]}" for ids in (a, b))
    # An entry with two ids is in the symmetric difference twice.
    count = len({name for name, _ in differing})
    return f"{count} vocabulary entries differ, for example {token!r} has {ids}"


def _find_text_difference(a: Any, b: Any, ignored_tokens: Collection[str]) -> str | None:
    """Return how two tokenizers split a probe text differently, the first such text; None if none differs."""
    special = dict.fromkeys(
        t for t in [*a.all_special_tokens, *b.all_special_tokens] if t not in ignored_tokens
    )
    for text in (*PROBE_TEXTS, *(f"a{token}b {token}" for token in special)):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (a, b)]
        if ids[0] != ids[1]:
            equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False))
            n = sum(1 for _ in equal)
            tokens = [a.convert_ids_to_tokens(text_ids[n : n + 3]) for text_ids in ids]
            return f"they split {text!r} differently: from token {n} on {tokens[0]} and {tokens[1]}"
    return None
