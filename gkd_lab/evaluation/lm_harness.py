"""Run lm-eval on an exported checkpoint, and convert its scores and predictions to our form.

Documents and metrics are lm-eval's; a task is identified by our `lm_hash`. Code of a task file runs only if
the file is trusted; otherwise its functions are refused and its templates are sandboxed.
"""

import logging
import math
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
from transformers import AutoConfig, PreTrainedModel

from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import LmEvalEvaluation
from gkd_lab.config.errors import ConfigError, build_unknown_name_error, suggest_choices
from gkd_lab.config.hub_cache import is_hub_offline
from gkd_lab.config.lm_eval_task import FunctionTag, hash_task_config, read_task_file
from gkd_lab.evaluation.lm_hash import compute_task_hash
from gkd_lab.evaluation.lm_scores import stop_each_beam_for_itself
from gkd_lab.metrics.intervals import bootstrap_mean_interval

HarnessScores = dict[str, dict[str, Any]]

BATCH_SIZE = 16
"""Documents in one batch; it changes scores by rounding only."""
FEWSHOT_SEED = 1234
"""lm-eval's default, as are the other seeds."""
RESAMPLES = 1000
"""Bootstrap resamples for the standard error of metrics that are no mean."""


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
        """Number of documents of all tasks together, counting at most `limit` of each task."""
        counts = [len(task.eval_docs) for task in self.task_objects["tasks"].values()]
        limit = self.evaluation.limit
        return sum(count if limit is None else min(count, limit) for count in counts)


@lru_cache(maxsize=8)
def build_task(evaluation: LmEvalEvaluation, *, trusted: bool = False) -> BuiltTask:
    """Build (cached) a task with documents and hash; ConfigError if it is unknown, refused or lacks data."""
    with _silence_and_sandbox(trusted):
        task_or_config = _resolve_task(evaluation, trusted)
        manager = _get_task_manager(evaluation.path is None)
        try:
            task_objects = dict(manager.load([task_or_config]))
        except Exception as error:  # Datasets, templates and metrics raise errors of many libraries.
            raise ConfigError(_explain_build_error(evaluation, error)) from error
        for task in task_objects["tasks"].values():
            _set_num_fewshot(task, evaluation.num_fewshot)
        return BuiltTask(evaluation, task_objects, compute_task_hash(task_objects), trusted)


def open_checkpoint(
    checkpoint: Path | PreTrainedModel,
    model: SftModel,
    device: str,
    batch_size: int = BATCH_SIZE,
    tokenizer: Any = None,
) -> HFLM:
    """Open a checkpoint folder, or a loaded model and tokenizer, as lm-eval's causal or seq2seq `hf` model.

    T5 has relative positions, so sources up to the training length are not truncated to the 512 positions of
    its configuration.
    """
    is_encoder_decoder = model.family == "encoder-decoder"
    if isinstance(checkpoint, PreTrainedModel):
        pretrained: Any = checkpoint.to(device)
        config = checkpoint.config
    else:
        pretrained = str(checkpoint)
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    max_length = resolve_max_length(config)
    with _silence_and_sandbox(trusted=False):
        return HFLM(
            pretrained=pretrained,
            tokenizer=tokenizer,
            backend="seq2seq" if is_encoder_decoder else "causal",
            device=device,
            batch_size=batch_size,
            max_length=max(max_length, model.max_input_tokens) if is_encoder_decoder else max_length,
        )


def run_task(
    lm: HFLM, built_task: BuiltTask, report_progress: Callable[[int], None]
) -> tuple[HarnessScores, list[dict[str, Any]]]:
    """Run a task; return (metric -> scores, a prediction row per document and filter). Resets global seeds.

    `report_progress` is called with the number of answered requests.
    """
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
    """An lm-eval cache hook that counts answered requests."""

    def __init__(self, report_progress: Callable[[int], None]) -> None:
        self.report_progress, self.answered_requests = report_progress, 0

    def add_partial(self, *_: Any) -> None:
        """Count one request that lm-eval has answered, and report the total so far."""
        self.answered_requests += 1
        self.report_progress(self.answered_requests)


