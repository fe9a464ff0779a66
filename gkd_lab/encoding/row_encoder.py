"""Encode a dataset row (chat, texts or token ids) as the token ids of its prompt and completion.

The prompt is what the model reads before it answers: neither its text nor its ids depend on the reference.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.tokenization import (
    check_is_text,
    ensure_end_id,
    tokenize_prompts,
    tokenize_targets,
    truncate_prompt,
)
from gkd_lab.encoding.trl_batch import NOT_TRAINED

RowMapping = Mapping[str, Any]
Messages = Sequence[RowMapping]

IMAGE_COLUMNS = ("image", "images", "pixel_values")
PROMPT_ROLES = ("system", "developer", "user", "tool", "function", "environment", "ipython")
"""Roles whose messages are never the answer; a last message of any other role, such as `assistant`, is."""
ROW_FORMS = """\
  `messages`: the last assistant turn is the target; without one the row is a prompt
  `prompt`, with or without `completion`: both texts or both lists of messages
  `prompt` (the templated text) with `messages`
  `input_ids` with `completion_mask`, `labels` (-100: not trained) or `prompt`
  `prompt_ids`, with or without `completion_ids`"""


class RowEncoder:
    """Encodes a dataset row as an `Example`; prompt and completion are truncated separately.

    max_length: limit of prompt plus completion in tokens, or None. A prompt keeps its last
        `max_length - min(max_new_tokens, max_length // 2)` tokens, the completion the first ones of what is
        then left. Source and target of an encoder-decoder each keep their first `max_length`.
    formatting_func: maps a row to a row before it is encoded.
    end_ids: further end-of-sequence ids. A text completion that has none, nor the tokenizer's, gets the
        tokenizer's; ready-made ids are not changed.
    reads_teacher: whether the column `teacher` holds the number of the teacher that a row is routed to.

    `rows_read`, `prompts_cut` and `completions_cut` count encoded and truncated rows. An `Example` is
    returned as it is and not counted.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        is_encoder_decoder: bool,
        max_length: int | None,
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
        formatting_func: Callable[[RowMapping], RowMapping] | None = None,
        reads_teacher: bool = False,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length}: a prompt and a completion need at least 2 tokens")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: it must be at least 1")
        self.tokenizer, self.is_encoder_decoder = tokenizer, is_encoder_decoder
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.end_ids = [*(i for i in [tokenizer.eos_token_id] if i is not None), *end_ids]
        self.formatting_func, self.reads_teacher = formatting_func, reads_teacher
        self.rows_read = self.prompts_cut = self.completions_cut = 0

    def __call__(self, row: RowMapping | Example) -> Example:
        """Encode a row; without a target its completion is empty. ValueError for an unknown row format."""
        if isinstance(row, Example):
            return row
        row = self._apply_formatting(row)
        example = self._truncate_example(self._encode_row(row))
        return replace(example, teacher_index=read_teacher_index(row)) if self.reads_teacher else example

    def _apply_formatting(self, row: RowMapping) -> RowMapping:
        """Return the row, mapped by `formatting_func` if set, as its author wrote it (`_drop_fillers`)."""
        formatted: Any = row if self.formatting_func is None else self.formatting_func(row)
        if not isinstance(formatted, Mapping):
            raise ValueError(
                f"formatting_func returned {type(formatted).__name__}, which does not say where the prompt "
                "ends: return a row, such as {'prompt': ..., 'completion': ...} or {'messages': [...]}"
            )
        return {column: _drop_fillers(value) for column, value in formatted.items() if value is not None}

    def _encode_row(self, row: RowMapping) -> Example:
        """Encode a formatted row, untruncated, by its `input_ids`, `prompt_ids`, `messages` or `prompt`."""
        _refuse_images(row)
        if "input_ids" in row:
            return self._encode_input_ids(row)
        if "prompt_ids" in row:
            return Example(_parse_integers(row["prompt_ids"]), _parse_integers(row.get("completion_ids", ())))
        if "messages" in row:
            return self._encode_messages(row, _read_messages(row, "messages"))
        if "prompt" in row:
            return self._encode_prompt_row(row)
        raise ValueError(
            f"no prompt can be read from a row with the columns {sorted(row)}; known:\n{ROW_FORMS}"
        )

    # Chats

    def _encode_messages(self, row: RowMapping, messages: Messages) -> Example:
        """Encode a chat: the last message, if the assistant's, is the completion, else that is empty."""
        prompt = row.get("prompt")
        if not isinstance(prompt, str | None):
            raise ValueError("`prompt` as a list and `messages` both hold the chat: remove one of the two")
        has_answer = messages[-1]["role"] not in PROMPT_ROLES
        if prompt is None:
            prompt = self._render_prompt(row, messages[:-1] if has_answer else messages)
        return self._encode_chat(prompt, self._render_answer(row, messages, prompt) if has_answer else None)

    def _render_prompt(self, row: RowMapping, messages: Messages) -> str:
        """Return the messages as text by the chat template, up to the beginning of the assistant's answer."""
        if not messages:
            raise ValueError("`messages` holds nothing before the assistant's turn: there is no prompt")
        if self._uses_plain_text():
            return self._join_contents(row, messages)
        return self._apply_chat_template(row, messages, add_generation_prompt=True)

    def _render_answer(self, row: RowMapping, messages: Messages, prompt: str) -> str:
        """Return the answer: what the rendered chat has after `prompt`; ValueError if it begins otherwise."""
        if self._uses_plain_text():
            return self._join_contents(row, messages[-1:])
        text = self._apply_chat_template(row, messages)
        if not text.startswith(prompt):
            has_prompt_column = row.get("prompt") is not None
            raise ValueError(_explain_prompt_mismatch(prompt, text, has_prompt_column=has_prompt_column))
        return text.removeprefix(prompt)

    def _encode_chat(self, prompt: str, answer: str | None) -> Example:
        """Tokenize a rendered prompt and answer into an `Example`; None as answer: an empty completion.

        Both are tokenized as one text unless that changes the prompt's ids: a tokenizer that marks the
        beginning of a text would mark the answer's too if it were tokenized alone.
        """
        if self._uses_plain_text():
            return self._encode_texts(prompt, answer)
        prompt_ids = self._tokenize_prompt(prompt)
        if answer is None:
            return Example(prompt_ids, [])
        if not self.is_encoder_decoder:
            ids = self._tokenize(prompt + answer)
            if ids[: len(prompt_ids)] == prompt_ids:
                return Example(prompt_ids, self._append_end_id(ids[len(prompt_ids) :]))
        return Example(prompt_ids, self._append_end_id(self._tokenize(answer)))

    def _uses_plain_text(self) -> bool:
        """Check for an encoder-decoder without a chat template, for which the messages' texts are joined."""
        return self.is_encoder_decoder and self.tokenizer.chat_template is None

    def _join_contents(self, row: RowMapping, messages: Messages) -> str:
        """Return the texts of the messages without their roles, one per line; ValueError for `tools`."""
        if row.get("tools"):
            raise ValueError("`tools` need a chat template, and this tokenizer has none: remove the column")
        return "\n".join(text for message in messages for text in list_message_texts(message))

    def _apply_chat_template(self, row: RowMapping, messages: Messages, **options: Any) -> str:
        """Return the messages rendered as text by the chat template, with the row's tools and arguments."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the row holds messages and the tokenizer has no chat template: set "
                "`tokenizer.chat_template`, or give the rows as texts in `prompt` and `completion`"
            )
        messages = [_join_text_parts(message) for message in messages]
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options |= row.get("chat_template_kwargs", {})
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, **options
            )
        except (TemplateError, TypeError) as error:
            roles = [message["role"] for message in messages]
            raise ValueError(f"the chat template cannot render messages of {roles}: {error}") from error

    # Texts

    def _encode_prompt_row(self, row: RowMapping) -> Example:
        """Encode `prompt` and `completion` (or none), both texts or both messages; ValueError if mixed."""
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str | None):
            return self._encode_texts(prompt, completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError(
                "one of `prompt` and `completion` is a text and the other a list of messages: give two "
                "texts or two lists"
            )
        messages = _read_messages(row, "prompt")
        if completion:
            return self._encode_messages({**row, "prompt": None}, [*messages, _read_single_answer(row)])
        return self._encode_chat(self._render_open_prompt(row, messages), None)

    def _render_open_prompt(self, row: RowMapping, messages: Messages) -> str:
        """Render a prompt as text; a last message of the assistant is left open, as an answer's beginning."""
        if messages[-1]["role"] != "assistant" or self._uses_plain_text():
            return self._render_prompt(row, messages)
        return self._apply_chat_template(row, messages, continue_final_message=True)

    def _encode_texts(self, prompt: str, completion: str | None) -> Example:
        """Tokenize texts without a chat template into an `Example`; None as completion: an empty one."""
        kind = {"is_encoder_decoder": self.is_encoder_decoder}
        for text in (prompt, completion or ""):
            check_is_text(text)
        (prompt_ids,) = tokenize_prompts(self.tokenizer, [prompt], **kind)
        if completion is None:
            return Example(prompt_ids, [])
        (completion_ids,) = tokenize_targets(self.tokenizer, [completion], **kind)
        return Example(prompt_ids, self._append_end_id(completion_ids))

    def _tokenize_prompt(self, text: str) -> list[int]:
        """Return the ids of a rendered prompt; only an encoder's has the tokenizer's special tokens."""
        return self._tokenize(text, special=self.is_encoder_decoder)

    def _tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of one text, untruncated, with special tokens only if `special`."""
        check_is_text(text)
        # verbose=False: no warning about long texts, which are truncated later.
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _append_end_id(self, ids: list[int]) -> list[int]:
        """Return completion ids, ended by an end-of-sequence id; ValueError without one in the tokenizer."""
        if not self.end_ids:
            raise ValueError("the tokenizer has no end of sequence: set `tokenizer.eos_token`")
        return ensure_end_id(self.tokenizer, ids, self.end_ids)

    # Ready-made ids

    def _encode_input_ids(self, row: RowMapping) -> Example:
        """Split a row's `input_ids` into prompt and completion by mask, labels or prompt, else ValueError."""
        ids = _parse_integers(row["input_ids"])
        attention_mask = _read_token_column(row, "attention_mask", ids)
        if self.is_encoder_decoder and "labels" in row:
            labels = _parse_integers(row["labels"])
            return Example(_select_ids(ids, attention_mask), [i for i in labels if i != NOT_TRAINED])
        trained = _select_ids(self._build_training_mask(row, ids), attention_mask)
        ids = _select_ids(ids, attention_mask)
        start, count = trained.index(1) if 1 in trained else len(ids), sum(trained)
        if sum(trained[start : start + count]) != count:
            raise ValueError(
                "a row trains on several parts with untrained ones between them: an answer is one piece; "
                "make a row of each part, with everything before it as the prompt"
            )
        return Example(ids[:start], ids[start : start + count])

    def _build_training_mask(self, row: RowMapping, ids: list[int]) -> list[int]:
        """Return 1 per trained id, else 0, by `completion_mask`, `labels` or `prompt`; ValueError without."""
        if "completion_mask" in row:
            return [int(value != 0) for value in _read_token_column(row, "completion_mask", ids)]
        if "labels" in row:
            labels = _read_token_column(row, "labels", ids)
            if any(label not in (NOT_TRAINED, i) for label, i in zip(labels, ids, strict=True)):
                raise ValueError(
                    "`labels` differ from `input_ids` where they are not -100: do not shift them"
                )
            return [int(label != NOT_TRAINED) for label in labels]
        if "prompt" in row:
            text = row["prompt"]
            if not isinstance(text, str):
                text = self._render_open_prompt(row, _read_messages(row, "prompt"))
            else:
                kind = {"is_encoder_decoder": self.is_encoder_decoder}
                (prompt_ids,) = tokenize_prompts(self.tokenizer, [text], **kind)
                if ids[: len(prompt_ids)] == prompt_ids:
                    return _mask_completion(prompt_ids, ids)
            return _mask_completion(self._tokenize_prompt(text), ids)
        raise ValueError("`input_ids` alone do not say where the prompt ends: add `completion_mask`")

    # Limits

    def _truncate_example(self, example: Example) -> Example:
        """Return the example truncated to `max_length`; count truncated parts, and warn the first time."""
        prompt, completion = example.prompt_ids, example.completion_ids
        if not prompt:
            raise ValueError("the prompt is empty: a completion needs at least one token to follow from")
        short_prompt, short_completion = self._truncate_ids(prompt, completion)
        was_truncated = self.prompts_cut + self.completions_cut > 0
        self.rows_read += 1
        self.prompts_cut += len(short_prompt) < len(prompt)
        self.completions_cut += len(short_completion) < len(completion)
        if not was_truncated and self.prompts_cut + self.completions_cut > 0:
            warnings.warn(
                f"max_length={self.max_length} cuts a row of {len(prompt)} prompt and {len(completion)} "
                f"completion tokens to {len(short_prompt)} and {len(short_completion)}; later rows are cut "
                "without a warning",
                stacklevel=3,
            )
        return Example(short_prompt, short_completion)

    def _truncate_ids(self, prompt: list[int], completion: list[int]) -> tuple[list[int], list[int]]:
        """Return (prompt, completion) cut to `max_length`; the prompt's limit ignores the completion."""
        limit = self.max_length
        if limit is None:
            return prompt, completion
        if self.is_encoder_decoder:
            return truncate_prompt(self.tokenizer, prompt, limit, is_encoder_decoder=True), completion[:limit]
        prompt_limit = limit - min(self.max_new_tokens, limit // 2)
        prompt = truncate_prompt(self.tokenizer, prompt, prompt_limit, is_encoder_decoder=False)
        return prompt, completion[: limit - len(prompt)]


def _drop_fillers(value: Any) -> Any:
    """Return a value without the nulls that `datasets` fills mappings with, at any depth.

    It gives every mapping the keys of all. A message keeps its `content`, which templates ask for.
    """
    if isinstance(value, Mapping):
        fields = {key: _drop_fillers(item) for key, item in value.items() if item is not None}
        return {**fields, "content": None} if "role" in fields and "content" not in fields else fields
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        return [_drop_fillers(item) for item in value]
    return value


def _join_text_parts(message: RowMapping) -> RowMapping:
    """Return a message whose content is one text: its parts, joined. ValueError for a part without text.

    Templates of text models print a list of parts as Python writes it, or leave it out.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    return {**message, "content": "".join(list_message_texts(message))}


def _refuse_images(row: RowMapping) -> None:
    """Raise ValueError for a row with an image column or a message part that is not text."""
    columns = [name for name in IMAGE_COLUMNS if name in row and not _is_empty_list(row[name])]
    types = {part["type"] for part in _list_content_parts(row) if part.get("type", "text") != "text"}
    if columns or types:
        image = f"the column `{columns[0]}`" if columns else f"a message part of type {min(types)!r}"
        raise ValueError(
            f"GKDTrainer distils text, and the row has {image}: use trl.DistillationTrainer for vision "
            "models, or remove it"
        )


def _is_empty_list(value: Any) -> bool:
    """Check whether a value is an empty list or tuple."""
    return isinstance(value, list | tuple) and not value


def _list_content_parts(row: RowMapping) -> list[RowMapping]:
    """List the content parts (dicts) of all the row's messages; a content that is plain text has none."""
    turns = [row[c] for c in ("messages", "prompt", "completion") if isinstance(row.get(c), list | tuple)]
    contents = [message.get("content") for turn in turns for message in turn if isinstance(message, Mapping)]
    part_lists = [content for content in contents if isinstance(content, list | tuple)]
    return [part for parts in part_lists for part in parts if isinstance(part, Mapping)]


def _read_messages(row: RowMapping, column: str) -> list[RowMapping]:
    """Return a column's messages as a list; ValueError if it is not a filled list of dicts with a `role`."""
    messages = row[column]
    are_messages = isinstance(messages, list | tuple) and all(
        isinstance(m, Mapping) and "role" in m for m in messages
    )
    if not are_messages or not messages:
        raise ValueError(
            f"`{column}` is {messages!r:.80}: it must be a list of messages such as "
            "{'role': 'user', 'content': 'text'}"
        )
    return list(messages)


def read_teacher_index(row: RowMapping) -> int:
    """Return the integer in the row's column `teacher`, or -1 without one; ValueError for another type."""
    index = row.get("teacher", -1)
    if isinstance(index, bool) or not isinstance(index, int):
        raise ValueError(
            f"the column `teacher` holds {index!r}: a routed divergence reads the number of a teacher there, "
            "0 for the first; rename a column that holds something else"
        )
    return index


def _read_single_answer(row: RowMapping) -> RowMapping:
    """Return the one message in `completion`; ValueError unless it is a single assistant turn."""
    completion = _read_messages(row, "completion")
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        raise ValueError(
            f"`completion` holds messages of {roles}: it must be one assistant turn; earlier messages "
            "belong in `prompt`"
        )
    return completion[0]


def list_message_texts(message: RowMapping) -> list[str]:
    """List a message's texts: its content as one text, or the text of each of its content parts.

    Raises ValueError for a content of another kind, and for a part without text.
    """
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"the content of a message of {message['role']!r} is {content!r:.60}: expected a text, or a list "
            "of parts such as {'type': 'text', 'text': ...}"
        )
    return [_read_part_text(part, message["role"]) for part in content]


