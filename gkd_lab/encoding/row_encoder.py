"""What the rows of a user's data set may look like, and what they mean: a prompt and what is to follow it.

The prompt is what the model sees before it answers: neither its text nor its ids depend on the reference.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.tokenization import ensure_end_id, tokenize_prompts, tokenize_targets, truncate_prompt
from gkd_lab.encoding.trl_batch import NOT_TRAINED

RowMapping = Mapping[str, Any]
Messages = Sequence[RowMapping]

IMAGE_COLUMNS = ("image", "images", "pixel_values")
PROMPT_ROLES = ("system", "developer", "user", "tool", "function", "environment", "ipython")
"""Roles whose turn, as the last one, waits for an answer; any other, such as `assistant`, gives it."""
ROW_FORMS = """\
  `messages`: the last assistant turn is the target; without one the row is a prompt
  `prompt`, with or without `completion`: both texts or both lists of messages
  `prompt` (the templated text) with `messages`
  `input_ids` with `completion_mask`, `labels` (-100: not trained) or `prompt`
  `prompt_ids`, with or without `completion_ids`"""


class RowEncoder:
    """Turns a row of a user's data set into an `Example`: ids of prompt and completion, cut apart.

    max_length bounds prompt plus completion in tokens; None: no bound. A prompt keeps its last
    `max_length - min(max_new_tokens, max_length // 2)` tokens, the completion the first of what is then left.
    Source and target of an encoder-decoder each keep their first `max_length`.
    formatting_func is applied to a row first; it takes a row and returns a row.

    A text completion without an end of sequence, the tokenizer's or another of `end_ids`, gets the
    tokenizer's; ids that come ready-made stay as they are.
    `rows`, `prompts_cut` and `completions_cut` count what was read and cut; an Example passes uncounted.
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
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length}: a prompt and a completion need 2 tokens at least")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: it must be 1 at least")
        self.tokenizer, self.is_encoder_decoder = tokenizer, is_encoder_decoder
        self.max_length, self.max_new_tokens = max_length, max_new_tokens
        self.end_ids = [*(i for i in [tokenizer.eos_token_id] if i is not None), *end_ids]
        self.formatting_func = formatting_func
        self.rows_read = self.prompts_cut = self.completions_cut = 0

    def __call__(self, row: RowMapping | Example) -> Example:
        """The row as ids; without a target its completion is empty. ValueError: the row has no known form."""
        if isinstance(row, Example):
            return row
        formatted = self._apply_formatting(row)
        return replace(
            self._truncate_example(self._encode_row(formatted)), teacher_index=read_teacher_index(formatted)
        )

    def _apply_formatting(self, row: RowMapping) -> RowMapping:
        """The row as the user's function returns it, without the empty columns that Arrow fills in."""
        made: Any = row if self.formatting_func is None else self.formatting_func(row)
        if not isinstance(made, Mapping):
            raise ValueError(
                f"formatting_func returned {type(made).__name__}, which does not say where the prompt ends: "
                "return a row, such as {'prompt': ..., 'completion': ...} or {'messages': [...]}"
            )
        return {column: value for column, value in made.items() if value is not None}

    def _encode_row(self, row: RowMapping) -> Example:
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
        """Either a chat that ends with its target, or a chat that waits for an answer."""
        prompt = row.get("prompt")
        if not isinstance(prompt, str | None):
            raise ValueError(
                "`prompt` as a list beside `messages` says the same twice: remove one of the two"
            )
        answered = messages[-1]["role"] not in PROMPT_ROLES
        if prompt is None:
            prompt = self._render_prompt(row, messages[:-1] if answered else messages)
        if not answered:
            return (
                self._encode_texts(prompt, None)
                if self._uses_plain_text()
                else Example(self._tokenize_prompt(prompt), [])
            )
        answer = self._render_answer(row, messages, prompt)
        return (
            self._encode_texts(prompt, answer)
            if self._uses_plain_text()
            else self._encode_rendered_chat(prompt, answer)
        )

    def _render_prompt(self, row: RowMapping, messages: Messages) -> str:
        """The prompt's text, up to where the assistant begins to write."""
        if not messages:
            raise ValueError("`messages` holds nothing before the assistant's turn: there is no prompt")
        if self._uses_plain_text():
            return self._join_contents(row, messages)
        return self._apply_chat_template(row, messages, add_generation_prompt=True)

    def _render_answer(self, row: RowMapping, messages: Messages, prompt: str) -> str:
        """What the whole chat's text has after the prompt's."""
        if self._uses_plain_text():
            return self._join_contents(row, messages[-1:])
        whole = self._apply_chat_template(row, messages)
        if not whole.startswith(prompt):
            raise ValueError(
                _explain_prompt_mismatch(prompt, whole, has_prompt_column=row.get("prompt") is not None)
            )
        return whole.removeprefix(prompt)

    def _encode_rendered_chat(self, prompt: str, answer: str) -> Example:
        """Joined, so that pieces which mark the begin of a text stay away from the answer's; else apart."""
        prompt_ids = self._tokenize_prompt(prompt)
        if not self.is_encoder_decoder:
            whole = self._tokenize(prompt + answer)
            if whole[: len(prompt_ids)] == prompt_ids:
                return Example(prompt_ids, self._append_end_id(whole[len(prompt_ids) :]))
        return Example(prompt_ids, self._append_end_id(self._tokenize(answer)))

    def _uses_plain_text(self) -> bool:
        return self.is_encoder_decoder and self.tokenizer.chat_template is None

    def _join_contents(self, row: RowMapping, messages: Messages) -> str:
        """Without a template an encoder-decoder reads the contents alone, one a line."""
        if row.get("tools"):
            raise ValueError("`tools` need a chat template, and this tokenizer has none: remove the column")
        return "\n".join(text for message in messages for text in _list_message_texts(message))

    def _apply_chat_template(self, row: RowMapping, messages: Messages, **options: Any) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the row holds messages and the tokenizer has no chat template: set "
                "`tokenizer.chat_template`, or give the rows as texts in `prompt` and `completion`"
            )
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options |= row.get("chat_template_kwargs", {})
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=tools or None, tokenize=False, **options
            )
        except (TemplateError, TypeError) as error:
            roles = [message["role"] for message in messages]
            raise ValueError(f"the chat template cannot write messages of {roles}: {error}") from error

    # Texts

    def _encode_prompt_row(self, row: RowMapping) -> Example:
        prompt, completion = row["prompt"], row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str | None):
            return self._encode_texts(prompt, completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError(
                "`prompt` and `completion` are of different kinds, a text and a list of messages: "
                "give two texts or two lists"
            )
        asked = _read_messages(row, "prompt")
        if completion:
            return self._encode_messages({**row, "prompt": None}, [*asked, _read_single_answer(row)])
        text = self._render_open_prompt(row, asked)
        return (
            self._encode_texts(text, None)
            if self._uses_plain_text()
            else Example(self._tokenize_prompt(text), [])
        )

    def _render_open_prompt(self, row: RowMapping, messages: Messages) -> str:
        """A prompt alone, which may end with the beginning of the assistant's own turn."""
        if messages[-1]["role"] != "assistant" or self._uses_plain_text():
            return self._render_prompt(row, messages)
        return self._apply_chat_template(row, messages, continue_final_message=True)

    def _encode_texts(self, prompt: str, completion: str | None) -> Example:
        """Both as the tokenizer writes a text; no chat template had a hand in them."""
        kind = {"is_encoder_decoder": self.is_encoder_decoder}
        (asked,) = tokenize_prompts(self.tokenizer, [prompt], **kind)
        if completion is None:
            return Example(asked, [])
        (answer,) = tokenize_targets(self.tokenizer, [completion], **kind)
        return Example(asked, self._append_end_id(answer))

    def _tokenize_prompt(self, text: str) -> list[int]:
        """Of a templated text."""
        return self._tokenize(text, special=self.is_encoder_decoder)

    def _tokenize(self, text: str, special: bool = False) -> list[int]:
        # Not verbose: it would warn of long texts, which are cut later.
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _append_end_id(self, ids: list[int]) -> list[int]:
        if not self.end_ids:
            raise ValueError("the tokenizer has no end of sequence: set `tokenizer.eos_token`")
        return ensure_end_id(ids, self.end_ids)

    # Ready-made ids

    def _encode_input_ids(self, row: RowMapping) -> Example:
        ids = _parse_integers(row["input_ids"])
        if self.is_encoder_decoder and "labels" in row:
            source = _select_ids(ids, _read_token_column(row, "attention_mask", ids))
            return Example(source, [i for i in _parse_integers(row["labels"]) if i != NOT_TRAINED])
        trained = self._build_training_mask(row, ids)
        real = _read_token_column(row, "attention_mask", ids)
        trained, ids = _select_ids(trained, real), _select_ids(ids, real)
        start, count = trained.index(1) if 1 in trained else len(ids), sum(trained)
        if sum(trained[start : start + count]) != count:
            raise ValueError(
                "a row trains on several parts with untrained ones between them: an answer is one piece; "
                "make a row of each part, with all that stands before it as the prompt"
            )
        return Example(ids[:start], ids[start : start + count])

    def _build_training_mask(self, row: RowMapping, ids: list[int]) -> list[int]:
        """1 where a token is trained on."""
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
            prompt = row["prompt"]
            if isinstance(prompt, str):
                (asked,) = tokenize_prompts(
                    self.tokenizer, [prompt], is_encoder_decoder=self.is_encoder_decoder
                )
                if ids[: len(asked)] == asked:
                    return _mask_completion(asked, ids)
            text = (
                prompt
                if isinstance(prompt, str)
                else self._render_open_prompt(row, _read_messages(row, "prompt"))
            )
            return _mask_completion(self._tokenize_prompt(text), ids)
        raise ValueError("`input_ids` alone do not say where the prompt ends: add `completion_mask`")

    # Limits

    def _truncate_example(self, example: Example) -> Example:
        """Apart: how much of the prompt stays does not depend on the completion."""
        prompt, completion = example.prompt_ids, example.completion_ids
        if not prompt:
            raise ValueError("the prompt is empty: a completion needs one token at least to follow from")
        kept, follows = self._truncate_ids(prompt, completion)
        cut_before = self.prompts_cut + self.completions_cut > 0
        self.rows_read += 1
        self.prompts_cut += len(kept) < len(prompt)
        self.completions_cut += len(follows) < len(completion)
        if not cut_before and self.prompts_cut + self.completions_cut > 0:
            warnings.warn(
                f"max_length={self.max_length} cuts a row of {len(prompt)} prompt and {len(completion)} "
                f"completion tokens to {len(kept)} and {len(follows)}; later ones are cut without a word",
                stacklevel=3,
            )
        return Example(kept, follows)

    def _truncate_ids(self, prompt: list[int], completion: list[int]) -> tuple[list[int], list[int]]:
        limit = self.max_length
        if limit is None:
            return prompt, completion
        if self.is_encoder_decoder:
            return truncate_prompt(self.tokenizer, prompt, limit, is_encoder_decoder=True), completion[:limit]
        room = limit - min(self.max_new_tokens, limit // 2)
        kept = truncate_prompt(self.tokenizer, prompt, room, is_encoder_decoder=False)
        return kept, completion[: limit - len(kept)]


def _refuse_images(row: RowMapping) -> None:
    named = [name for name in IMAGE_COLUMNS if name in row and not _is_empty_list(row[name])]
    shown = {part["type"] for part in _list_content_parts(row) if part.get("type", "text") != "text"}
    if named or shown:
        found = f"the column `{named[0]}`" if named else f"a message part of type {min(shown)!r}"
        raise ValueError(
            f"GKDTrainer distils text, and the row has {found}: use trl.DistillationTrainer for models that "
            "see, or remove it"
        )


def _is_empty_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not value


def _list_content_parts(row: RowMapping) -> list[RowMapping]:
    """The parts of messages whose content is a list of parts."""
    turns = [row[c] for c in ("messages", "prompt", "completion") if isinstance(row.get(c), list | tuple)]
    contents = [message.get("content") for turn in turns for message in turn if isinstance(message, Mapping)]
    listed = [content for content in contents if isinstance(content, list | tuple)]
    return [part for content in listed for part in content if isinstance(part, Mapping)]


def _read_messages(row: RowMapping, column: str) -> list[RowMapping]:
    messages = row[column]
    listed = isinstance(messages, list | tuple) and all(
        isinstance(m, Mapping) and "role" in m for m in messages
    )
    if not listed or not messages:
        raise ValueError(
            f"`{column}` is {messages!r:.80}: it must be a list of messages such as "
            "{'role': 'user', 'content': 'text'}"
        )
    return list(messages)


def read_teacher_index(row: RowMapping) -> int:
    """The number in the column `teacher`, where there is one."""
    number = row.get("teacher", -1)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"the column `teacher` holds {number!r}: the number of a teacher, 0 for the first")
    return number


def _read_single_answer(row: RowMapping) -> RowMapping:
    completion = _read_messages(row, "completion")
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        raise ValueError(
            f"`completion` holds messages of {roles}: it must be one assistant turn; what comes before it "
            "belongs to `prompt`"
        )
    return completion[0]


def _list_message_texts(message: RowMapping) -> list[str]:
    content = message.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [part if isinstance(part, str) else part["text"] for part in content]


def _explain_prompt_mismatch(prompt: str, whole: str, *, has_prompt_column: bool) -> str:
    """Why an answer cannot be put behind its prompt."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
    if has_prompt_column:
        return (
            f"`prompt` ({prompt!r:.80}) is not how the templated `messages` begin ({whole!r:.80}): "
            "remove one of the two columns"
        )
    return (
        f"the chat template ends a prompt with {prompt[same:]!r} where a finished chat has "
        f"{whole[same : same + 40]!r}: the reference would follow a prompt that it was not written for. If "
        "that is a block of thoughts, give the reference its own or switch thinking off, as by a column "
        "`chat_template_kwargs` of {'enable_thinking': False}; or give texts in `prompt` and `completion`; "
        "or leave the assistant's turn away where only the student's own samples are trained on"
    )


def _parse_integers(values: Any) -> list[int]:
    return [int(value) for value in values]


def _select_ids(ids: list[int], mask: list[int]) -> list[int]:
    return [i for i, keep in zip(ids, mask, strict=True) if keep]


def _read_token_column(row: RowMapping, name: str, ids: list[int]) -> list[int]:
    """A column that has one entry a token; an attention mask may be missing where nothing is padded."""
    values = _parse_integers(row[name]) if name in row else [1] * len(ids)
    if len(values) != len(ids):
        raise ValueError(
            f"`{name}` has {len(values)} entries and `input_ids` {len(ids)}: one a token is needed"
        )
    return values


def _mask_completion(prompt: list[int], ids: list[int]) -> list[int]:
    if ids[: len(prompt)] != prompt:
        raise ValueError(
            f"`input_ids` begin with {ids[:8]}, the ids of `prompt` with {prompt[:8]}: they differ within "
            "the prompt; say where it ends by `completion_mask`"
        )
    return [0] * len(prompt) + [1] * (len(ids) - len(prompt))
