"""Rows of a user's data: a folder, a file or a data set of the hub, checked before any weights are loaded."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import DatasetMixtureConfig, get_dataset

from gkd_lab.config.errors import ConfigError, build_unknown_name_error
from gkd_lab.config.library_errors import explain_data_error
from gkd_lab.encoding.row_encoder import PROMPT_ROLES, ROW_FORMS, list_message_texts
from gkd_lab.scripts.local_paths import looks_like_path, suggest_path
from gkd_lab.scripts.train_options import TrainRequest, TrainScriptArguments
from gkd_lab.tasks import Row
from gkd_lab.tasks.data_folder import DataFolder, read_file_rows

Rows = Any
"""A list of rows, a `datasets.Dataset`, or an `IterableDataset`."""
PROMPT_COLUMNS = ("messages", "prompt", "input_ids", "prompt_ids")
DATA_SUFFIXES = (".jsonl", ".parquet")


@dataclass
class RunData:
    """The rows of a run by use; None: not used."""

    train: Rows
    evaluation: Rows | None = None
    test: Rows | None = None
    names: dict[str, str] = field(default_factory=dict)
    """Use -> name of the split."""

    def list_parts(self) -> list[tuple[str, str, Rows]]:
        """Return (use, name of its split, its rows) of each use, the training first."""
        return [(use, name, getattr(self, use)) for use, name in self.names.items()]

    def hash_rows(self) -> dict[str, str]:
        """Return use -> SHA-256 of its rows, in order; a stream of rows, which has no end, is left out."""
        return {use: _hash_rows(rows) for use, _, rows in self.list_parts() if hasattr(rows, "__len__")}


def _hash_rows(rows: Rows) -> str:
    """Return the SHA-256 over the rows as JSON with sorted keys, 64 hexadecimal digits."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return total.hexdigest()


def load_run_data(request: TrainRequest) -> RunData:
    """Return the rows to train on, evaluate on and score, with columns checked. Raises ConfigError."""
    script, training = request.script, request.training
    names = {"train": script.dataset_train_split}
    if request.evaluates:
        names["evaluation"] = script.dataset_eval_split or script.dataset_test_split
    if script.metrics:
        names["test"] = script.dataset_test_split
    splits = load_splits(script, request.mixture, names.values(), training.seed)
    limits = {
        "train": script.max_train_samples,
        "evaluation": script.max_eval_samples,
        "test": script.max_test_samples,
    }
    rows = {use: take_rows(splits[name], limits[use]) for use, name in names.items()}
    reads_completions = training.lmbda < 1 and not training.seq_kd
    check_columns(
        rows["train"],
        names["train"],
        needs_completion=reads_completions,
        reason=f"lmbda: {training.lmbda:g} trains on completions too; set `lmbda: 1` to train on the "
        "student's own text alone, or `seq_kd: true` to let the teacher write",
    )
    metrics = ", ".join(script.metrics)
    reason = f"metrics: {metrics} compare with it; leave `metrics` out for the loss alone"
    for use in ("evaluation", "test"):
        if use in rows:
            rows[use] = collect_all_rows(rows[use])
            check_columns(rows[use], names[use], needs_completion=bool(script.metrics), reason=reason)
    return RunData(**rows, names=names)


def load_splits(
    script: TrainScriptArguments, mixture: DatasetMixtureConfig, names: Iterable[str], seed: int
) -> dict[str, Rows]:
    """Return split -> rows for these splits of the data; local data is read by the project's own reader.

    `test_split_size` makes a split `test` out of the rows of `train`, drawn by the seed. Raises ConfigError
    for data or a split that does not exist, and for damaged files, with file and line.
    """
    wanted = list(dict.fromkeys(names))
    try:
        if mixture.datasets:
            set_seed(seed)  # TRL draws the test split by the global generator
            splits = dict(get_dataset(mixture))
        elif mixture.test_split_size is not None:
            splits = _split_train_rows(
                _load_named(script, [script.dataset_train_split]), mixture, script, seed
            )
        else:
            splits = _load_named(script, wanted)
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"dataset_name: {' '.join(str(error).split())}") from error
    for name in wanted:
        _require_split(name, splits)
    return {name: splits[name] for name in wanted}


def _require_split(name: str, splits: Iterable[str]) -> None:
    """Raise ConfigError with the nearest split if there is none of this name."""
    available = list(splits)
    if name not in available:
        error = build_unknown_name_error("split", name, available)
        raise ConfigError(
            f"{error}; name one with dataset_train_split, dataset_eval_split or dataset_test_split, or cut "
            "one off the training rows with test_split_size"
        )


def _split_train_rows(
    splits: Mapping[str, Rows], mixture: DatasetMixtureConfig, script: TrainScriptArguments, seed: int
) -> dict[str, Rows]:
    """Return `train` and `test` out of the training rows, drawn by the seed."""
    import datasets

    rows = splits[script.dataset_train_split]
    if isinstance(rows, datasets.IterableDataset):
        raise ConfigError("test_split_size needs rows that can be counted: leave dataset_streaming out")
    dataset = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    return dict(dataset.train_test_split(test_size=mixture.test_split_size, seed=seed))


def _load_named(script: TrainScriptArguments, wanted: Sequence[str]) -> dict[str, Rows]:
    """Return the wanted splits of `dataset_name`; of a local folder no other split is read."""
    name = script.dataset_name or ""
    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(path, wanted)
    if path.is_dir():
        return _read_folder(path / script.dataset_config if script.dataset_config else path, wanted)
    if looks_like_path(name) or name.endswith(DATA_SUFFIXES):
        raise ConfigError(f"dataset_name: there is no file or folder {name!r}{suggest_path(name)}")
    return _load_from_hub(script)