def _read_part_text(part: Any, role: str) -> str:
    """Return the text of a content part: a text, or a mapping with one. ValueError for anything else."""
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise ValueError(
            f"a part of a message of {role!r} is {part!r:.60}: expected {{'type': 'text', 'text': ...}}"
        )
    return text


def _explain_prompt_mismatch(prompt: str, text: str, *, has_prompt_column: bool) -> str:
    """Return the error message for a rendered chat, `text`, that does not begin with its rendered prompt."""
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
    if has_prompt_column:
        return (
            f"`prompt` ({prompt!r:.80}) is not how the templated `messages` begin ({text!r:.80}): remove "
            "one of the two columns"
        )
    return (
        f"the chat template ends a prompt with {prompt[length:]!r} where a finished chat has "
        f"{text[length : length + 40]!r}: the reference would follow a prompt that it was not written for. "
        "If that is a block of thoughts, give the reference its own or switch thinking off, as by a column "
        "`chat_template_kwargs` of {'enable_thinking': False}; or give texts in `prompt` and "
        "`completion`; or omit the assistant's turn if you only train on the student's own samples"
    )


def _parse_integers(values: Any) -> list[int]:
    """Return the entries of a list or array as a list of int."""
    return [int(value) for value in values]


def _select_ids(ids: list[int], mask: list[int]) -> list[int]:
    """Return the ids whose mask is not 0."""
    return [i for i, selected in zip(ids, mask, strict=True) if selected]


def _read_token_column(row: RowMapping, name: str, ids: list[int]) -> list[int]:
    """Return a column as integers, one per id; all 1 if it is missing, ValueError for another length."""
    values = _parse_integers(row[name]) if name in row else [1] * len(ids)
    if len(values) != len(ids):
        raise ValueError(
            f"`{name}` has {len(values)} entries and `input_ids` {len(ids)}: one per token is needed"
        )
    return values


def _mask_completion(prompt: list[int], ids: list[int]) -> list[int]:
    """Return 0 per prompt id and 1 per later id; ValueError if `ids` do not begin with `prompt`."""
    if ids[: len(prompt)] != prompt:
        raise ValueError(
            f"`input_ids` begin with {ids[:8]}, the ids of `prompt` with {prompt[:8]}: they differ within "
            "the prompt; mark its end by `completion_mask`"
        )
    return [0] * len(prompt) + [1] * (len(ids) - len(prompt))
