"""A teacher's scores on disk: safetensors files of so many rows each, which are memory-mapped to be read.

    index.json          rows, rows_a_file, top_k (null: all of the vocabulary), vocabulary, dtype
    00000.safetensors   starts (rows + 1,): where each row's tokens begin; tokens (T,): what was scored;
                        logs (T, k), ids (T, k) and tail (T,) as in `TopKScores`

A file appears by rename, so that whoever goes on writing takes what is there. Shapes: T tokens of a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gkd_lab.store.files import read_json, write_json
from gkd_lab.teachers.top_k_distributions import TopKScores

INDEX_FILE = "index.json"
TARGET_FILE_BYTES = 256 * 2**20
"""About the size of a file; it is in memory while it is written."""
SCORE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ScoreLayout:
    """How the scores of some rows are spread over files.

    top_k: tokens named of each distribution; None: all `vocabulary` of them. dtype: a name in DTYPES.
    """

    rows: int
    rows_a_file: int
    top_k: int | None
    vocabulary: int
    dtype: str

    @classmethod
    def create(cls, lengths: Sequence[int], top_k: int | None, vocabulary: int, dtype: str) -> "ScoreLayout":
        """For rows with so many scored tokens each; the longest of them decide how many make a file."""
        named = None if top_k is None or top_k >= vocabulary else top_k
        layout = cls(len(lengths), 1, named, vocabulary, dtype)
        longest = max(1, *lengths) * layout.bytes_per_token
        return cls(len(lengths), max(1, TARGET_FILE_BYTES // longest), named, vocabulary, dtype)

    @property
    def bytes_per_token(self) -> int:
        """Of the log-probabilities, of the ids where they are named, of the tail, and of the token itself."""
        one = SCORE_DTYPES[self.dtype].itemsize
        return 4 + (self.vocabulary * one if self.top_k is None else self.top_k * (one + 4) + one)

    def build_file_path(self, folder: Path, number: int) -> Path:
        return folder / f"{number:05d}.safetensors"

    def split_rows(self) -> list[range]:
        """The rows of each file."""
        step = self.rows_a_file
        return [range(first, min(first + step, self.rows)) for first in range(0, self.rows, step)]


class ScoreWriter:
    """Writes the files of a layout; those that are there and of this layout are left as they are."""

    def __init__(self, folder: Path, layout: ScoreLayout) -> None:
        self.folder, self.layout = folder, layout
        if read_json(folder / INDEX_FILE) != vars(layout):
            for old in folder.glob("*.safetensors"):
                old.unlink()
            write_json(folder / INDEX_FILE, vars(layout))

    def list_missing_rows(self) -> list[range]:
        """Rows of the files that are still to be written."""
        return [
            rows
            for number, rows in enumerate(self.layout.split_rows())
            if not _is_file_complete(self.layout.build_file_path(self.folder, number), rows)
        ]

    def write_file(self, rows: range, tokens: Sequence[Sequence[int]], scores: Sequence[TopKScores]) -> None:
        """The file of these rows: what was scored in each, and its scores."""
        starts = torch.tensor([0, *(len(ids) for ids in tokens)]).cumsum(0)
        found = {
            "starts": starts,
            "tokens": torch.tensor([one for ids in tokens for one in ids], dtype=torch.int32),
            "logs": torch.cat([one.log_probs for one in scores]),
        }
        if self.layout.top_k is not None:
            found["ids"] = torch.cat([one.ids for one in scores if one.ids is not None])
            found["tail"] = torch.cat([one.tail_log_prob for one in scores if one.tail_log_prob is not None])
        place = self.layout.build_file_path(self.folder, rows.start // self.layout.rows_a_file)
        part = place.with_name(f".{place.name}.part")
        save_file(found, part)
        part.replace(place)


class ScoreReader:
    """The scores of a finished folder. Nothing is read but the rows that are asked for.

    Raises ValueError for a folder that holds none.
    """

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / INDEX_FILE)
        if index is None:
            raise ValueError(f"{str(folder)!r} holds no scores of a teacher: there is no {INDEX_FILE} in it")
        self.folder, self.layout = folder, ScoreLayout(**index)
        self._open_files: dict[int, Any] = {}

    def read_row(self, number: int) -> tuple[Tensor, TopKScores]:
        """The tokens (C,) that were scored of row `number`, and their scores (C, k).

        Raises:
            ValueError: for a row that is not there, or a file that cannot be read.
        """
        if not 0 <= number < self.layout.rows:
            raise ValueError(
                f"the teacher's scores in {str(self.folder)!r} are of rows 0 to {self.layout.rows - 1}, and "
                f"row {number} is asked for: only rows of the data that was scored have any"
            )
        file, place = divmod(number, self.layout.rows_a_file)
        held = self._open_file(file)
        first, last = held.get_slice("starts")[place : place + 2].tolist()

        def part(name: str) -> Tensor:
            found: Tensor = held.get_slice(name)[first:last]
            return found

        if self.layout.top_k is None:
            return part("tokens"), TopKScores(part("logs"))
        return part("tokens"), TopKScores(part("logs"), part("ids"), part("tail"))

    def _open_file(self, number: int) -> Any:
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
    """Whether it can be opened, which compares its header with its size, and is of so many rows."""
    try:
        with safe_open(path, "pt") as file:
            return bool(file.get_slice("starts").get_shape() == [len(rows) + 1])
    except (OSError, SafetensorError):
        return False
