"""Card of a run of `gkd-lab train`: its facts, from the request, the rows and the models' files.

Facts are collected before training, because its folder may hold what they are read from.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from trl.scripts.utils import DatasetConfig

from gkd_lab.config.content_hashes import compute_sha256
from gkd_lab.scripts.model_card import (
    INTERVAL_NOTE,
    CardFacts,
    CardSource,
    ScoreLine,
    build_card,
    describe_loss,
    describe_normalization,
    describe_source,
    describe_text_source,
    describe_versions,
    hide_places,
    shorten_path,
)
from gkd_lab.scripts.train_options import TrainRequest
from gkd_lab.scripts.user_data import RunData
from gkd_lab.store.provenance import collect_provenance


def write_card(facts: CardFacts, folder: Path, scores: Sequence[ScoreLine]) -> None:
    """Write README.md into the run's folder, with the scores that are known by then."""
    folder.mkdir(parents=True, exist_ok=True)
    note = facts.score_note if scores else ""
    build_card(replace(facts, scores=scores, score_note=note)).save(folder / "README.md")


def describe_run(request: TrainRequest, data: RunData, *, is_encoder_decoder: bool) -> CardFacts:
    """Return the facts of the run's card, without scores. Its models have been loaded before."""
    script, training, model = request.script, request.training, request.model
    student, teacher = str(model.model_name_or_path), str(training.teacher_model_name_or_path)
    student_commit = _find_commit(student, model.model_revision)
    teacher_commit = _find_commit(teacher, training.teacher_model_revision)
    mixture = request.mixture.datasets
    sources = [_describe_part(part) for part in mixture] or [
        describe_source(str(script.dataset_name), kind="datasets")
    ]
    other_text = (
        "text that the teacher wrote for the prompts" if training.seq_kd else "the completions of the data"
    )
    model_id = training.hub_model_id or Path(training.output_dir).absolute().name
    return CardFacts(
        name=model_id,
        student=describe_source(student, student_commit),
        teacher=describe_source(teacher, teacher_commit),
        objective=[
            describe_text_source(
                training.lmbda, training.temperature if training.lmbda else None, other_text
            ),
            describe_loss(_list_terms(training)),
            describe_normalization(training.loss_normalization),
        ],
        data=_describe_data(request, data, [source.format_link() for source in sources]),
        dataset=sources[0],
        dataset_config=script.dataset_config,
        score_note=_describe_scores(script.metrics, training, data),
        settings=hide_places(_list_settings(request)),
        settings_title="Settings, as `gkd-lab train` takes them (others are TRL's defaults)",
        versions=describe_versions(
            collect_provenance(),
            seed=training.seed,
            processes=training.world_size,
            rows={use: f"sha256:{digest}" for use, digest in data.hash_rows().items()},
            weights={
                "student": _describe_weights(student, student_commit),
                "teacher": _describe_weights(teacher, teacher_commit),
            },
        ),
        is_encoder_decoder=is_encoder_decoder,
        is_adapter=model.use_peft,
    )


def _describe_part(part: DatasetConfig) -> CardSource:
    """Return a part of a mixture: a name of the hub, or the files that a reader of `datasets` reads."""
    if not part.data_files:
        return describe_source(part.path, kind="datasets")
    return CardSource(", ".join(shorten_path(name) for name in _flatten(part.data_files)))


def _flatten(files: Any) -> list[str]:
    """Return the names in `data_files`: one, a list, or those of each split."""
    if isinstance(files, Mapping):
        return [name for part in files.values() for name in _flatten(part)]
    return [str(files)] if isinstance(files, str) else [str(name) for name in files]


def _list_settings(request: TrainRequest) -> dict[str, Any]:
    """Return the user's settings, the parts of a mixture as a file has them."""
    parts = [
        {name: value for name, value in asdict(part).items() if value is not None}
        for part in request.mixture.datasets
    ]
    return {**request.settings, **({"datasets": parts} if parts else {})}


def _find_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model of the hub in the local cache; None for a folder."""
    for file in ("config.json", "adapter_config.json"):
        path = None if Path(name).is_dir() else try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def _describe_weights(name: str, commit: str | None) -> str:
    """Return what identifies a model's weights: the hub's commit, or the hash of a folder's weight files."""
    if commit is not None:
        return f"commit {commit}"
    total = hashlib.sha256()
    for file in sorted(Path(name).expanduser().glob("*.safetensors")):
        total.update(f"{file.name}\0{compute_sha256(file)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _list_terms(training: Any) -> list[dict[str, Any]]:
    """Return the terms of the loss, with the fields that they take from the arguments."""
    defaults = {
        "divergence": training.divergence,
        "beta": training.beta,
        "rescale": training.rescale_divergence,
        "teacher_temperature": training.teacher_temperature,
        "student_temperature": training.student_temperature,
    }
    objectives = training.objectives
    terms = json.loads(objectives) if isinstance(objectives, str) else objectives
    if not terms:
        return [defaults]
    return [
        {**defaults, **term} if term.get("type", "divergence") == "divergence" else dict(term)
        for term in terms
    ]


def _describe_data(request: TrainRequest, data: RunData, links: Sequence[str]) -> list[str]:
    """Return sentences on the data: its name, its splits and their numbers of rows."""
    config = f", configuration `{request.script.dataset_config}`" if request.script.dataset_config else ""
    words = {"train": "trained on", "evaluation": "evaluated during training", "test": "scored"}
    counts = []
    for use, split, rows in data.list_parts():
        count = f"{len(rows)} rows" if hasattr(rows, "__len__") else "a stream of rows"
        counts.append(f"{words[use]}: {count} of `{split}`")
    return [f"{' and '.join(links)}{config}; {'; '.join(counts)}."]


def _describe_scores(metrics: Sequence[str], training: Any, data: RunData) -> str:
    """Return the note on the scores: what their intervals cover, and whether the rows chose a model too."""
    if not metrics:
        return ""
    is_choice_on_test = training.load_best_model_at_end and (
        data.names.get("evaluation") == data.names.get("test")
    )
    warning = (
        " The same split chose the checkpoint, so these scores are too high by that choice; "
        "`dataset_eval_split` gives it rows of its own."
    )
    return INTERVAL_NOTE + (warning if is_choice_on_test else "")
