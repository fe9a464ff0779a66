"""Decode with a calculator: once the text ends in `<<48/2=`, insert the tokens of `24>>`.

The marks are GSM8K's and the rule is that of openai/grade-school-math (Cobbe et al. 2021), with three
differences: the expression is parsed, never evaluated as code; a result is formatted as in GSM8K (`24`, not
`24.0`; all its 27,998 marks are reproduced); and spaces are allowed, which word-level tokenizers need
(`<< 48 / 2 = 24 >>`).
"""

import ast
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import Tensor

from gkd_lab.training.next_token import TokenChooser

MAX_CHARACTERS = 100
"""Longest expression, in characters; GSM8K's longest has 30."""
MAX_VALUE = 10**15
DECIMALS = 6
"""Most digits after the decimal point: 1/3 is 0.333333."""

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_EXPRESSION_PATTERN = re.compile(r"[0-9+\-*/.() ]+")
_OPEN_MARK_PATTERN = re.compile(r"<<([^<>=]*)=")


def evaluate_expression(expression: str) -> str | None:
    """Return the exact value of + - * / // and brackets as text, rounded to 6 decimals; None if invalid.

    Drops commas in numbers. Invalid are other characters, powers, a division by zero, more than
    `MAX_CHARACTERS` characters, and a value beyond `MAX_VALUE`.
    """
    text = expression.replace(",", "").strip()
    if len(text) > MAX_CHARACTERS or not _EXPRESSION_PATTERN.fullmatch(text):
        return None
    try:
        value = _evaluate_node(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return _format_number(value) if abs(value) <= MAX_VALUE else None


def _evaluate_node(node: ast.expr) -> Fraction:
    """Return the exact value of a parsed expression as a Fraction; ValueError if it is not arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _evaluate_node(node.operand)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return Fraction(_OPERATORS[type(node.op)](_evaluate_node(node.left), _evaluate_node(node.right)))
    raise ValueError(f"{ast.dump(node)} is not arithmetic")


def _format_number(value: Fraction) -> str:
    """Return a number as decimal text with at most 6 decimals and no trailing zeros, as GSM8K does."""
    rounded = round(value, DECIMALS)
    text = f"{Decimal(rounded.numerator) / Decimal(rounded.denominator):f}"
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Calculator:
    """Completes calculator marks in generated text.

    A token may contain `=` and more text; a guess of the result in it is replaced.

    Raises:
        ValueError: for a tokenizer that cannot encode the marks: T5's has no `<`.
    """

    tokenizer: Any

    def __post_init__(self) -> None:
        decoded = self._decode(self._encode("<< = >>"))
        if _remove_spaces(decoded) != "<<=>>":
            raise ValueError(
                f"`calculator: true` needs a tokenizer that can write << = >>; this one writes {decoded!r}: "
                "train on targets with such marks (`data.calculator_marks: true`), or leave `calculator` out"
            )

    def assist_choice(self, choose: TokenChooser) -> TokenChooser:
        """Return a token chooser around `choose` that also writes results of expressions; for one batch."""
        return _AssistedChoice(self, choose)

    @cached_property
    def equals_tokens(self) -> frozenset[int]:
        """Ids of all vocabulary tokens that contain `=`."""
        return frozenset(i for token, i in self.tokenizer.get_vocab().items() if "=" in token)

    def complete_mark(self, written_ids: list[int], token: int) -> list[int]:
        """Return the ids to write instead of `token`: it alone, or with the result if it ends `<<48/2=`."""
        old_text, text = self._decode(written_ids), self._decode([*written_ids, token])
        marks = list(_OPEN_MARK_PATTERN.finditer(text))
        if len(marks) == len(_OPEN_MARK_PATTERN.findall(old_text)) or not text.startswith(old_text):
            return [token]
        expression, end = marks[-1].group(1), marks[-1].end()
        value = evaluate_expression(expression)
        if value is None:
            return [token]
        result = f"{' ' * expression.endswith(' ')}{value}{' ' * expression.startswith(' ')}>>"
        if not text[end:].strip():
            return [token, *(self._find_spelling([*written_ids, token], result) or [])]
        return self._find_spelling(written_ids, text[len(old_text) : end] + result) or [token]

    def _find_spelling(self, written_ids: list[int], text: str) -> list[int] | None:
        """Return ids that, after the written ones, decode to `text`; None if the tokenizer has none.

        Some tokenizers begin every text with a space, so this also tries the tokens of `text` after an `=`.
        """
        equals, equals_and_text = self._encode("="), self._encode("=" + text)
        candidates = [self._encode(text)]
        if equals_and_text[: len(equals)] == equals:
            candidates.append(equals_and_text[len(equals) :])
        expected = self._decode(written_ids) + text
        for normalize in (str, _remove_spaces):
            for ids in candidates:
                if normalize(self._decode([*written_ids, *ids])) == normalize(expected):
                    return ids
        return None

    def _encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids without special tokens, all spaces kept."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _remove_spaces(text: str) -> str:
    """Return the text without any whitespace."""
    return "".join(text.split())


@dataclass
class _AssistedChoice:
    """A token chooser that remembers each row's written ids and the pending ids of a result."""

    calculator: Calculator
    choose: TokenChooser
    written_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    pending_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, scores: Tensor, rows: Tensor, position: int) -> Tensor:
        """Choose a token for each row, unless the calculator has one; rows are indices into the batch."""
        tokens = self.choose(scores, rows, position)
        pairs = zip(rows.tolist(), tokens.tolist(), strict=True)
        return tokens.new_tensor([self._choose_next_token(row, token) for row, token in pairs])

    def _choose_next_token(self, row: int, token: int) -> int:
        """Record and return the row's next token: a result's pending one, else `token` as completed."""
        written, pending = self.written_ids[row], self.pending_ids[row]
        if not pending:
            ends_expression = token in self.calculator.equals_tokens
            pending.extend(self.calculator.complete_mark(written, token) if ends_expression else [token])
        written.append(pending.pop(0))
        return written[-1]
