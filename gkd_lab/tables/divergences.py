"""Divergences of a table's rows, told apart by the columns `divergence` (kind) and `beta`."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA
from gkd_lab.tables.loss_labels import divergence_label


@dataclass(frozen=True)
class CellDivergence:
    """Divergence of a cell's first loss term, or that term's type if it is no divergence."""

    kind: str | None
    """`jsd`, `tv`, `cross_entropy`, ...; None where a table does not tell."""
    beta: float | None
    """None for a kind that has none."""

    @property
    def label(self) -> str:
        """Readable name: `Forward KL`, `JSD(0.1)`, `Total variation`, `Cross entropy`."""
        return divergence_label(self.beta, self.kind)

    def __lt__(self, other: "CellDivergence") -> bool:
        """Compare: by beta, from forward to reverse KL, then divergences without it, then other terms."""
        return self._sort_key < other._sort_key

    @property
    def _sort_key(self) -> tuple[Any, ...]:
        if self.beta is not None:
            return 0, self.beta, self.kind or ""
        return 1, self.kind not in NAMES_WITHOUT_BETA, self.kind or ""


def get_divergence(row: Any) -> CellDivergence:
    """Return the divergence of a table's row: a Series, or a dict of its columns."""
    kind, beta = row["divergence"], row["beta"]
    return CellDivergence(None if pd.isna(kind) else str(kind), None if pd.isna(beta) else float(beta))


def map_divergences(frame: pd.DataFrame) -> "pd.Series[Any]":
    """Return the `CellDivergence` of each row, with the frame's index."""
    pairs = zip(frame["divergence"], frame["beta"], strict=True)
    values = [get_divergence({"divergence": kind, "beta": beta}) for kind, beta in pairs]
    return pd.Series(values, index=frame.index, dtype=object)


def list_divergences(frame: pd.DataFrame) -> list[CellDivergence]:
    """Return the distinct divergences of the rows, forward KL first."""
    pairs = set(zip(frame["divergence"], frame["beta"], strict=True))
    return sorted({get_divergence({"divergence": kind, "beta": beta}) for kind, beta in pairs})


def select_divergence(frame: pd.DataFrame, divergence: CellDivergence) -> pd.DataFrame:
    """Return the rows of one divergence."""
    has_kind = _equals(frame["divergence"], divergence.kind)
    return frame[has_kind & _equals(frame["beta"], divergence.beta)]


def _equals(column: "pd.Series[Any]", value: Any) -> "pd.Series[bool]":
    """Return where a column has a value; None stands for a missing one."""
    return column.isna() if value is None else column == value
