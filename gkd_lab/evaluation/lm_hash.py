"""Hash an lm-eval task: SHA-256 of its resolved configuration, its documents and lm-eval's version.

lm-eval's own hash covers the prompts of the documents that were run; this one does not depend on limit, model
or machine, and changes with everything else.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from gkd_lab.config.lm_eval_task import get_lm_eval_version

_PATH_FIELDS = ("data_files", "data_dir", "cache_dir")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def compute_task_hash(loaded: Mapping[str, Any]) -> str:
    """Return `sha256:...` of lm-eval's version and of the tasks and groups that `TaskManager.load` gave."""
    parts = {
        "lm_eval": get_lm_eval_version(),
        "tasks": {name: _describe_task(task) for name, task in sorted(loaded["tasks"].items())},
        "groups": {name: _describe_group(group) for name, group in sorted(loaded.get("groups", {}).items())},
    }
    return f"sha256:{hashlib.sha256(_serialize(parts).encode()).hexdigest()}"


def _describe_task(task: Any) -> dict[str, Any]:
    """Return a task's config without local paths, and the hashes of its documents and few-shot examples."""
    config = {name: value for name, value in vars(task.config).items() if value is not None}
    config["metadata"] = {"version": (config.get("metadata") or {}).get("version")}
    kwargs = config.get("dataset_kwargs") or {}
    config["dataset_kwargs"] = {name: value for name, value in kwargs.items() if name not in _PATH_FIELDS}
    if kwargs.keys() & set(_PATH_FIELDS) and str(config.get("dataset_path")).startswith("/"):
        del config["dataset_path"]
    examples = task.fewshot_docs() if task.config.num_fewshot else None
    return {
        "config": config,
        "documents": _hash_rows(task.eval_docs),
        "examples": None if examples is None else _hash_rows(examples),
    }


def _describe_group(group: Any) -> dict[str, Any]:
    """Return a dict of a group's member names, version and aggregate metrics."""
    aggregates = [vars(aggregate) for aggregate in group.aggregate_metric_list or ()]
    return {"members": list(group.child_names), "version": group.version, "sums": aggregates}


def _hash_rows(rows: Iterable[Any]) -> str:
    """Return the SHA-256 in hexadecimal of rows in their order, one JSON line each."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_serialize(row).encode() + b"\n")
    return digest.hexdigest()


def _serialize(value: Any) -> str:
    """Return a value as JSON text with sorted keys; other objects as by `_serialize_object`."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_serialize_object)


def _serialize_object(value: Any) -> Any:
    """Return a function's source, a dataclass's fields, else the object's repr without its memory address."""
    if isinstance(value, partial):
        return [value.func, list(value.args), value.keywords]
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    if hasattr(value, "__dataclass_fields__"):
        return vars(value)
    return _ADDRESS.sub("", repr(value))
