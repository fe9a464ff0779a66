"""Options of `gkd-lab train`: TRL's, from a YAML file and from flags, parsed by TRL's own parser.

TRL's parser takes values of a file as they are. Here each is checked first, so that a wrong one is a message
that names it, and not an error of the library that meets it.
"""

import math
import os
import re
import sys
from argparse import Action, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from transformers.trainer_utils import get_last_checkpoint
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from gkd_lab.config.cell import Evaluation
from gkd_lab.config.errors import (
    ConfigError,
    build_unknown_name_error,
    suggest_choices,
)
from gkd_lab.config.yaml_files import suggest_plain_number
from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.metrics import METRICS
from gkd_lab.metrics.score import CLASSIFICATION_METRICS
from gkd_lab.scripts.local_paths import suggest_path
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.config_fields import check_options

TEXT_METRICS = tuple(name for name in METRICS if name not in (*CLASSIFICATION_METRICS, "self_bleu"))
"""Metrics of one written text for each prompt."""
DECODINGS = ("greedy", "beam", "sample")
_ON_POLICY_VALUES = ("on_policy_loss", "on_policy_completion_length", "on_policy_truncated")
"""What an evaluation with `eval_on_policy` reports besides the loss and the metrics."""
_COUNTS = (
    *("max_train_samples", "max_eval_samples", "max_test_samples", "early_stopping_patience"),
    *("max_new_tokens", "per_device_train_batch_size", "per_device_eval_batch_size"),
    "gradient_accumulation_steps",
)


