"""Decoding with a calculator: once a text ends in `<<48/2=`, the tokens of `24>>` are written for the model.

The marks are GSM8K's and the rule is that of openai/grade-school-math (Cobbe et al. 2021), but for three
things: the expression is parsed, never evaluated as code; a result is written as GSM8K writes it (`24`, not
`24.0`; its 27,998 marks all come out at their value); and spaces are allowed, since tokenizers of whole
words need them (`<< 48 / 2 = 24 >>`).
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

from gkd_lab.training.decode_loop import TokenChooser

MAX_CHARACTERS = 100
"""Characters of an expression; GSM8K's longest has 30."""
MAX_VALUE = 10**15
DECIMALS = 6
"""Digits after the point at most: 1/3 is 0.333333."""

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
    """The value of sums, differences, products and quotients, exactly and then to `DECIMALS` digits.

    Commas in numbers are dropped. None for anything else: other characters, powers, a division by zero,
    more than `LONGEST` characters, a value beyond `LARGEST`.
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
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _evaluate_node(node.operand)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return Fraction(_OPERATORS[type(node.op)](_evaluate_node(node.left), _evaluate_node(node.right)))
    raise ValueError(f"{ast.dump(node)} is not arithmetic")


def _format_number(value: Fraction) -> str:
    rounded = round(value, DECIMALS)
    text = f"{Decimal(rounded.numerator) / Decimal(rounded.denominator):f}"
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Calculator:
    """Computes the marks in what a model writes with a tokenizer.

    A token may hold `=` and what follows: where that is a guess at the result, other tokens are written in
    its place. ValueError for a tokenizer that cannot write the marks: T5's knows no `<`.
    """

    tokenizer: Any

    def __post_init__(self) -> None:
        shown = self._decode(self._encode("<< = >>"))
        if _remove_spaces(shown) != "<<=>>":
            raise ValueError(
                f"`calculator: true` needs a tokenizer that can write << = >>; this one writes {shown!r}: "
                "train on targets with such marks (`data.calculator_marks: true`), or leave `calculator` out"
            )

    def assist_choice(self, choose: TokenChooser) -> TokenChooser:
        """`choose`, but for the tokens of results; for one batch."""
        return _AssistedChoice(self, choose)

    @cached_property
    def equals_tokens(self) -> frozenset[int]:
        """Tokens with an `=` in them."""
        return frozenset(i for token, i in self.tokenizer.get_vocab().items() if "=" in token)

    def complete_mark(self, written_ids: list[int], token: int) -> list[int]:
        """What to write after `before` in the place of `token`: it alone, or with a result."""
        old, text = self._decode(written_ids), self._decode([*written_ids, token])
        begun = list(_OPEN_MARK_PATTERN.finditer(text))
        if len(begun) == len(_OPEN_MARK_PATTERN.findall(old)) or not text.startswith(old):
            return [token]
        expression, end = begun[-1].group(1), begun[-1].end()
        value = evaluate_expression(expression)
        if value is None:
            return [token]
        result = f"{' ' * expression.endswith(' ')}{value}{' ' * expression.startswith(' ')}>>"
        if not text[end:].strip():
            rest = self._find_spelling([*written_ids, token], result)
            return [token] if rest is None else [token, *rest]
        return self._find_spelling(written_ids, text[len(old) : end] + result) or [token]

    def _find_spelling(self, written_ids: list[int], text: str) -> list[int] | None:
        """Tokens that add the text `more`; None where the tokenizer has none.

        Some tokenizers begin every text with a space, so `more` is also tried as what follows an `=`.
        """
        equal, after_equal = self._encode("="), self._encode("=" + text)
        tries = [self._encode(text)]
        if after_equal[: len(equal)] == equal:
            tries.append(after_equal[len(equal) :])
        wanted = self._decode(written_ids) + text
        for same in (str, _remove_spaces):
            for ids in tries:
                if same(self._decode([*written_ids, *ids])) == same(wanted):
                    return ids
        return None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _decode(self, ids: Iterable[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _remove_spaces(text: str) -> str:
    return "".join(text.split())


@dataclass
class _AssistedChoice:
    """A `Choose` that remembers what each row of the first batch has written and still has to write."""

    calculator: Calculator
    choose: TokenChooser
    written_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    pending_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, scores: Tensor, rows: Tensor, position: int) -> Tensor:
        free = self.choose(scores, rows, position)
        pairs = zip(rows.tolist(), free.tolist(), strict=True)
        return free.new_tensor([self._choose_next_token(row, token) for row, token in pairs])

    def _choose_next_token(self, row: int, token: int) -> int:
        if not self.pending_ids[row]:
            begins = token in self.calculator.equals_tokens
            self.pending_ids[row] = (
                self.calculator.complete_mark(self.written_ids[row], token) if begins else [token]
            )
        chosen = self.pending_ids[row].pop(0)
        self.written_ids[row].append(chosen)
        return chosen
