"""Encode rows of every supported format, compared with TRL's collator, and refuse all others."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from tokenizers import Regex
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from trl.experimental.utils import DataCollatorForChatML

from gkd_lab.config.artifact_specs import TokenizerSpec
from gkd_lab.encoding.batches import Example
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.models.build import train_tokenizer

from ..models.tiny import END, PAD, tiny_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama-3 and Qwen2 split texts: line ends stay together, whatever follows.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "What is two plus two? It is four.\n\n\nThe sky is blue, and the sea as well.",
    "Ünïcödé: 北京 is a city.\n\n\nuser assistant system",
]


def chat_tokenizer(template: str = CHATML, end: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with a chat template, whose end of a turn is the end of sequence."""
    tokenizer = train_tokenizer(TokenizerSpec(kind="bpe", vocab_size=360), TEXTS)
    tokenizer.backend_tokenizer.pre_tokenizer = Steps(
        [Split(Regex(PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    turns = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"]
    tokenizer.add_special_tokens(
        {"eos_token": end, "bos_token": "<|begin_of_text|>", "additional_special_tokens": turns}
    )
    tokenizer.chat_template = template
    return tokenizer


def encoder(tokenizer: Any = None, **options: Any) -> RowEncoder:
    settings = {"is_encoder_decoder": False, "max_length": None, "max_new_tokens": 128, **options}
    return RowEncoder(tokenizer or tiny_tokenizer(), **settings)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(*contents: str) -> list[dict[str, Any]]:
    """Make a chat of user and assistant in turn."""
    return [turn(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


CHATS = [
    chat("What is two plus two?", "It is four."),
    [turn("system", "The sky is blue"), *chat("What is the sky?", "blue, 北京"), *chat("Ünïcödé?", "user")],
    chat("two", "  four\n"),
    chat("What", ""),
]
NAMED = {"llama3.jinja": "<|eot_id|>", "qwen2_5.jinja": "<|im_end|>", "qwen3.jinja": "<|im_end|>"}


def load_chat_tokenizer(name: str) -> PreTrainedTokenizerFast:
    return chat_tokenizer(*((TEMPLATES / name).read_text(), NAMED[name]) if name in NAMED else ())


# Messages


@pytest.mark.parametrize("name", ["chatml", *NAMED])
def test_ids_of_messages_equal_those_of_trls_collator(name: str) -> None:
    tokenizer = load_chat_tokenizer(name)
    batch = DataCollatorForChatML(tokenizer, max_length=1024)([{"messages": m} for m in CHATS])
    examples = [encoder(tokenizer)({"messages": messages}) for messages in CHATS]
    for example, row, mask, labels, prompt, prompt_mask in zip(
        examples,
        *(batch[k] for k in ("input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask")),
        strict=True,
    ):
        assert example.prompt_ids == prompt[prompt_mask == 1].tolist()
        assert example.completion_ids == labels[labels != -100].tolist()
        assert example.prompt_ids + example.completion_ids == row[mask == 1].tolist()
        assert tokenizer.eos_token_id in example.completion_ids


def test_tokens_after_the_end_of_the_turn_are_trained_on_as_in_trl() -> None:
    tokenizer = chat_tokenizer()
    example = encoder(tokenizer)({"messages": CHATS[0]})
    assert tokenizer.decode(example.prompt_ids).endswith("two?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(example.completion_ids) == "It is four.<|im_end|>\n"


def test_a_template_without_an_end_gets_the_end_of_sequence() -> None:
    tokenizer = chat_tokenizer(CHATML.replace("<|im_end|>", ""))
    example = encoder(tokenizer)({"messages": CHATS[0]})
    assert tokenizer.decode(example.completion_ids) == "It is four.\n<|im_end|>"


def test_an_answer_that_would_merge_with_the_prompt_leaves_the_prompts_ids_alone() -> None:
    tokenizer = chat_tokenizer()
    rows = [{"messages": chat("What", answer)} for answer in ("four", "\n\nfour")]
    plain, newlines = (encoder(tokenizer)(row) for row in rows)
    collated = DataCollatorForChatML(tokenizer, max_length=1024)([rows[1]])["prompts"][0].tolist()
    assert collated != plain.prompt_ids
    assert newlines.prompt_ids == plain.prompt_ids
    assert tokenizer.decode(newlines.completion_ids) == "\n\nfour<|im_end|>\n"


def test_an_answer_in_a_chat_gets_no_token_that_marks_the_beginning_of_a_text() -> None:
    tokenizer = chat_tokenizer("{% for m in messages %}{{ '[' ~ m['content'] ~ ']' }}{% endfor %}")
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(replacement="_", prepend_scheme="always")
    tokenizer.backend_tokenizer.decoder = MetaspaceDecoder(replacement="_")
    row = {"messages": chat("two", "four")}
    batch = DataCollatorForChatML(tokenizer, max_length=1024)([row])
    example = encoder(tokenizer)(row)
    assert example.prompt_ids == batch["prompts"][0].tolist()
    assert example.completion_ids == [
        *batch["labels"][batch["labels"] != -100].tolist(),
        tokenizer.eos_token_id,
    ]
    assert tokenizer.convert_tokens_to_ids("_") not in example.completion_ids


def test_tools_and_template_arguments_reach_the_template() -> None:
    start = "{{ (tools[0]['name'] if tools is not none else 'none') + ' ' + (style | default('plain')) }}"
    tokenizer = chat_tokenizer(start + CHATML)
    row = {"messages": CHATS[0]}

    def begin(**columns: Any) -> str:
        return tokenizer.decode(encoder(tokenizer)({**row, **columns}).prompt_ids).split("<|")[0]

    assert begin() == begin(tools=[]) == begin(tools=None) == "none plain"
    assert begin(tools=[{"name": "add"}]) == begin(tools='[{"name": "add"}]') == "add plain"
    assert begin(chat_template_kwargs={"style": "terse"}) == "none terse"


def test_a_prompt_column_beside_messages_is_used_unchanged() -> None:
    tokenizer = chat_tokenizer()
    messages = CHATS[1]
    alone = encoder(tokenizer)({"messages": messages})
    text = tokenizer.decode(alone.prompt_ids)
    assert encoder(tokenizer)({"messages": messages, "prompt": text}) == alone
    with pytest.raises(ValueError, match="the templated `messages`"):
        encoder(tokenizer)({"messages": messages, "prompt": "What is the sky?"})
    with pytest.raises(ValueError, match="`messages`"):
        encoder(tokenizer)({"messages": messages, "prompt": messages[:1]})


@pytest.mark.parametrize("name", ["deepseek_r1_distill.jinja", "nemotron_3_nano.jinja"])
def test_a_template_that_opens_a_block_of_thoughts_missing_in_the_reference_is_refused(name: str) -> None:
    tokenizer = chat_tokenizer((TEMPLATES / name).read_text())
    with pytest.raises(ValueError, match="enable_thinking"):
        encoder(tokenizer)({"messages": CHATS[0]})
    assert encoder(tokenizer)({"messages": CHATS[0][:1]}).completion_ids == []


def test_a_template_with_thoughts_switched_off_accepts_the_reference() -> None:
    tokenizer = chat_tokenizer((TEMPLATES / "nemotron_3_nano.jinja").read_text())
    row = {"messages": CHATS[0], "chat_template_kwargs": {"enable_thinking": False}}
    assert tokenizer.decode(encoder(tokenizer)(row).completion_ids) == "It is four.<|im_end|>\n"


def test_messages_that_the_template_cannot_write_are_a_value_error() -> None:
    refusing = chat_tokenizer("{{ raise_exception('no system turn') }}")
    with pytest.raises(ValueError, match=r"\['user'\].*no system turn"):
        encoder(refusing)({"messages": CHATS[0]})


def test_messages_without_a_template_are_refused_for_a_decoder() -> None:
    with pytest.raises(ValueError, match=r"`tokenizer\.chat_template`"):
        encoder()({"messages": CHATS[0]})


@pytest.mark.parametrize("messages", [[], "a b", [{"from": "human", "value": "a"}]])
def test_a_column_without_a_list_of_messages_is_refused(messages: Any) -> None:
    with pytest.raises(ValueError, match="list of messages"):
        encoder(chat_tokenizer())({"messages": messages})


def test_an_answer_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`messages`.*no prompt"):
        encoder(chat_tokenizer())({"messages": [turn("assistant", "four")]})


# Prompt and completion


def test_only_an_encoder_decoders_prompt_gets_the_tokenizers_special_tokens() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    row = {"prompt": "two", "completion": "four"}
    for is_encoder_decoder in (False, True):
        example = encoder(tokenizer, is_encoder_decoder=is_encoder_decoder)(row)
        assert tokenizer.decode(example.prompt_ids) == ("two<|im_end|>" if is_encoder_decoder else "two")
        assert tokenizer.decode(example.completion_ids) == "four<|im_end|>"


def test_a_completion_that_ends_already_gets_no_second_end() -> None:
    assert encoder()({"prompt": "a", "completion": "b </s>"}).completion_ids == [*ids("b"), END]
    assert encoder()({"prompt": "a", "completion": ""}).completion_ids == [END]


def test_without_an_end_of_sequence_a_text_cannot_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set `tokenizer\.eos_token`"):
        encoder(tokenizer)({"prompt": "a", "completion": "b"})


def test_prompt_and_completion_as_messages_equal_one_list_of_messages() -> None:
    tokenizer = chat_tokenizer()
    for messages in CHATS:
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
        assert encoder(tokenizer)(row) == encoder(tokenizer)({"messages": messages})


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": CHATS[0][1:]}, {"prompt": CHATS[0][:1], "completion": "b"}]
)
def test_a_text_with_messages_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`prompt` and `completion`.*two lists"):
        encoder(chat_tokenizer())(row)


def test_any_role_but_the_prompt_roles_gives_the_answer() -> None:
    as_gemma = CHATML.replace("<|im_start|>assistant", "<|im_start|>model")
    ours = encoder(chat_tokenizer(as_gemma.replace("m['role']", "m['role'].replace('assistant', 'model')")))
    expected = ours({"messages": [turn("user", "a b"), turn("assistant", "c")]})
    assert expected.completion_ids
    assert ours({"messages": [turn("user", "a b"), turn("model", "c")]}) == expected
    for role in ("user", "tool", "system"):
        assert not ours({"messages": [turn("user", "a b"), turn(role, "c")]}).completion_ids


def test_a_completion_of_several_turns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`completion`.*one assistant turn"):
        encoder(chat_tokenizer())({"prompt": CHATS[1][:2], "completion": CHATS[1][2:]})


# Prompts alone


def test_pitfall_17_a_prompt_alone_is_an_example_without_a_completion() -> None:
    tokenizer = chat_tokenizer()
    whole = encoder(tokenizer)({"messages": CHATS[0]})
    prompt = Example(whole.prompt_ids, [])
    text = tokenizer.decode(whole.prompt_ids)
    user = CHATS[0][:1]
    for row in (
        {"messages": user},
        {"prompt": user},
        {"prompt": text},
        {"prompt": text, "messages": user},
        {"prompt": user, "completion": None},
        {"prompt": user, "completion": []},
        {"prompt_ids": whole.prompt_ids},
    ):
        assert encoder(tokenizer)(row) == prompt, row


def test_pitfall_17_a_chat_that_ends_with_a_tools_answer_is_a_prompt() -> None:
    tokenizer = chat_tokenizer()
    example = encoder(tokenizer)({"messages": [*CHATS[0], turn("tool", "four")]})
    assert example.completion_ids == []
    assert tokenizer.decode(example.prompt_ids).endswith("four<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_that_ends_within_the_assistants_turn_is_continued() -> None:
    tokenizer = chat_tokenizer()
    example = encoder(tokenizer)({"prompt": chat("What is two", "It is")})
    assert tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\nIt is")


def test_an_empty_prompt_is_refused() -> None:
    for row in ({"prompt": "", "completion": "a"}, {"input_ids": [5, 1], "completion_mask": [1, 1]}):
        with pytest.raises(ValueError, match="the prompt is empty"):
            encoder()(row)


# Encoder-decoders without a template


def test_an_encoder_decoder_without_a_template_reads_the_contents_alone() -> None:
    ours = encoder(is_encoder_decoder=True)
    parts = turn("user", [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}])
    example = ours({"messages": [turn("system", "a"), parts, turn("assistant", "d e")]})
    assert example == Example(ids("a b c"), [*ids("d e"), END])
    assert ours({"messages": [turn("system", "a"), parts]}) == Example(ids("a b c"), [])
    assert ours({"prompt": [parts], "completion": [turn("assistant", "d")]}) == Example(
        ids("b c"), [*ids("d"), END]
    )


def test_tools_without_a_template_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`tools`.*template"):
        encoder(is_encoder_decoder=True)({"messages": CHATS[0], "tools": [{"name": "add"}]})


def test_contents_are_joined_by_line_breaks() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    example = encoder(tokenizer, is_encoder_decoder=True)({"messages": CHATS[1]})
    assert tokenizer.decode(example.prompt_ids) == "The sky is blue\nWhat is the sky?\nblue, 北京\nÜnïcödé?"


# Ready-made ids


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": torch.tensor([5, 6, 7, 8]), "completion_mask": torch.tensor([0, 0, 1, 1])},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {
            "input_ids": [PAD, 5, 6, 7, 8],
            "labels": [-100, -100, -100, 7, 8],
            "attention_mask": [0, 1, 1, 1, 1],
        },
        {
            "input_ids": [5, 6, 7, 8, PAD],
            "completion_mask": [0, 0, 1, 1, 1],
            "attention_mask": [1, 1, 1, 1, 0],
        },
        {"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 0, 1, 1, 0]},
        {"input_ids": [5, 6, 7, 8], "prompt": tiny_tokenizer().decode([5, 6])},
        {"prompt_ids": [5, 6], "completion_ids": [7, 8]},
    ],
)
def test_ready_made_ids_are_not_changed(row: dict[str, Any]) -> None:
    assert encoder()(row) == Example([5, 6], [7, 8])


def test_an_encoder_decoders_labels_are_its_target() -> None:
    row = {"input_ids": [5, 6, PAD], "attention_mask": [1, 1, 0], "labels": [7, 8, 9, END, -100]}
    assert encoder(is_encoder_decoder=True)(row) == Example([5, 6], [7, 8, 9, END])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completion_mask": [0, 1, 0, 1]}, "several parts"),
        ({"labels": [-100, 6, -100, 8]}, "several parts"),
        ({"labels": [-100, -100, 8, 9]}, "do not shift them"),
        ({"completion_mask": [0, 1]}, "`completion_mask` .*2 .*`input_ids` 4"),
        ({"labels": [7, 8]}, "`labels` has 2 entries"),
        ({"prompt": "a b"}, r"begin .*7, 8\]"),
        ({}, "add `completion_mask`"),
    ],
)
def test_ids_that_do_not_tell_prompt_from_completion_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encoder()({"input_ids": [5, 6, 7, 8], **row})


# Refused rows, and formatting_func


def test_an_example_is_returned_unchanged() -> None:
    example = Example([5], [6] * 99)
    assert encoder(max_length=4)(example) is example


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHATS[0], "images": ["a.png"]},
        {"prompt": "a", "completion": "b", "image": object()},
        {"input_ids": [5, 6], "completion_mask": [0, 1], "pixel_values": torch.zeros(3, 2, 2)},
        {"messages": [turn("user", [{"type": "image"}, {"type": "text", "text": "a"}]), *CHATS[0][1:]]},
        {"prompt": [turn("user", [{"type": "image_url", "image_url": "a.png"}])]},
    ],
)
def test_pitfall_25_images_are_refused_with_advice(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"trl\.DistillationTrainer"):
        encoder(chat_tokenizer())(row)