@dataclass
class TrainScriptArguments(ScriptArguments):
    """TRL's `ScriptArguments`, and which rows are scored, how, and when to stop.

    Args:
        dataset_eval_split: Split to evaluate on during training; None: the test split.
        max_train_samples, max_eval_samples, max_test_samples: First rows to use; None: all.
        metrics: Scores of the text that the student writes, such as `rouge2`; none: the loss alone.
        eval_decoding: `greedy`, `beam` or `sample`.
        eval_temperature, eval_num_beams: Of `sample` and of `beam`.
        early_stopping_patience: Evaluations without progress before training stops; None: never.
        early_stopping_threshold: Smallest progress that counts.
    """

    dataset_eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on during training; default: the test split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "First rows to train on."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "First rows to evaluate on during training."}
    )
    max_test_samples: int | None = field(default=None, metadata={"help": "First rows to score at the end."})
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "Scores of the text that the student writes."},
    )
    eval_decoding: str = field(
        default="greedy",
        metadata={"help": "How the student writes in an evaluation.", "choices": list(DECODINGS)},
    )
    eval_temperature: float = field(default=1.0, metadata={"help": "Of `eval_decoding: sample`."})
    eval_num_beams: int = field(default=4, metadata={"help": "Of `eval_decoding: beam`."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without progress before training stops."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "Smallest progress that counts for early stopping."}
    )

    def build_evaluation(self, max_new_tokens: int) -> Evaluation:
        """Return how the student writes and what is scored. `metrics` must not be empty."""
        return Evaluation(
            decoding=self.eval_decoding,  # type: ignore[arg-type]
            temperature=self.eval_temperature if self.eval_decoding == "sample" else None,
            num_beams=self.eval_num_beams if self.eval_decoding == "beam" else None,
            length_penalty=1.0 if self.eval_decoding == "beam" else None,
            split="test",
            max_output_tokens=max_new_tokens,
            seed=0 if self.eval_decoding == "sample" else None,
            metrics=tuple(self.metrics),
        )


@dataclass(frozen=True)
class TrainRequest:
    """A checked request: TRL's four groups of arguments.

    settings: the options whose value is not the default, as the user gave them.
    """

    script: TrainScriptArguments
    training: GKDConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    settings: Mapping[str, Any]

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluations during training."""
        return str(getattr(self.training.eval_strategy, "value", self.training.eval_strategy)) != "no"


OPTION_CLASSES = (TrainScriptArguments, GKDConfig, ModelConfig, DatasetMixtureConfig)


class TrainParser(TrlParser):
    """TRL's parser of the four groups of arguments, whose errors are ConfigErrors."""

    def __init__(self) -> None:
        super().__init__(OPTION_CLASSES, prog="gkd-lab train", add_help=False)

    def adapt_defaults(self) -> None:
        """Set the defaults that depend on this machine: its devices, and whether there is a terminal."""
        if not torch.accelerator.is_available():
            # TRL's default, bfloat16 on a GPU, is refused on a machine without one.
            self.set_defaults(use_cpu=True, bf16=False)
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                self.set_defaults(ddp_backend="gloo")
        self.set_defaults(log_level_replica="error")
        # The Trainer shows no bar while the libraries are silenced, and a file needs the log's lines alone.
        self.set_defaults(disable_tqdm=not sys.stderr.isatty())

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a ConfigError, without the usage of 200 options."""
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", message)
        match = re.fullmatch(r"(--\w+: )invalid choice: '(.*)' \(choose from (.*)\)", message)
        if match is not None:
            choices = [choice.strip("'") for choice in match[3].split(", ")]
            message = f"{match[1]}{match[2]!r} is not valid: {suggest_choices(match[2], choices)}"
        raise ConfigError(f"{message}; see `gkd-lab train --help`")

    def find_action(self, name: str) -> Action | None:
        """Return the argparse action of a field; None if there is no such field."""
        return next((action for action in self._actions if action.dest == name), None)

    def list_options(self) -> list[str]:
        """Return the names of all fields, each once."""
        return list(dict.fromkeys(action.dest for action in self._actions))


# ---- the file ----


def check_config(config: Mapping[str, Any], path: Path, parser: TrainParser) -> dict[str, Any]:
    """Return the file's values, each of a type that its option takes. Raises ConfigError.

    `false` stands for the `no` of options such as `eval_strategy`.
    """
    annotations = {name: hint for owner in OPTION_CLASSES for name, hint in get_type_hints(owner).items()}
    checked = {}
    for key, value in config.items():
        action = parser.find_action(str(key))
        if action is None:
            error = build_unknown_name_error("option", key, parser.list_options())
            raise ConfigError(f"{path}: {error}")
        try:
            checked[key] = _check_value(value, action, str(annotations[key]))
        except (ValueError, TypeError, ArgumentTypeError) as error:
            raise ConfigError(f"{path}: {key}: {value!r} is not valid: {error}") from error
    return checked


def _check_value(value: Any, action: Action, annotation: str) -> Any:
    """Return a file's value for an option; ValueError if it is none of the option's values."""
    convert: Any = action.type
    if value is None:
        if convert in (int, float):
            raise ValueError("must be a number; leave the line out for the default")
        return None
    if isinstance(value, dict):
        if "dict" not in annotation:
            raise ValueError("must be one value, not `name: value` lines")
        return value
    if isinstance(value, list):
        if "list" not in annotation:
            raise ValueError("must be one value, not a list")
        return value
    if action.nargs == "+":
        raise ValueError(f"must be a list, as [{value}]")
    choices = _list_choices(action, convert)
    if value is False and "no" in choices:
        return "no"
    if choices and str(value) not in choices:
        raise ValueError(suggest_choices(value, choices))
    if convert is str:
        return value
    _convert_text(str(value), convert)
    return value


def _list_choices(action: Action, convert: Any) -> list[str]:
    """Return the texts that an option takes; [] if it takes any."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    return [str(choice.value) for choice in convert] if hasattr(convert, "__members__") else []


def _convert_text(text: str, convert: Callable[[str], Any]) -> None:
    """Convert a text as argparse would; ValueError, in words, if that fails, or for a number like `010`."""
    reason = _explain_number(text, convert)
    if reason is not None:
        raise ValueError(reason)
    try:
        convert(text)
    except ValueError as error:
        words = {int: "must be a whole number", float: "must be a number"}
        raise ValueError(words.get(convert, str(error))) from error  # type: ignore[call-overload]


def _explain_number(text: str, convert: Callable[[str], Any] | None) -> str | None:
    """Return why a text is refused though Python reads it as a number: `010`, `1_000`, `inf`; else None."""
    if convert not in (int, float):
        return None
    plain = suggest_plain_number(text)
    if plain is not None:
        return f"must have no leading zeros and no `_`; did you mean {plain}?"
    try:
        return None if math.isfinite(float(text)) else "must be a finite number"
    except ValueError:
        return None


# ---- flags ----


def check_flags(words: Sequence[str], parser: TrainParser) -> None:
    """Raise ConfigError for a flag's number such as `010`, `1_000` or `inf`, which Python alone takes."""
    convert: Any = None
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, text = word.partition("=")
            action = parser.find_action(flag.removeprefix("--").replace("-", "_"))
            convert = None if action is None else action.type
            if not equals:
                continue
        else:
            text = word
        reason = _explain_number(text, convert)
        if reason is not None:
            raise ConfigError(f"{flag}: {text!r} is not valid: {reason}")


# ---- file and flags ----


def parse_request(path: Path | None, config: Mapping[str, Any], words: Sequence[str]) -> TrainRequest:
    """Return the checked request of a file's values (`path` names it in errors) and flags, which override.

    Raises ConfigError for what is unknown, missing, of a wrong type, or does not fit together.
    """
    parser = TrainParser()
    parser.adapt_defaults()
    defaults = vars(parser.parse_known_args([])[0])
    if path is not None:
        parser.set_defaults_with_config(**check_config(config, path, parser))
    check_flags(words, parser)
    namespace, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise _build_unknown_flag_error(unknown[0], parser)
    try:
        script, training, model, mixture = parser.parse_args_and_config(args=list(words))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    settings = {name: value for name, value in vars(namespace).items() if value != defaults[name]}
    request = TrainRequest(script, training, model, mixture, settings)
    check_request(request)
    return request


def _build_unknown_flag_error(word: str, parser: TrainParser) -> ConfigError:
    """Return (not raise) the ConfigError for a word of the command line that no option takes."""
    if not word.startswith("-"):
        return ConfigError(f"unexpected {word!r}: options are given as --OPTION VALUE")
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    return build_unknown_name_error("option", f"--{name}", [f"--{n}" for n in parser.list_options()])


# ---- what fits together ----


def check_request(request: TrainRequest) -> None:
    """Raise ConfigError for a request that cannot be run; nothing is loaded for that."""
    script, training = request.script, request.training
    _check_named(request)
    script.metrics = list(dict.fromkeys(script.metrics))
    for metric in script.metrics:
        if metric not in TEXT_METRICS:
            raise build_unknown_name_error("metric", metric, TEXT_METRICS)
    for name in _COUNTS:
        value = getattr(script if hasattr(script, name) else training, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is not valid: must be at least 1")
    if script.eval_temperature <= 0 or script.eval_num_beams < 1:
        raise ConfigError("eval_temperature must be above 0, and eval_num_beams at least 1")
    _check_selection(request)
    try:
        check_options(training)
        CellArguments.build(training)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_folders(training)


def _check_named(request: TrainRequest) -> None:
    """Raise ConfigError unless student, teacher and data are named."""
    if not request.model.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: name the student, a folder or a model of the hub")
    if not request.training.teacher_model_name_or_path:
        raise ConfigError(
            "teacher_model_name_or_path is missing: name the teacher, a folder or a model of the hub (the "
            "student's own name distils it from a frozen copy of itself)"
        )
    if not request.script.dataset_name and not request.mixture.datasets:
        raise ConfigError(
            "dataset_name is missing: give a data set of the hub, a folder with train.jsonl or "
            "train.parquet, a file of these kinds, or a folder of `save_to_disk`"
        )


def _check_selection(request: TrainRequest) -> None:
    """Raise ConfigError for a checkpoint chosen by a score that no evaluation reports."""
    script, training = request.script, request.training
    metric = training.metric_for_best_model
    if metric is not None and (request.evaluates or training.load_best_model_at_end):
        reported = [*script.metrics, "loss", *(_ON_POLICY_VALUES if training.eval_on_policy else ())]
        if metric.removeprefix("eval_") not in reported:
            hint = " (name it in `metrics`)" if metric.removeprefix("eval_") in TEXT_METRICS else ""
            choices = suggest_choices(metric, [f"eval_{name}" for name in reported])
            raise ConfigError(f"metric_for_best_model: {metric!r} is not reported{hint}; {choices}")
    if script.early_stopping_patience is not None:
        if not request.evaluates:
            raise ConfigError("early_stopping_patience needs evaluations: set `eval_strategy: steps`")
        if not training.load_best_model_at_end:
            raise ConfigError(
                "early_stopping_patience compares evaluations by `metric_for_best_model`: set it and "
                "`load_best_model_at_end: true`"
            )


def _check_folders(training: GKDConfig) -> None:
    """Raise ConfigError where there is no checkpoint to resume from, or where no folder can be made."""
    folder = Path(training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {str(folder)!r} is a file; give a folder, or a new name")
    value: Any = {"true": True, "false": None}.get(
        str(training.resume_from_checkpoint).lower(), training.resume_from_checkpoint
    )
    if value is True and not (folder.is_dir() and get_last_checkpoint(str(folder))):
        raise ConfigError(f"resume_from_checkpoint: there is no checkpoint in {str(folder)!r}")
    if isinstance(value, str) and not Path(value).is_dir():
        raise ConfigError(f"resume_from_checkpoint: there is no folder {value!r}{suggest_path(value)}")
    training.resume_from_checkpoint = value
