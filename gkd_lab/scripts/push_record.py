"""Push a finished cell to the hub: the exported student, its tokenizer, and a card made of its record."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from pydantic import ValidationError

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, DataSpec, SftModel
from gkd_lab.config.cell import Evaluation, LmEvalEvaluation, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.scripts.hub import check_login, explain_hub_errors
from gkd_lab.scripts.model_card import (
    INTERVAL_NOTE,
    CardFacts,
    CardSource,
    ScoreLine,
    build_card,
    describe_loss,
    describe_normalization,
    describe_text_source,
    describe_versions,
    hide_places,
)
from gkd_lab.store import Record
from gkd_lab.store.files import read_json

_SOURCES = ("data", "teacher", "start")
"""Parts of a record's provenance that a card repeats: revisions, seeds and hashes of weights."""


def push_record(record: Record, repo: str | None, *, private: bool) -> str:
    """Upload a finished cell's student, tokenizer and card to the hub; return the model's address.

    repo: OWNER/NAME; None: a model of the user's, named by task and fingerprint. Raises ConfigError for a
    record that is no finished cell, without a login, and for a name that the hub refuses.
    """
    training = load_finished_training(record)
    owner = check_login()
    name = repo or f"{owner}/gkd-{training.task}-{training.fingerprint}"
    card = build_card(describe_record(record, training, name))
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        student = _prepare_student(record, training, Path(folder) / "student")
        readme = Path(folder) / "README.md"
        card.save(readme)
        files = [*sorted(_list_student_files(student)), (readme.name, readme)]
        with explain_hub_errors(f"the push to {name!r}"):
            model_id = api.create_repo(name, private=private, exist_ok=True).repo_id
            info = api.create_commit(
                model_id,
                [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files],
                commit_message=f"Student of cell {training.fingerprint}, tokenizer and card",
            )
    return str(info.repo_url)


def _prepare_student(record: Record, training: Training, folder: Path) -> Path:
    """Return the folder to upload: the checkpoint, or with LoRA what is written into `folder` now.

    An adapter whose base is a checkpoint of the hub names it; on any other base it is merged.
    """
    if training.lora is None:
        return record.checkpoint
    from gkd_lab.runner.progress import silence_libraries
    from gkd_lab.runner.student_files import export_record  # loads torch

    silence_libraries()
    export_record(record, folder, merged=not training.start.is_hub_checkpoint)
    return folder


def _list_student_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (path in the model, file) of an exported student and tokenizer; a card of theirs is left out."""
    for file in folder.rglob("*"):
        path = file.relative_to(folder).as_posix()
        if file.is_file() and not path.startswith(".") and path != "README.md":
            yield path, file


def load_finished_training(record: Record) -> Training:
    """Return the training of a cell's record. ConfigError: a teacher or SFT student, or not finished."""
    spec = read_json(record.folder / "spec.json") or {}
    role = spec.get("role", "cell")
    if role != "cell":
        raise ConfigError(f"{record.folder} is a {role}, not a cell: only distilled students are pushed")
    state = record.read_state()
    files = (record.checkpoint / name for name in ("config.json", "adapter_config.json"))
    if state != "done" or not any(file.is_file() for file in files):
        reason = f"its training is {state}" if state != "done" else "it has no checkpoint"
        raise ConfigError(
            f"{record.folder}: {reason}; `gkd-lab run` its experiment (with --retry-failed after a failure), "
            "then push again"
        )
    try:
        return Training.model_validate(spec.get("spec"))
    except ValidationError as error:
        raise ConfigError(
            f"{record.folder}: this version cannot read its spec.json; push it with the gkd-lab that made it"
        ) from error


# ---- card ----


def describe_record(record: Record, training: Training, name: str) -> CardFacts:
    """Return the facts of a cell's card: its specification, its stored scores and its provenance."""
    start, provenance = training.start, record.read_provenance()
    sources = hide_places({name: provenance[name] for name in _SOURCES if name in provenance})
    scores = sorted(_read_scores(record), key=lambda score: (score.evaluation, score.metric))
    return CardFacts(
        name=name,
        student=_describe_model(start),
        teacher=_describe_model(training.teacher),
        objective=[
            describe_text_source(
                training.source.lmbda, training.source.temperature, _describe_other_text(training)
            ),
            describe_loss([term.model_dump(mode="json") for term in training.objectives]),
            describe_normalization(training.loss_normalization),
        ],
        data=[_describe_data(training)],
        dataset=_describe_dataset(training.data),
        dataset_config=training.data.config,
        scores=scores,
        score_note=INTERVAL_NOTE if any(score.low is not None for score in scores) else "",
        settings=hide_places(_list_settings(training)),
        versions=describe_versions(
            provenance, cell=training.fingerprint, seed=training.seed, data_seed=training.data.seed, **sources
        ),
        is_encoder_decoder=start.family == "encoder-decoder",
        is_adapter=training.lora is not None and start.is_hub_checkpoint,
        auto_class=_choose_auto_class(start),
    )


