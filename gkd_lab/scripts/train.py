"""One distillation run of a user's own pair and data: load, train, score, write the card, push.

Everything that can be refused without the weights is refused before they are loaded.
"""

import os
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoTokenizer, EarlyStoppingCallback
from transformers.utils import find_adapter_config_file, is_peft_available
from trl import get_peft_config, get_quantization_config

from gkd_lab.config.errors import ConfigError
from gkd_lab.config.library_errors import explain_model_error
from gkd_lab.encoding.row_encoder import RowEncoder
from gkd_lab.metrics.scored_predictions import score_predictions
from gkd_lab.models.classifiers import get_classifier_auto_class
from gkd_lab.scripts.hub import check_login, explain_hub_errors
from gkd_lab.scripts.local_paths import looks_like_path, suggest_path
from gkd_lab.scripts.model_card import ScoreLine
from gkd_lab.scripts.scored_trainer import ScoredTrainer
from gkd_lab.scripts.train_card import describe_run, write_card
from gkd_lab.scripts.train_options import TrainRequest
from gkd_lab.scripts.user_data import RunData, load_run_data
from gkd_lab.store.files import write_json, write_json_lines
from gkd_lab.training.pack_trainer import AllCellsFailed
from gkd_lab.training.setup import resolve_tokenizer

SCORES_FILE = "test_scores.json"
PREDICTIONS_FILE = "_test_predictions.jsonl"
ERROR_FILE = "_error.txt"
"""Rows of the data and paths of the machine: the Trainer pushes no file whose name begins so."""


class TrainingFailed(RuntimeError):
    """A training that began and could not go on; the message names the log."""


def run_training(request: TrainRequest) -> Path:
    """Train, score and save a student as requested; return its folder. The main process writes and prints.

    Raises:
        ConfigError: for what the user can change, before training where it can be known.
        TrainingFailed: for a training that stopped with an error.
    """
    training = request.training
    is_main, folder = training.process_index == 0, Path(training.output_dir)
    if training.hub_token:  # A token in the arguments would be stored with them, in training_args.bin.
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    if training.push_to_hub and is_main:
        check_login()
    data = load_run_data(request)
    is_encoder_decoder = _check_models(request)
    tokenizer = _load_tokenizer(request, data, is_encoder_decoder=is_encoder_decoder)
    if training.push_to_hub and is_main:
        _create_hub_model(training)
    trainer = _create_trainer(request, data, tokenizer, is_encoder_decoder=is_encoder_decoder)
    if is_main:
        facts = describe_run(request, data, is_encoder_decoder=is_encoder_decoder)
        trainer.write_card = lambda: write_card(facts, folder, ())
    try:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    except (ValueError, AllCellsFailed, RuntimeError, KeyError) as error:
        raise _report_failure(error, folder, is_main=is_main) from error
    trainer.save_model(str(folder), _internal_call=True)
    scores = _score_test_rows(trainer, request, data)
    if is_main:
        trainer.write_card = lambda: write_card(facts, folder, scores)
        trainer.write_card()
        _print_results(folder, scores)
    if training.push_to_hub:
        with explain_hub_errors("the push"):
            trainer.push_to_hub(commit_message="Student, tokenizer and card")
        if is_main:
            print(f"pushed: {trainer.hub_model_id}")
    trainer.end()
    return folder


def _create_hub_model(training: Any) -> None:
    """Create the model on the hub unless it exists, so that a name it refuses is refused before training."""
    name = training.hub_model_id or Path(training.output_dir).absolute().name
    with explain_hub_errors(f"hub_model_id: the push to {name!r}"):
        HfApi().create_repo(name, private=training.hub_private_repo, exist_ok=True)


def _report_failure(error: Exception, folder: Path, *, is_main: bool) -> TrainingFailed:
    """Write the traceback into the run's folder and return (not raise) the error with its place."""
    path = folder / ERROR_FILE
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)))
    return TrainingFailed(f"training stopped: {' '.join(str(error).split())} (see {path})")


# ---- before any weights are loaded ----


def _check_models(request: TrainRequest) -> bool:
    """Return whether student and teacher are encoder-decoders, by their configurations alone.

    Raises ConfigError where there is no such model, and for a classifier or two kinds of models.
    """
    training, model = request.training, request.model
    sources = (
        ("model_name_or_path", model.model_name_or_path, model.model_revision),
        (
            "teacher_model_name_or_path",
            training.teacher_model_name_or_path,
            training.teacher_model_revision,
        ),
    )
    student, teacher = (
        _load_config(option, str(name), revision, training.trust_remote_code)
        for option, name, revision in sources
    )
    if get_classifier_auto_class(student) is not None:
        raise ConfigError(
            f"model_name_or_path: {model.model_name_or_path!r} is a classifier, and `gkd-lab train` distils "
            "language models: give it to gkd_lab.GKDTrainer in a script"
        )
    if student.is_encoder_decoder != teacher.is_encoder_decoder:
        names = {True: "encoder-decoder", False: "decoder-only"}
        raise ConfigError(
            f"the student is {names[student.is_encoder_decoder]} and the teacher "
            f"{names[teacher.is_encoder_decoder]}: choose a teacher of the student's kind"
        )
    return bool(student.is_encoder_decoder)


