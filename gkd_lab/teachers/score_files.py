"""Teacher scores on disk: safetensors files of some rows each, memory-mapped for reading.

    index.json          rows, rows_a_file, top_k (null: the whole vocabulary), vocabulary, dtype
    00000.safetensors   starts (rows + 1,): where each row's tokens begin; tokens (T,): the scored
                        completions; logs (T, k), ids (T, k) and tail (T,) as in `TopKScores`

A file appears by rename, so that an interrupted writer goes on with the missing ones. Shapes: T tokens of a
file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gkd_lab.store.files import read_json, remove_file, write_json
from gkd_lab.store.heartbeat import require_lock
from gkd_lab.teachers.top_k_distributions import TopKScores

INDEX_FILE = "index.json"
TARGET_FILE_BYTES = 256 * 2**20
"""Approximate size of a file; it is in memory while it is written."""
SCORE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ScoreLayout:
    """Layout of stored scores: the files that the rows of a dataset are spread over.

    top_k: tokens named of each distribution; None: all `vocabulary` of them. dtype: a name in SCORE_DTYPES.
    """

    rows: int
    rows_a_file: int
    top_k: int | None
    vocabulary: int
    dtype: str

    @classmethod
    def create(cls, lengths: Sequence[int], top_k: int | None, vocabulary: int, dtype: str) -> "ScoreLayout":
        """Return the layout for rows of these token counts: files of about 256 MiB, by the longest row."""
        named = None if top_k is None or top_k >= vocabulary else top_k
        layout = cls(len(lengths), 1, named, vocabulary, dtype)
        max_row_bytes = max(1, *lengths) * layout.bytes_per_token
        return cls(len(lengths), max(1, TARGET_FILE_BYTES // max_row_bytes), named, vocabulary, dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one scored token: its id, and its distribution's log-probabilities, ids and tail."""
        value_bytes = SCORE_DTYPES[self.dtype].itemsize
        if self.top_k is None:
            return 4 + self.vocabulary * value_bytes
        return 4 + self.top_k * (value_bytes + 4) + value_bytes

    def build_file_path(self, folder: Path, number: int) -> Path:
        """Return the path of file `number`, such as `00003.safetensors`."""
        return folder / f"{number:05d}.safetensors"

    def split_rows(self) -> list[range]:
        """Return the range of row numbers that each file holds, in the order of files."""
        step = self.rows_a_file
        return [range(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]


class ScoreWriter:
    """Writes the files of a layout; existing files of the same layout are kept."""

    def __init__(self, folder: Path, layout: ScoreLayout) -> None:
        self.folder, self.layout = folder, layout
        if read_json(folder / INDEX_FILE) != vars(layout):
            for old_file in folder.glob("*.safetensors"):
                remove_file(old_file)
            write_json(folder / INDEX_FILE, vars(layout))

    def list_missing_rows(self) -> list[range]:
        """Return the ranges of row numbers of the files that are missing or incomplete."""
        return [
            rows
            for number, rows in enumerate(self.layout.split_rows())
            if not _is_file_complete(self.layout.build_file_path(self.folder, number), rows)
        ]

    def write_file(self, rows: range, tokens: Sequence[Sequence[int]], scores: Sequence[TopKScores]) -> None:
        """Write the one file of these rows, their scored tokens and scores; it appears by rename, complete.

        rows: a range of `list_missing_rows`.
        """
        starts = torch.tensor([0, *(len(ids) for ids in tokens)]).cumsum(0)
        tensors = {
            "starts": starts,
            "tokens": torch.tensor([token for ids in tokens for token in ids], dtype=torch.int32),
            "logs": torch.cat([row.log_probs for row in scores]),
        }
        if self.layout.top_k is not None:
            tensors["ids"] = torch.cat([row.ids for row in scores if row.ids is not None])
            tails = [row.tail_log_prob for row in scores if row.tail_log_prob is not None]
            tensors["tail"] = torch.cat(tails)
        path = self.layout.build_file_path(self.folder, rows.start // self.layout.rows_a_file)
        part = path.with_name(f".{path.name}.part")
        require_lock(path)
        save_file(tensors, part)
        part.replace(path)


class ScoreReader:
    """Reads single rows of a finished folder of scores. Raises ValueError for a folder without any."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX_FILE)
        if index is None:
            raise ValueError(f"{str(folder)!r} holds no scores of a teacher: there is no {INDEX_FILE} in it")
        self.folder, self.layout = folder, ScoreLayout(**index)
        self._open_files: dict[int, Any] = {}

    def read_row(self, number: int) -> tuple[Tensor, TopKScores]:
        """Return the scored completion's token ids, (C,), and their scores, (C, k), of row `number`.

        Raises:
            ValueError: for a row outside of the scored data, or a file that cannot be read.
        """
        if not 0 <= number < self.layout.rows:
            raise ValueError(
                f"the teacher's scores in {str(self.folder)!r} are of rows 0 to {self.layout.rows - 1}, and "
                f"row {number} is asked for: only rows of the data that was scored have any"
            )
        file_number, row_in_file = divmod(number, self.layout.rows_a_file)
        file = self._open_file(file_number)
        first, last = file.get_slice("starts")[row_in_file : row_in_file + 2].tolist()

        def read_tensor(name: str) -> Tensor:
            """Return the row's part of the file's tensor `name`."""
            tensor: Tensor = file.get_slice(name)[first:last]
            return tensor

        if self.layout.top_k is None:
            return read_tensor("tokens"), TopKScores(read_tensor("logs"))
        return read_tensor("tokens"), TopKScores(read_tensor("logs"), read_tensor("ids"), read_tensor("tail"))

    def _open_file(self, number: int) -> Any:
        """Return file `number` as a safetensors handle, opened once; ValueError if it cannot be read."""
        if number not in self._open_files:
            path = self.layout.build_file_path(self.folder, number)
            try:
                self._open_files[number] = safe_open(path, "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): delete it, to have it made again"
                ) from error
        return self._open_files[number]


def _is_file_complete(path: Path, rows: range) -> bool:
    """Whether the file exists, has the size that its header states, and holds as many rows as `rows`."""
    try:
        with safe_open(path, "pt") as file:
            return bool(file.get_slice("starts").get_shape() == [len(rows) + 1])
    except (OSError, SafetensorError):
        return False
