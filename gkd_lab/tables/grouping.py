"""Group the rows of a table by position: a frame for each group costs more than most work on its rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def iterate_groups(
    frame: pd.DataFrame, names: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], NDArray[np.intp]]]:
    """Yield (values of the columns `names`, positions of the rows that have them), by first appearance.

    The values are those of `frame.groupby(names, dropna=False, sort=False)`; missing ones are a group too.
    `names` are two or more.
    """
    if frame.empty:
        return
    grouped = frame.groupby(list(names), dropna=False, sort=False)
    numbers = grouped.ngroup().to_numpy()
    order = np.argsort(numbers, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    yield from zip(grouped.size().index, parts, strict=True)
