"""Teachers that are not at work in the training: scores that were kept once, and a model behind a server."""

from collections.abc import Iterable
from typing import Protocol
from urllib.parse import urlsplit

from gkd_lab.config.artifact_specs import ModelSpec, TeacherScores
from gkd_lab.config.cell import Source, Training
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.loss_terms import CrossEntropyConfig, ResolvedDivergence, ResolvedReward, ResolvedTerm
from gkd_lab.config.settings import ModelSettings

_DISTRIBUTION_TERMS = (ResolvedDivergence, CrossEntropyConfig, ResolvedReward)
_TEACHERLESS_TERMS = (CrossEntropyConfig, ResolvedReward)
SERVER_FIELDS = ("model", "top_k", "tokenizer", "patience")
"""Fields of a model that mean something only beside `server`."""
_SERVED_MODEL_FIELDS = {"server", *SERVER_FIELDS}


class ModelFinder(Protocol):
    def __call__(self, name: str, /) -> tuple[str | None, str | None, str | None]: ...


def parse_teacher_scores(stated: str | TeacherScores | None) -> TeacherScores | None:
    """None: the teacher itself."""
    if isinstance(stated, TeacherScores):
        return stated
    return TeacherScores() if stated == "full" else None


def resolve_teacher_scores(
    stated: TeacherScores | None, objectives: Iterable[ResolvedTerm], source: Source
) -> TeacherScores | None:
    """None also where no divergence reads a teacher. Raises SpecError for what kept scores cannot give."""
    listed = tuple(objectives)
    if stated is None or all(isinstance(one, _TEACHERLESS_TERMS) for one in listed):
        return None
    if source.lmbda > 0:
        raise ConfigError(
            f"lmbda {source.lmbda:g} lets the student write, and teacher_scores are of text that was there "
            "before: set lmbda to 0, or leave teacher_scores out (`live`)"
        )
    _check_only_distributions(listed, "teacher_scores hold", "leave teacher_scores out (`live`)")
    if not any(isinstance(one, ResolvedDivergence) and 0 in one.teachers for one in listed):
        raise ConfigError(
            "teacher_scores: they are of the run's own teacher, which no divergence reads here: leave "
            "teacher_scores out (`live`)"
        )
    return stated


def _check_only_distributions(objectives: Iterable[ResolvedTerm], scores_source: str, remedy: str) -> None:
    for one in objectives:
        if not isinstance(one, _DISTRIBUTION_TERMS):
            raise ConfigError(
                f"objectives: {one.type} reads more of the teacher than its distributions, which are all "
                f"that {scores_source}: {remedy}, or drop the objective"
            )


def check_cached_teacher_placement(training: Training) -> None:
    """Raises SpecError for weights that are to be held in some way while kept scores stand for them."""
    if training.teacher_scores is not None and any(training.get_teacher_placement(0)):
        name = "dtype" if training.get_teacher_placement(0)[0] else "parked"
        raise ConfigError(
            f"teacher.{name}: the teacher is not there while cells train on scores that it gave before: "
            f"leave {name} out, or teacher_scores (`live`)"
        )


def resolve_served_teacher(role: str, model: ModelSettings, find_model: ModelFinder) -> ModelSpec:
    """A teacher behind a server, known by its name there and by how much of its distributions is read.

    find: name or folder of a tokenizer -> (hub name or None, folder or None, revision).
    """
    if role != "teacher":
        raise ConfigError("student: a model behind a server cannot be trained: give one that can be loaded")
    others = model.model_dump(exclude_none=True).keys() - _SERVED_MODEL_FIELDS
    if others:
        raise ConfigError(
            f"teacher.{min(others)}: a teacher behind a server is as it is served; leave it out, or `server`"
        )
    if model.model is None or model.top_k is None:
        missing = "model" if model.model is None else "top_k"
        raise ConfigError(
            f"teacher.{missing}: missing; expected {{server: {model.server}, model: NAME, top_k: 20}}, with "
            "the name that the server has for it and the tokens to read of each distribution"
        )
    hub, path, revision = (None, None, None) if model.tokenizer is None else find_model(model.tokenizer)
    return ModelSpec(
        name=model.model,
        pretrained=hub,
        path=path,
        revision=revision,
        server=_check_server_address(model.server or ""),
        served=model.model,
        top_k=model.top_k,
        patience=model.patience,
    )


def _check_server_address(server: str) -> str:
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"teacher.server: {server!r} is no address; expected one as http://127.0.0.1:8000/v1"
        )
    try:
        _ = parts.port
    except ValueError:
        # Not repeated: what stands there may be a password.
        raise ConfigError("teacher.server: the port of an address is a number from 0 to 65535") from None
    if parts.username or parts.password or parts.query:
        place = parts.hostname + (f":{parts.port}" if parts.port else "") + parts.path
        raise ConfigError(
            f"teacher.server: an address is written into records, so it must not hold a key: give "
            f"{parts.scheme}://{place}, and the key in the environment variable GKD_LAB_TEACHER_KEY"
        )
    return server


def check_served_teacher(training: Training) -> None:
    """Raises SpecError for what a teacher behind a server cannot do."""
    if any(model.model.served for model in training.teachers):
        raise ConfigError("teachers: only the first one, `teacher`, can be behind a server")
    if training.teacher.model.served is None:
        return
    if training.start.family == "encoder-decoder":
        raise ConfigError(
            f"teacher.server: {training.task} has encoder-decoder models, and prompt log-probabilities are "
            "of one text: choose a task with decoder-only models, or keep the scores of a teacher that is "
            "loaded (`teacher_scores`)"
        )
    for name, stated in (("teacher_scores", training.teacher_scores), ("source.text", training.source.text)):
        if stated is not None:
            raise ConfigError(f"{name}: a teacher behind a server scores each step's rows; leave {name} out")
    _check_only_distributions(training.objectives, "a server gives", "load the teacher")