def _read_file(path: Path, wanted: Sequence[str]) -> dict[str, Rows]:
    """Return the rows of one file as the split `train`."""
    if path.suffix not in DATA_SUFFIXES:
        raise ConfigError(f"dataset_name: {str(path)!r} is neither .jsonl nor .parquet")
    for name in wanted:
        if name != "train":
            _require_split(name, ["train"])
    rows = _collect_rows(row for _, row in read_file_rows(path))
    if not rows:
        raise ConfigError(f"dataset_name: {str(path)!r} is empty, expected at least one row")
    return {"train": rows}


def _read_folder(path: Path, wanted: Sequence[str]) -> dict[str, Rows]:
    """Return the wanted splits of a folder of jsonl or parquet files, or of one that `datasets` saved."""
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    folder = DataFolder(path)
    for name in wanted:
        _require_split(name, folder.files)
    return {
        split: _collect_rows(row for _, row in folder.read_rows(split))
        for split, count in folder.row_counts.items()
        if split in wanted and count
    }


def _collect_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as a list of dicts."""
    return [dict(row) for row in rows]


def _load_from_hub(script: TrainScriptArguments) -> dict[str, Rows]:
    """Return all splits of a data set of the hub; its code is never run."""
    import datasets

    try:
        loaded = datasets.load_dataset(
            script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming
        )
    except Exception as error:
        # The library raises errors of its own, of the hub's client and of its readers of files.
        name = str(script.dataset_name)
        sentence = explain_data_error(error, name, script.dataset_config, "dataset_name")
        reason = sentence.removeprefix(f"dataset_name: {name!r}").lstrip(": ")
        if reason == sentence:  # it is about another field
            raise ConfigError(sentence) from error
        raise ConfigError(
            f"dataset_name: {name!r} is neither a file nor a folder here{suggest_path(name)}, and it cannot "
            f"be loaded from the hub: {reason}"
        ) from error
    return dict(loaded)


# ---- rows ----


def take_rows(rows: Rows, count: int | None) -> Rows:
    """Return the first `count` rows, or all for None, of the same type as before."""
    if count is None:
        return rows
    if isinstance(rows, list):
        return rows[:count]
    return rows.select(range(min(count, len(rows)))) if hasattr(rows, "__len__") else rows.take(count)


def collect_all_rows(rows: Rows) -> Rows:
    """Return rows that can be indexed: those of a stream as a list, any others unchanged."""
    return rows if hasattr(rows, "__len__") else _collect_rows(rows)


def check_columns(rows: Rows, split: str, *, needs_completion: bool, reason: str) -> None:
    """Raise ConfigError for a split without rows, or whose first row has no prompt or no needed completion.

    reason: why a completion is needed.
    """
    first: Mapping[str, Any] | None = next(iter(rows), None)
    if first is None:
        raise ConfigError(f"the split {split!r} has no rows")
    columns = [name for name, value in first.items() if value is not None]
    if not set(columns) & set(PROMPT_COLUMNS):
        raise ConfigError(f"the split {split!r} {_describe_columns(columns)}; a row has one of:\n{ROW_FORMS}")
    if needs_completion and not has_target(first):
        raise ConfigError(f"the first row of the split {split!r} has no completion, but {reason}")


def _describe_columns(columns: Sequence[str]) -> str:
    """Return `has the columns ... (did you mean ...?)`."""
    near = [
        (column, difflib.get_close_matches(column, PROMPT_COLUMNS, n=1, cutoff=0.6)) for column in columns
    ]
    hints = [f"did you mean `{match[0]}` by `{column}`?" for column, match in near if match]
    return f"has the columns {', '.join(columns) or 'none'}" + (f" ({hints[0]})" if hints else "")


def has_target(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a completion to compare with."""
    if row.get("messages"):
        return row["messages"][-1].get("role") not in PROMPT_ROLES
    return any(row.get(name) for name in ("completion", "completion_ids", "labels", "completion_mask"))


def read_target_text(row: Mapping[str, Any]) -> str | None:
    """Return a row's completion as text: that of `completion`, or of the last assistant turn.

    None where the row holds token ids, or no completion.
    """
    answer = row.get("completion")
    if isinstance(answer, str):
        return answer
    turns = answer or row.get("messages") or ()
    if not turns or turns[-1].get("role") in PROMPT_ROLES:
        return None
    return "".join(list_message_texts(turns[-1]))


def build_scored_rows(rows: Rows, split: str, decode: Any, encode: Any) -> tuple[list[Row], list[Any]]:
    """Return (prompt and reference texts, encoded rows) of a split that is to be scored.

    decode: token ids -> text, for rows that hold ids. encode: row -> `Example`. Raises ConfigError for a row
    without a completion, or one that cannot be encoded.
    """
    texts, examples = [], []
    for number, row in enumerate(rows):
        try:
            example = encode(row)
        except ValueError as error:
            raise ConfigError(f"row {number} of the split {split!r}: {error}") from error
        target = read_target_text(row)
        if target is None:
            target = decode(example.completion_ids)
        if not target and not example.completion_ids:
            raise ConfigError(f"row {number} of the split {split!r} has no completion to compare with")
        texts.append(Row(decode(example.prompt_ids), target.strip(), (target.strip(),)))
        examples.append(example)
    return texts, examples