def test_an_empty_image_column_is_ignored() -> None:
    for nothing in ([], None):
        assert encoder()({"prompt": "a", "images": nothing}) == Example(ids("a"), [])


@pytest.mark.parametrize("row", [{"text": "a b"}, {"conversations": []}, {"completion": "a"}, {}])
def test_unknown_rows_are_refused_with_their_columns_and_the_known_formats(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as refused:
        encoder()(row)
    assert str(sorted(row)) in str(refused.value)
    assert all(form in str(refused.value) for form in ("`messages`", "`prompt`", "`completion_mask`"))


def test_formatting_func_is_applied_to_the_row() -> None:
    ours = encoder(formatting_func=lambda row: {"prompt": row["question"], "completion": row["answer"]})
    assert ours({"question": "a b", "answer": "c"}) == Example(ids("a b"), [*ids("c"), END])


@pytest.mark.parametrize("made", ["a b", ["a b"], None])
def test_a_formatting_func_that_returns_a_text_is_refused(made: Any) -> None:
    with pytest.raises(ValueError, match=f"formatting_func returned {type(made).__name__}"):
        encoder(formatting_func=lambda row: made)({"question": "a b"})


# Limits


def limited(completion: int, prompt: int = 8, **options: Any) -> Example:
    row = {"prompt_ids": list(range(3, 3 + prompt)), "completion_ids": [2] * completion}
    return encoder(**{"max_length": 10, **options})(row)


def test_pitfall_16_the_prompt_does_not_depend_on_the_references_length() -> None:
    cut = {length: limited(length) for length in (0, 1, 4, 8, 80)}
    assert {tuple(example.prompt_ids) for example in cut.values()} == {(6, 7, 8, 9, 10)}
    assert [len(example.completion_ids) for example in cut.values()] == [0, 1, 4, 5, 5]


def test_pitfall_16_holds_for_messages() -> None:
    ours = encoder(chat_tokenizer(), max_length=20, max_new_tokens=8)
    rows = [{"messages": chat("What is two plus two?", "four " * length)} for length in (1, 5, 50)]
    examples = [ours(row) for row in rows]
    assert len({tuple(example.prompt_ids) for example in examples}) == 1
    assert all(len(example.prompt_ids + example.completion_ids) <= 20 for example in examples)
    assert (ours.rows_read, ours.prompts_cut, ours.completions_cut) == (3, 3, 2)


def test_a_prompt_is_truncated_to_leave_room_for_the_new_tokens() -> None:
    assert limited(0, max_new_tokens=2).prompt_ids == list(range(3, 11))
    assert limited(0, max_new_tokens=3).prompt_ids == list(range(4, 11))
    assert limited(8, prompt=2).completion_ids == [2] * 8
    assert limited(9, prompt=2).completion_ids == [2] * 8


def test_an_encoder_decoders_source_and_target_are_truncated_separately() -> None:
    assert limited(5, is_encoder_decoder=True, max_length=4) == Example([3, 4, 5, 6], [2] * 4)


@pytest.mark.parametrize("max_length", range(2, 12))
@pytest.mark.parametrize("max_new_tokens", [1, 3, 99])
def test_at_least_one_token_of_prompt_and_completion_remains(max_length: int, max_new_tokens: int) -> None:
    example = limited(99, prompt=99, max_length=max_length, max_new_tokens=max_new_tokens)
    assert example.prompt_ids and example.completion_ids
    assert len(example.prompt_ids + example.completion_ids) == max_length


def test_without_a_limit_nothing_is_truncated() -> None:
    ours = encoder()
    assert len(ours({"prompt_ids": [3] * 5000, "completion_ids": [4] * 5000}).prompt_ids) == 5000
    assert (ours.rows_read, ours.prompts_cut, ours.completions_cut) == (1, 0, 0)


def test_the_first_truncated_row_is_reported_with_its_lengths() -> None:
    ours = encoder(max_length=10, max_new_tokens=4)
    long = {"prompt_ids": [3] * 9, "completion_ids": [4] * 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours({"prompt_ids": [3], "completion_ids": [4]})
    with pytest.warns(UserWarning, match="max_length=10.* 9 .* 8 .* 6 and 4") as caught:
        ours(long)
        ours(long)
    assert len(caught) == 1 and (ours.prompts_cut, ours.completions_cut) == (2, 2)


@pytest.mark.parametrize("limits", [{"max_length": 1}, {"max_length": 0}, {"max_new_tokens": 0}])
def test_limits_without_room_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        encoder(**limits)
