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

from gkd_lab.training.decode_loop import Choose

LONGEST = 100
"""Characters of an expression; GSM8K's longest has 30."""
LARGEST = 10**15
DECIMALS = 6
"""Digits after the point at most: 1/3 is 0.333333."""

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_ALLOWED = re.compile(r"[0-9+\-*/.() ]+")
_BEGUN = re.compile(r"<<([^<>=]*)=")


def compute(expression: str) -> str | None:
    """The value of sums, differences, products and quotients, exactly and then to `DECIMALS` digits.

    Commas in numbers are dropped. None for anything else: other characters, powers, a division by zero,
    more than `LONGEST` characters, a value beyond `LARGEST`.
    """
    text = expression.replace(",", "").strip()
    if len(text) > LONGEST or not _ALLOWED.fullmatch(text):
        return None
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    return _written(value) if abs(value) <= LARGEST else None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        operand = _value(node.operand)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return Fraction(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError(f"{ast.dump(node)} is not arithmetic")


def _written(value: Fraction) -> str:
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
        shown = self._read(self._ids("<< = >>"))
        if _unspaced(shown) != "<<=>>":
            raise ValueError(
                f"`calculator: true` needs a tokenizer that can write << = >>; this one writes {shown!r}: "
                "train on targets with such marks (`data.calculator_marks: true`), or leave `calculator` out"
            )

    def assist(self, choose: Choose) -> Choose:
        """`choose`, but for the tokens of results; for one batch."""
        return _Assisted(self, choose)

    @cached_property
    def equals(self) -> frozenset[int]:
        """Tokens with an `=` in them."""
        return frozenset(i for token, i in self.tokenizer.get_vocab().items() if "=" in token)

    def completed(self, before: list[int], token: int) -> list[int]:
        """What to write after `before` in the place of `token`: it alone, or with a result."""
        old, text = self._read(before), self._read([*before, token])
        begun = list(_BEGUN.finditer(text))
        if len(begun) == len(_BEGUN.findall(old)) or not text.startswith(old):
            return [token]
        expression, end = begun[-1].group(1), begun[-1].end()
        value = compute(expression)
        if value is None:
            return [token]
        result = f"{' ' * expression.endswith(' ')}{value}{' ' * expression.startswith(' ')}>>"
        if not text[end:].strip():
            rest = self._spelled([*before, token], result)
            return [token] if rest is None else [token, *rest]
        return self._spelled(before, text[len(old) : end] + result) or [token]

    def _spelled(self, before: list[int], more: str) -> list[int] | None:
        """Tokens that add the text `more`; None where the tokenizer has none.

        Some tokenizers begin every text with a space, so `more` is also tried as what follows an `=`.
        """
        equal, after_equal = self._ids("="), self._ids("=" + more)
        tries = [self._ids(more)]
        if after_equal[: len(equal)] == equal:
            tries.append(after_equal[len(equal) :])
        wanted = self._read(before) + more
        for same in (str, _unspaced):
            for ids in tries:
                if same(self._read([*before, *ids])) == same(wanted):
                    return ids
        return None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _read(self, ids: Iterable[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _unspaced(text: str) -> str:
    return "".join(text.split())


@dataclass
class _Assisted:
    """A `Choose` that remembers what each row of the first batch has written and still has to write."""

    calculator: Calculator
    choose: Choose
    written: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    due: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, scores: Tensor, rows: Tensor, position: int) -> Tensor:
        free = self.choose(scores, rows, position)
        pairs = zip(rows.tolist(), free.tolist(), strict=True)
        return free.new_tensor([self._next(row, token) for row, token in pairs])

    def _next(self, row: int, token: int) -> int:
        if not self.due[row]:
            begins = token in self.calculator.equals
            self.due[row] = self.calculator.completed(self.written[row], token) if begins else [token]
        chosen = self.due[row].pop(0)
        self.written[row].append(chosen)
        return chosen
