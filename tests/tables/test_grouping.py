"""Groups by position are those of pandas, in its order and with its values."""

import numpy as np
import pandas as pd

from gkd_lab.tables.grouping import iterate_groups

ROWS = pd.DataFrame(
    {
        "role": ["cell", "start", "cell", "cell", "start", "cell"],
        "beta": [0.5, np.nan, np.nan, 0.5, np.nan, np.nan],
        "rows": pd.array([2, None, 1, 2, None, 1], dtype="Int64"),
        "axis": ["a", None, "b", "a", None, None],
    },
    index=[9, 4, 7, 1, 0, 3],
)


def test_groups_are_those_of_pandas() -> None:
    names = ["role", "beta", "rows", "axis"]
    groups = list(iterate_groups(ROWS, names))
    expected = list(ROWS.groupby(names, dropna=False, sort=False))
    assert [positions.tolist() for _, positions in groups] == [[0, 3], [1, 4], [2], [5]]
    for (values, positions), (expected_values, rows) in zip(groups, expected, strict=True):
        pd.testing.assert_frame_equal(ROWS.iloc[positions], rows)
        assert list(map(repr, values)) == list(map(repr, expected_values))


def test_a_frame_without_rows_has_no_groups() -> None:
    assert list(iterate_groups(ROWS.iloc[:0], ["role", "beta"])) == []