def _choose_auto_class(model: SftModel) -> str | None:
    """Return the class of transformers that loads a classifier; None for a language model."""
    if model.family not in CLASSIFIER_FAMILIES:
        return None
    kind = "Token" if model.family == "token-classification" else "Sequence"
    return f"AutoModelFor{kind}Classification"


def _describe_model(model: SftModel) -> CardSource:
    """Return a reference model by its hub name, its folder, or the sizes of one made from scratch."""
    spec = model.model
    fine_tuned = "" if model.sft is None else f", fine-tuned on the task for {model.sft.steps} steps"
    if spec.architecture is not None:
        sizes = spec.architecture
        kind = f"a {model.family} model of {sizes.layers} layers of width {sizes.width}"
        return CardSource(f"{kind}, made from scratch", note=fine_tuned)
    if spec.served is not None:
        return CardSource(f"{spec.served}, behind a server")
    if spec.path is not None or spec.pretrained is None:
        return CardSource(Path(spec.path or spec.name).name, note=fine_tuned)
    return CardSource(spec.pretrained, is_on_hub=True, revision=spec.revision, note=fine_tuned)


def _describe_other_text(training: Training) -> str:
    """Return in words the text of steps whose text the student does not write."""
    if training.source.text is not None:
        return "text that the teacher wrote for the prompts"
    if training.source.corrupted is not None:
        return f"the completions of the data with {training.source.corrupted.share:.0%} random tokens"
    return "the completions of the data"


def _describe_dataset(data: DataSpec) -> CardSource:
    """Return the name of the data: that of the hub, the last part of its folder, or its generator."""
    if data.kind == "hub":
        return CardSource(str(data.name), is_on_hub=True, revision=data.revision, kind="datasets")
    return CardSource(Path(data.path).name if data.path else data.name or "made by gkd_lab")


def _describe_data(training: Training) -> str:
    """Return a sentence on the task and its rows."""
    rows = training.num_rows or "all"
    kinds = {"hub": "", "folder": " (a local folder)", "made": " (made by a program)"}
    source = _describe_dataset(training.data)
    return (
        f"Task: {training.task}. Rows: {source.format_link()}{kinds.get(training.data.kind, '')}, {rows} to "
        f"train on, {training.steps} steps of {training.batch_size} sequences."
    )


def _list_settings(training: Training) -> Mapping[str, Any]:
    """Return the settings of a cell that a reader asks for first."""
    return {
        "steps": training.steps,
        "batch_size": training.batch_size,
        "optimizer": training.optimizer.model_dump(mode="json"),
        "lmbda": training.source.lmbda,
        "objectives": [
            term.model_dump(mode="json", exclude_none=True, exclude_defaults=True) | {"type": term.type}
            for term in training.objectives
        ],
        "loss_normalization": training.loss_normalization,
        "max_input_tokens": training.max_input_tokens,
        "max_output_tokens": training.max_output_tokens,
        "precision": training.precision + (", TF32" if training.tf32 else ""),
    }


def _read_scores(record: Record) -> Iterator[ScoreLine]:
    """Yield the scores of the finished evaluations of the record's last checkpoint."""
    for path in record.folder.glob("evaluations/*/spec.json"):
        spec = (read_json(path) or {}).get("spec") or {}
        evaluation: Evaluation | LmEvalEvaluation = (
            LmEvalEvaluation if "lm_eval" in spec else Evaluation
        ).model_validate(spec)
        is_best = isinstance(evaluation, Evaluation) and evaluation.checkpoint == "best"
        part = record.get_evaluation(evaluation)
        if is_best or part.read_state() != "done":
            continue
        split = evaluation.split if isinstance(evaluation, Evaluation) else "test"
        for metric, score in part.read_scores().items():
            if score.get("value") is not None and ("n" in score or isinstance(evaluation, LmEvalEvaluation)):
                yield ScoreLine.from_score(evaluation.name, split, metric, score)