def _load_config(option: str, name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return the configuration of a model, or of an adapter's base. ConfigError if there is no such model."""
    if looks_like_path(name) and not Path(name).expanduser().is_dir():
        raise ConfigError(f"{option}: there is no folder {name!r}{suggest_path(name)}")
    try:
        if is_peft_available() and find_adapter_config_file(name, revision=revision) is not None:
            from peft import PeftConfig

            name = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path or name
            revision = None
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = explain_model_error(error, name)
        hint = "" if Path(name).is_dir() else suggest_path(name)
        raise ConfigError(f"{option}: {name!r} cannot be loaded{hint}: {reason}") from error


def _load_tokenizer(request: TrainRequest, data: RunData, *, is_encoder_decoder: bool) -> Any:
    """Return the student's tokenizer, after encoding the first row of each split. Raises ConfigError."""
    training, name = request.training, str(request.model.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=request.model.model_revision, trust_remote_code=training.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = explain_model_error(error, name)
        raise ConfigError(
            f"model_name_or_path: the tokenizer of {name!r} cannot be loaded: {reason}"
        ) from error
    try:
        tokenizer = resolve_tokenizer(tokenizer, None, None, training)
    except ValueError as error:
        raise ConfigError(f"model_name_or_path: {' '.join(str(error).split())}") from error
    encode_row = RowEncoder(
        tokenizer,
        is_encoder_decoder=is_encoder_decoder,
        max_length=training.max_length,
        max_new_tokens=training.max_new_tokens,
    )
    for _, split, rows in data.list_parts():
        row = next(iter(rows))
        try:
            with warnings.catch_warnings(action="ignore"):
                encode_row(row)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"the first row of the split {split!r}: {error}") from error
    return tokenizer


# ---- the trainer ----


def _create_trainer(
    request: TrainRequest, data: RunData, tokenizer: Any, *, is_encoder_decoder: bool
) -> ScoredTrainer:
    """Return the trainer with both models loaded. ConfigError for what does not fit together."""
    script, training, model = request.script, request.training, request.model
    training.model_init_kwargs = _build_init_kwargs(request, model.model_revision, training.model_init_kwargs)
    quantization = get_quantization_config(model)
    if quantization is not None:
        training.model_init_kwargs["quantization_config"] = quantization
    training.teacher_model_init_kwargs = _build_init_kwargs(
        request, training.teacher_model_revision or "main", training.teacher_model_init_kwargs
    )
    callbacks = []
    if script.early_stopping_patience is not None:
        callbacks.append(
            EarlyStoppingCallback(script.early_stopping_patience, script.early_stopping_threshold)
        )
    try:
        trainer = ScoredTrainer(
            evaluation=script.build_evaluation(training.max_new_tokens) if script.metrics else None,
            model=model.model_name_or_path,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=_build_peft_config(request, is_encoder_decoder=is_encoder_decoder),
        )
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    for use, split, rows in data.list_parts():
        if use != "train":
            trainer.prepare_scored_rows(rows, split)
    if script.ignore_bias_buffers:
        buffers = [name for name, tensor in trainer.model.named_buffers() if tensor.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = buffers
    return trainer


def _build_init_kwargs(request: TrainRequest, revision: str, overrides: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` as TRL's scripts make them; `overrides` win."""
    return {
        "revision": revision,
        "attn_implementation": request.model.attn_implementation,
        "dtype": request.model.dtype,
        **(overrides or {}),
    }


def _build_peft_config(request: TrainRequest, *, is_encoder_decoder: bool) -> Any:
    """Return the LoRA configuration of the options, or None. ConfigError without peft."""
    model = request.model
    if not model.use_peft:
        return None
    if not is_peft_available():
        raise ConfigError("use_peft needs the package peft: `pip install 'gkd-lab[peft]'`")
    if is_encoder_decoder and model.lora_task_type == "CAUSAL_LM":
        model.lora_task_type = "SEQ_2_SEQ_LM"
    target = model.lora_target_modules
    if isinstance(target, str) and target.isidentifier():
        # TRL makes a text of a list of one, which peft would take for a pattern of whole names.
        model.lora_target_modules = [target]
    return get_peft_config(model)


# ---- afterwards ----


def _score_test_rows(trainer: ScoredTrainer, request: TrainRequest, data: RunData) -> list[ScoreLine]:
    """Score the student on the test rows, store scores and predictions; return the scores, [] for none."""
    if data.test is None or trainer.evaluation is None:
        return []
    trainer.evaluate(data.test, metric_key_prefix="test")
    if not trainer.is_world_process_zero():
        return []
    scores, rows = score_predictions(trainer.evaluation.metrics, trainer.predictions)
    folder, split = Path(request.training.output_dir), data.names["test"]
    header = {
        "split": split,
        "examples": len(rows),
        "decoding": trainer.evaluation.name,
        "max_new_tokens": trainer.evaluation.max_output_tokens,
        "interval": "95 %, bootstrap over examples",
    }
    write_json(folder / SCORES_FILE, {**header, "scores": scores})
    write_json_lines(folder / PREDICTIONS_FILE, rows)
    return [
        ScoreLine.from_score(trainer.evaluation.name, split, name, scores[name])
        for name in trainer.evaluation.metrics
    ]


def _print_results(folder: Path, scores: Sequence[ScoreLine]) -> None:
    """Print where the student is, and its test scores with their intervals."""
    print(f"student: {folder}")
    for score in scores:
        interval = "" if score.low is None else f" [{score.low:.2f}, {score.high:.2f}]"
        print(f"{score.split} {score.metric}: {score.value:.2f}{interval}, {score.n_examples} examples")
