"""Rows as real data sets hold them: fillers, parts, ends within a text, a foreign column, half characters."""

from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from .test_row_encoder import CHATML, chat_tokenizer, encoder, turn

CALLS = (
    "{% for tool in tools or [] %}TOOL {{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tool(name: str, **arguments: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": arguments}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def test_rows_read_through_datasets_are_those_that_were_written() -> None:
    """`datasets` gives every mapping the keys of all, filled with nulls, at any depth."""
    nested = tool("add", left={"type": "number", "range": {"least": 1}}, right={"type": "number"})
    tools = [tool("weather", city={"type": "string"}), nested]
    rows = [
        {"messages": [turn("user", "Rain in Oslo?"), call("weather", city="Oslo")], "tools": tools},
        {"messages": [turn("user", "2 and what?"), call("add", left=2.0, of={"deep": 1})], "tools": tools},
        {"messages": [turn("user", "Hello"), turn("assistant", "Hi")], "tools": None},
    ]
    encode = encoder(chat_tokenizer(CALLS))
    stored = list(datasets.Dataset.from_list(rows))
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] != {"city": "Oslo"}
    assert [encode(row) for row in stored] == [encode(row) for row in rows]
    text = encode.tokenizer.decode(encode(stored[0]).completion_ids)
    assert '{"city": "Oslo"}' in text and "null" not in text


@pytest.mark.parametrize("template", [CHATML, CALLS])
def test_contents_of_text_parts_are_their_joined_text(template: str) -> None:
    encode = encoder(chat_tokenizer(template))
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "two?"}]
    in_parts = {"messages": [turn("user", parts), turn("assistant", [{"type": "text", "text": "It is"}])]}
    plain = {"messages": [turn("user", "What is two?"), turn("assistant", "It is")]}
    assert encode(in_parts) == encode(plain)
    stored = list(datasets.Dataset.from_list([in_parts]))
    assert encode(stored[0]) == encode(plain)
    assert encode({"prompt": in_parts["messages"][:1]}) == encode({"prompt": plain["messages"][:1]})


@pytest.mark.parametrize(
    "content", [[{"type": "text"}], [{"type": "text", "text": 3}], [3], {"text": "a"}, 3]
)
def test_contents_without_a_text_are_refused(content: Any) -> None:
    row = {"messages": [turn("user", content), turn("assistant", "It is")]}
    with pytest.raises(ValueError, match="of a message of 'user' is"):
        encoder(chat_tokenizer())(row)


@pytest.mark.parametrize("completion", ["a b", "a </s> b", "a b </s>", "</s> a"])
def test_a_completion_ends_whatever_it_mentions(completion: str) -> None:
    words = {word: n for n, word in enumerate(["<pad>", "</s>", "a", "b", "ask"])}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    ids = encoder(tokenizer)({"prompt": "ask", "completion": completion}).completion_ids
    expected = [words[word] for word in completion.split()]
    assert ids == (expected if completion.endswith("</s>") else [*expected, words["</s>"]])


def test_a_column_called_teacher_is_read_only_where_a_divergence_is_routed() -> None:
    row = {"prompt": "ask", "completion": "a", "teacher": "Qwen3-235B"}
    assert encoder()(row).teacher_index == -1
    assert encoder(reads_teacher=True)({**row, "teacher": 2}).teacher_index == 2
    with pytest.raises(ValueError, match="rename a column that holds something else"):
        encoder(reads_teacher=True)(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a \ud83d", "completion": "b"},
        {"prompt": "a", "completion": "b \ud83d"},
        {"messages": [turn("user", "a \ud83d"), turn("assistant", "b")]},
    ],
)
def test_half_a_character_is_refused_with_its_place(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="half of a character"):
        encoder(chat_tokenizer())(row)