@cache
def _get_task_manager(include_defaults: bool) -> TaskManager:
    """Return lm-eval's task manager, cached; only `include_defaults` reads its index of tasks, which is slow.

    Only a task by name needs that index.
    """
    return TaskManager(include_defaults=include_defaults)


def _resolve_task(evaluation: LmEvalEvaluation, trusted: bool) -> str | dict[str, Any]:
    """Return the task's checked name, or its file's config with functions imported; ConfigError if invalid.

    Raises ConfigError for an unknown name, a changed file, and metrics that an untrusted file may not use.
    """
    if evaluation.path is None:
        names = _get_task_manager(True).all_tasks
        if evaluation.task not in names:
            suggestion = suggest_choices(evaluation.task, names).partition("valid:")[0]
            raise ConfigError(
                f"unknown lm-eval task {evaluation.task!r}; {suggestion}`lm-eval ls tasks` lists all "
                f"{len(names)}"
            )
        return evaluation.task
    path = Path(evaluation.path)
    config = read_task_file(path, trusted=trusted)
    if hash_task_config(config) != evaluation.content:
        raise ConfigError(f"{path}: the file or its data has changed since the run began; run again")
    if not trusted:
        _refuse_unknown_metrics(path, config)
    imported: dict[str, Any] = _import_tagged_functions(config)
    return imported


