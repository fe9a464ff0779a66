"""lm-eval on an exported checkpoint: its task found and built, its scores and predictions in our form.

Documents and metrics are lm-eval's; what identifies a task is ours (`task_hash`). Code of a task file runs
only where the file is trusted: without that its functions are refused and its templates are sandboxed.
"""

import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import lm_eval.utils
import numpy as np
import torch
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import _import_func_in_yml
from tqdm import tqdm
from transformers import AutoConfig

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import LmEvalEvaluation
from gkd_lab.config.errors import ConfigError, build_unknown_name_error, suggest_choices
from gkd_lab.config.lm_eval_task import FunctionTag, hash_task_config, read_task_file
from gkd_lab.evaluation.lm_hash import compute_task_hash
from gkd_lab.evaluation.lm_scores import stop_each_beam_for_itself
from gkd_lab.metrics.intervals import bootstrap_mean_interval

HarnessScores = dict[str, dict[str, Any]]

BATCH_SIZE = 16
"""Documents at once; it changes scores by rounding only."""
FEWSHOT_SEED = 1234
"""lm-eval's own default, as are the seeds below."""
RESAMPLES = 1000
"""For the standard error of metrics that are no mean."""


@dataclass(frozen=True)
class BuiltTask:
    """A task, a group of tasks, or the tasks of a tag, with their documents."""

    evaluation: LmEvalEvaluation
    task_objects: dict[str, Any]
    """lm-eval's `tasks`, `groups` and `group_map`."""
    hash: str
    trusted: bool

    @property
    def document_count(self) -> int:
        """How many are asked, at most `limit` of each task."""
        counts = [len(task.eval_docs) for task in self.task_objects["tasks"].values()]
        limit = self.evaluation.limit
        return sum(count if limit is None else min(count, limit) for count in counts)


@lru_cache(maxsize=8)
def build_task(evaluation: LmEvalEvaluation, *, trusted: bool = False) -> BuiltTask:
    """The task with its documents, and its hash. Raises SpecError: unknown, refused, or without its data."""
    with _silence_and_sandbox(trusted):
        asked = _resolve_task(evaluation, trusted)
        manager = _get_task_manager(evaluation.path is None)
        try:
            loaded = dict(manager.load([asked]))
        except Exception as error:
            # Data sets, templates and metrics raise errors of many libraries; each means: not like this.
            raise ConfigError(_explain_build_error(evaluation, error)) from error
        for task in loaded["tasks"].values():
            _set_fewshot(task, evaluation.num_fewshot)
        return BuiltTask(evaluation, loaded, compute_task_hash(loaded), trusted)