def _refuse_unknown_metrics(path: Path, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for metrics not built into lm-eval, which it would download from the hub as code."""
    for entry in config.get("metric_list") or ():
        metric = entry.get("metric") if isinstance(entry, dict) else entry
        if isinstance(metric, FunctionTag) or config.get("process_results") is not None:
            continue
        names = sorted(METRIC_REGISTRY)
        if metric not in names or (isinstance(entry, dict) and entry.get("hf_evaluate")):
            raise build_unknown_name_error(f"metric in {path}", metric, names)


def _import_tagged_functions(value: Any) -> Any:
    """Return a copy of the config with every function tag, at any depth, replaced by the imported function.

    The function is of an installed package, or of a trusted file.
    """
    if isinstance(value, FunctionTag):
        return _import_func_in_yml(value.text, value.folder)
    if isinstance(value, dict):
        return {key: _import_tagged_functions(item) for key, item in value.items()}
    return [_import_tagged_functions(item) for item in value] if isinstance(value, list) else value


def _set_num_fewshot(task: Task, num_fewshot: int | None) -> None:
    """Set the task's number of few-shot examples, as lm-eval's command does: a task defined with 0 keeps 0.

    None keeps the task's own number, or 0 if it has none.
    """
    default = task.get_config("num_fewshot")
    if default is None or (num_fewshot is not None and default != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _explain_build_error(evaluation: LmEvalEvaluation, error: Exception) -> str:
    """Return an error message: documents missing while offline, or else the first line of lm-eval's error."""
    task, text = evaluation.path or evaluation.task, f"{type(error).__name__}: {error}".splitlines()[0]
    if is_hub_offline() and (isinstance(error, ConnectionError) or "offline" in text.lower()):
        return (
            f"{task}: its documents are on the hub, HF_HUB_OFFLINE is set, and the cache of `datasets` has "
            f"no copy of them ({text}); run the task once online, or use a task file with local data"
        )
    return f"{task}: lm-eval cannot set it up: {text}"


@contextmanager
def _silence_and_sandbox(trusted: bool) -> Iterator[None]:
    """Context manager: lm-eval logs errors only, no progress bars; templates are sandboxed unless trusted.

    lm-eval's own template environment can reach any Python object: `{{ doc.__class__.__mro__ }}`.
    """
    logger = logging.getLogger("lm_eval")
    level, environment, init = logger.level, lm_eval.utils.env, tqdm.__init__
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = lambda bar, *args, **kwargs: init(bar, *args, **{**kwargs, "disable": True})
    if not trusted:
        lm_eval.utils.env = _build_sandbox(environment.filters)
    try:
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__, lm_eval.utils.env = init, environment


def _build_sandbox(filters: Mapping[str, Any]) -> SandboxedEnvironment:
    """Return a sandboxed Jinja environment with these filters, in which undefined variables are errors."""
    sandbox = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(filters)
    return sandbox


def _collect_scores(built_task: BuiltTask, results: Mapping[str, Any]) -> HarnessScores:
    """Return metric -> score dict (value, interval, signature, task hash) of a task or group.

    A tag has no score of its own: its metrics are `task.metric` of each task. ConfigError if a metric that
    was asked for is missing.
    """
    evaluation, samples = built_task.evaluation, results["samples"]
    origin = {"lm_eval": evaluation.lm_eval, "task_hash": built_task.hash}
    metrics = _parse_metrics(results["results"].get(evaluation.task, {}), samples.get(evaluation.task, ()))
    members = {
        name: _parse_metrics(results["results"][name], samples[name])
        for name in built_task.task_objects["tasks"]
        if name != evaluation.task
    }
    if not metrics:
        metrics = {
            f"{task}.{name}": score for task, scores in members.items() for name, score in scores.items()
        }
        members = {}
    if not metrics:
        raise ValueError(f"{evaluation.task}: lm-eval gave no score")
    for name in evaluation.metrics:
        if name not in metrics:
            raise ConfigError(f"{evaluation.task} has no score {name!r}; {suggest_choices(name, metrics)}")
    collected: HarnessScores = {}
    for name, score in metrics.items():
        task_values = {task: scores[name]["value"] for task, scores in members.items() if name in scores}
        signature = f"{evaluation.task}|{name}|lm-eval:{evaluation.lm_eval}|task:{built_task.hash}"
        collected[name] = {**score, "signature": signature, **origin}
        if task_values:
            collected[name]["tasks"] = task_values
    return collected


def _parse_metrics(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> HarnessScores:
    """Convert lm-eval's results of a task to metric -> score; key `acc,none` becomes `acc`, others stay."""
    scores: HarnessScores = {}
    for key, value in results.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        stderr = _parse_finite(results.get(f"{metric}_stderr,{filter_name}"))
        sample_values = [sample.get(metric) for sample in samples if sample["filter"] == filter_name]
        scores[metric if filter_name == "none" else key] = {
            "value": _parse_finite(value),
            **_compute_interval(float(value), stderr, sample_values),
            **({} if stderr is None else {"stderr": stderr}),
            "n": results.get("sample_len"),
        }
    return scores


def _compute_interval(value: float, stderr: float | None, sample_values: Sequence[Any]) -> dict[str, float]:
    """Return {low, high}: bootstrapped if `value` is the samples' mean, else by 1.96 `stderr`; {} without."""
    numbers = [float(number) for number in sample_values if isinstance(number, int | float | np.number)]
    if numbers and len(numbers) == len(sample_values) and math.isclose(np.mean(numbers), value):
        low, high = bootstrap_mean_interval(numbers)
    elif stderr is not None:
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
    else:
        return {}
    return {"low": low, "high": high}


def _parse_finite(value: Any) -> float | None:
    """Return a finite number as a float, anything else as None."""
    is_number = isinstance(value, int | float | np.number)
    return float(value) if is_number and math.isfinite(value) else None


def _iterate_prediction_rows(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield a dict per task, document and filter: its prompt, prediction, references and scores."""
    for task, task_samples in samples.items():
        for sample in task_samples:
            answers = sample["filtered_resps"]
            # Without a text the answers are pairs of a log-likelihood and whether greedy decoding agrees.
            text = answers[0] if len(answers) == 1 and isinstance(answers[0], str) else None
            yield {
                "task": task,
                "document": sample["doc_id"],
                "filter": sample["filter"],
                "prompt": str(sample["arguments"][0][0]),
                "prediction": "; ".join(map(str, answers)) if text is None else text,
                "references": [str(sample["target"])],
                "scores": {name: _convert_to_json_value(sample[name]) for name in sample["metrics"]},
            }


def _convert_to_json_value(value: Any) -> Any:
    """Return numpy values and tuples as lists or numbers for JSON; NaN and infinity become None."""
    if isinstance(value, np.ndarray | np.number):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return [_convert_to_json_value(item) for item in value]
    return _parse_finite(value) if isinstance(value, float) else value