def open_checkpoint(folder: Path, model: SftModel, device: str, batch_size: int = BATCH_SIZE) -> HFLM:
    """An exported checkpoint as lm-eval's `hf` model.

    T5's configuration names 512 positions, which its relative ones do not need: sources as long as those
    that it was trained on are not cut.
    """
    encoder = model.family == "encoder-decoder"
    longest = resolve_max_length(AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
    with _silence_and_sandbox(trusted=False):
        return HFLM(
            pretrained=str(folder),
            backend="seq2seq" if encoder else "causal",
            device=device,
            batch_size=batch_size,
            max_length=max(longest, model.max_input_tokens) if encoder else longest,
        )


def run_task(
    lm: HFLM, built_task: BuiltTask, report_progress: Callable[[int], None]
) -> tuple[HarnessScores, list[dict[str, Any]]]:
    """(scores, one row a document and filter); `advance` hears how many requests are answered."""
    stop_each_beam_for_itself()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    for task in built_task.task_objects["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    lm.set_cache_hook(_RequestCounter(report_progress))
    with _silence_and_sandbox(built_task.trusted):
        results = evaluate(
            lm, built_task.task_objects, limit=built_task.evaluation.limit, bootstrap_iters=RESAMPLES
        )
    assert results is not None, "one process holds all results"
    return _collect_scores(built_task, results), list(_iterate_prediction_rows(results["samples"]))


class _RequestCounter:
    """Called by lm-eval with each answered request, for its cache; here to count them."""

    def __init__(self, report_progress: Callable[[int], None]) -> None:
        self.report_progress, self.answered_requests = report_progress, 0

    def add_partial(self, *_: Any) -> None:
        self.answered_requests += 1
        self.report_progress(self.answered_requests)


@cache
def _get_task_manager(include_defaults: bool) -> TaskManager:
    """The index of lm-eval's own tasks takes seconds to read; a task file needs none of it."""
    return TaskManager(include_defaults=include_defaults)


def _resolve_task(evaluation: LmEvalEvaluation, trusted: bool) -> str | dict[str, Any]:
    """What lm-eval is asked to load: a known name, or the configuration in a file."""
    if evaluation.path is None:
        known = _get_task_manager(True).all_tasks
        if evaluation.task not in known:
            close = suggest_choices(evaluation.task, known).partition("valid:")[0]
            raise ConfigError(
                f"unknown lm-eval task {evaluation.task!r}; {close}`lm-eval ls tasks` lists all {len(known)}"
            )
        return evaluation.task
    path = Path(evaluation.path)
    config = read_task_file(path, trusted=trusted)
    if hash_task_config(config) != evaluation.content:
        raise ConfigError(f"{path}: it, or its data, has changed since it was asked for; run again")
    if not trusted:
        _refuse_metrics(path, config)
    called: dict[str, Any] = _import_functions(config)
    return called


def _refuse_metrics(path: Path, config: Mapping[str, Any]) -> None:
    """lm-eval would fetch a metric that it does not know from the hub, as code."""
    for entry in config.get("metric_list") or ():
        metric = entry.get("metric") if isinstance(entry, dict) else entry
        if isinstance(metric, FunctionTag) or config.get("process_results") is not None:
            continue
        known = sorted(METRIC_REGISTRY)
        if metric not in known or (isinstance(entry, dict) and entry.get("hf_evaluate")):
            raise build_unknown_name_error(f"metric in {path}", metric, known)


def _import_functions(value: Any) -> Any:
    """The configuration with its functions imported: installed ones, or those of a trusted file."""
    if isinstance(value, FunctionTag):
        return _import_func_in_yml(value.text, value.folder)
    if isinstance(value, dict):
        return {key: _import_functions(item) for key, item in value.items()}
    return [_import_functions(item) for item in value] if isinstance(value, list) else value


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    """As lm-eval's command: a task that is made for no examples stays without."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _explain_build_error(evaluation: LmEvalEvaluation, error: Exception) -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    asked, text = evaluation.path or evaluation.task, f"{type(error).__name__}: {error}".splitlines()[0]
    if offline and (isinstance(error, ConnectionError) or "offline" in text.lower()):
        return (
            f"{asked}: its documents are on the hub, HF_HUB_OFFLINE is set, and the cache of `datasets` has "
            f"no copy of them ({text}); ask for the task once online, or give a task file with local data"
        )
    return f"{asked}: lm-eval cannot set it up: {text}"


@contextmanager
def _silence_and_sandbox(trusted: bool) -> Iterator[None]:
    """Within it lm-eval logs errors only and shows no bars; templates of what is not trusted are sandboxed.

    Its environment can reach any Python object from a template: `{{ doc.__class__.__mro__ }}`.
    """
    logger = logging.getLogger("lm_eval")
    level, environment, init = logger.level, lm_eval.utils.env, tqdm.__init__
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = lambda bar, *items, **more: init(bar, *items, **{**more, "disable": True})
    if not trusted:
        lm_eval.utils.env = _build_sandbox(environment.filters)
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__, lm_eval.utils.env = init, environment


def _build_sandbox(filters: Mapping[str, Any]) -> SandboxedEnvironment:
    made = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    made.filters.update(filters)
    return made


def _collect_scores(built_task: BuiltTask, results: Mapping[str, Any]) -> HarnessScores:
    """Metric -> value, interval, origin: of the task or group itself, else of each task of a tag."""
    evaluation, found = built_task.evaluation, results["results"]
    facts = {"lm_eval": evaluation.lm_eval, "task_hash": built_task.hash}
    samples = results["samples"]
    own = _parse_metrics(found.get(evaluation.task, {}), samples.get(evaluation.task, ()))
    others = [name for name in built_task.task_objects["tasks"] if name != evaluation.task]
    members = {name: _parse_metrics(found[name], samples[name]) for name in others}
    if not own:
        own = {f"{name}.{metric}": one for name, parts in members.items() for metric, one in parts.items()}
        members = {}
    if not own:
        raise ValueError(f"{evaluation.task}: lm-eval gave no score")
    for metric in evaluation.metrics:
        if metric not in own:
            raise ConfigError(f"{evaluation.task} has no score {metric!r}; {suggest_choices(metric, own)}")
    scores: HarnessScores = {}
    for metric, one in own.items():
        parts = {name: m[metric]["value"] for name, m in members.items() if metric in m}
        signature = f"{evaluation.task}|{metric}|lm-eval:{evaluation.lm_eval}|task:{built_task.hash}"
        scores[metric] = {**one, "signature": signature, **facts, **({"tasks": parts} if parts else {})}
    return scores


def _parse_metrics(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> HarnessScores:
    """`acc,none` is `acc`; `exact_match,strict-match` keeps its filter. Values are lm-eval's own."""
    scores: HarnessScores = {}
    for key, value in results.items():
        metric, comma, way = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        error = _parse_finite(results.get(f"{metric}_stderr,{way}"))
        each = [one.get(metric) for one in samples if one["filter"] == way]
        scores[metric if way == "none" else key] = {
            "value": _parse_finite(value),
            **_compute_interval(float(value), error, each),
            **({} if error is None else {"stderr": error}),
            "n": results.get("sample_len"),
        }
    return scores


def _compute_interval(value: float, stderr: float | None, sample_values: Sequence[Any]) -> dict[str, float]:
    """As for every score, over examples, where the value is their mean; else by lm-eval's standard error."""
    numbers = [float(one) for one in sample_values if isinstance(one, int | float | np.number)]
    if numbers and len(numbers) == len(sample_values) and math.isclose(np.mean(numbers), value):
        low, high = bootstrap_mean_interval(numbers)
    elif stderr is not None:
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
    else:
        return {}
    return {"low": low, "high": high}


def _parse_finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float | np.number)
    return float(value) if is_number and math.isfinite(value) else None


def _iterate_prediction_rows(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    for task, found in samples.items():
        for one in found:
            answers = one["filtered_resps"]
            text = answers[0] if len(answers) == 1 and isinstance(answers[0], str) else None
            yield {
                "task": task,
                "document": one["doc_id"],
                "filter": one["filter"],
                "prompt": str(one["arguments"][0][0]),
                "prediction": _join_answers(answers) if text is None else text,
                "references": [str(one["target"])],
                "scores": {name: _convert_to_json_value(one[name]) for name in one["metrics"]},
            }


def _join_answers(answers: Sequence[Any]) -> str:
    """Log-likelihoods, one a choice, with whether the choice is what the model would write."""
    return "; ".join(str(answer) for answer in answers)


def _convert_to_json_value(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.number):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [_convert_to_json_value(item) for item in value]
    return _parse_finite(value) if isinstance(value, float) else value
