"""Checks of a grid's models before any is loaded: their files, and whether a pair goes together.

Models are read where they are on this machine: in a folder, or as far as the local hub cache has them.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from operator import itemgetter
from pathlib import Path

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, SftModel
from gkd_lab.config.cell import Cell, Evaluation
from gkd_lab.config.cell_checks import OTHER_TOKENIZER_REMEDY, list_compared_teachers
from gkd_lab.config.checkpoint_files import CheckpointFiles
from gkd_lab.config.hub_cache import find_cached_snapshot
from gkd_lab.config.tokenizer_files import find_vocabulary_difference


class _ModelFolders:
    """Local models of some cells by path: each folder is read once, and each pair compared once."""

    def __init__(self) -> None:
        self._files: dict[str, CheckpointFiles] = {}
        self.compare_vocabularies = cache(_compare_vocabularies)

    def get_files(self, model: SftModel) -> CheckpointFiles:
        """Return the files of a model that `has_files`."""
        place = _get_place(model)
        if place not in self._files:
            spec = model.model
            snapshot = None if spec.path else find_cached_snapshot("model", place, spec.revision)
            self._files[place] = CheckpointFiles(snapshot or Path(place), is_partial=snapshot is not None)
        return self._files[place]

    def has_files(self, model: SftModel) -> bool:
        """Return whether a model is in a folder, or at least in part in the local hub cache."""
        return model.model.path is not None or self.get_files(model).is_partial


def _get_place(model: SftModel) -> str:
    """Return the folder or the hub name of a loaded model; "" for one that is made."""
    return model.model.path or model.model.pretrained or ""


def list_model_faults(cells: Iterable[Cell]) -> list[str]:
    """Return a sentence for each fault of the cells' models that this machine has, each once.

    Files that are missing or damaged, families that do not go together or are not the task's, tokenizers that
    differ where a loss compares tokens, and texts longer than a model has positions for.
    """
    cells, folders = list(cells), _ModelFolders()
    checkpoints = dict.fromkeys(
        folders.get_files(model) for cell in cells for _, model in _list_models(cell, folders)
    )
    faults = dict.fromkeys(fault for files in checkpoints for fault in files.list_faults())
    for cell in cells:
        for check in (_list_family_faults, _list_tokenizer_faults, _list_length_faults):
            faults.update(dict.fromkeys(check(cell, folders)))
    return list(faults)


def list_unchecked_models(cells: Iterable[Cell]) -> list[str]:
    """Return the hub names of the cells' models that the local hub cache has nothing of, each once."""
    folders = _ModelFolders()
    models = [model for cell in cells for _, model in _list_loaded_models(cell)]
    return list(dict.fromkeys(_get_place(model) for model in models if not folders.has_files(model)))


def _list_models(cell: Cell, folders: _ModelFolders) -> list[tuple[str, SftModel]]:
    """Return (role, model) of the teachers and the SFT student whose files this machine has."""
    return [(role, model) for role, model in _list_loaded_models(cell) if folders.has_files(model)]


def _list_loaded_models(cell: Cell) -> list[tuple[str, SftModel]]:
    """Return (role, model) of the teachers and the SFT student that are loaded, not made nor served."""
    training = cell.training
    models = [("teacher", training.teacher), *(("teacher", model) for model in training.teachers)]
    models.append(("student", training.start))
    return [(role, model) for role, model in models if _get_place(model) and not model.model.server]


def _list_family_faults(cell: Cell, folders: _ModelFolders) -> Iterator[str]:
    """Yield a sentence for each model whose family is not that of the cell or of its partner."""
    expected = cell.training.start.family
    if expected in CLASSIFIER_FAMILIES:
        return
    models = [
        (f"{role} {_get_place(model)}", family)
        for role, model in _list_models(cell, folders)
        if (family := folders.get_files(model).family) is not None
    ]
    if len({family for _, family in models}) > 1:
        pair = ", ".join(f"{name} is {family}" for name, family in models)
        yield f"{pair}: they do not go together; choose a pair of one kind"
        return
    for name, family in models:
        if family != expected:
            yield (
                f"{name} is {family}, and the models of {cell.task} are {expected} here: "
                f"set `family: {family}`"
            )


def _list_tokenizer_faults(cell: Cell, folders: _ModelFolders) -> Iterator[str]:
    """Yield a sentence for each teacher whose vocabulary differs where a loss compares token by token."""
    student = cell.training.start
    for term in cell.training.objectives:
        for teacher in list_compared_teachers(term, cell.training):
            models = [teacher, student]
            if all(_get_place(m) and not m.model.server and folders.has_files(m) for m in models):
                reason = folders.compare_vocabularies(
                    folders.get_files(teacher),
                    folders.get_files(student),
                    allows_appended=teacher is not cell.training.teacher,
                )
                if reason is not None:
                    yield (
                        f"teacher {_get_place(teacher)} and student {_get_place(student)} have different "
                        f"tokenizers: {reason}; {OTHER_TOKENIZER_REMEDY}"
                    )
                else:
                    yield from _list_size_faults(models, folders)


def _list_size_faults(models: Sequence[SftModel], folders: _ModelFolders) -> Iterator[str]:
    """Yield a sentence for each model whose head has no row for a token of the last, the student."""
    tokenizer = folders.get_files(models[-1]).tokenizer
    if tokenizer is None or not tokenizer.ids:
        return
    token, last_id = max(tokenizer.ids.items(), key=itemgetter(1))
    for role, model in zip(("teacher", "student"), models, strict=True):
        size = folders.get_files(model).config.get("vocab_size")
        if isinstance(size, int) and last_id >= size:
            yield (
                f"{role} {_get_place(model)} has {size} vocabulary entries, too few for the token {token!r} "
                f"of the student's tokenizer, which has id {last_id}: resize its embeddings, or remove added "
                "tokens"
            )


def _compare_vocabularies(
    teacher: CheckpointFiles, student: CheckpointFiles, *, allows_appended: bool
) -> str | None:
    """Return how two folders' vocabularies differ; None if they do not, or one is unknown."""
    if teacher == student or teacher.tokenizer is None or student.tokenizer is None:
        return None
    return find_vocabulary_difference(teacher.tokenizer, student.tokenizer, allows_appended=allows_appended)


def _list_length_faults(cell: Cell, folders: _ModelFolders) -> Iterator[str]:
    """Yield a sentence for each model that has fewer positions than the texts have tokens."""
    training = cell.training
    outputs = [training.max_output_tokens]
    outputs += [e.max_output_tokens for e in cell.evaluations if isinstance(e, Evaluation)]
    inputs, output = training.max_input_tokens, max(outputs)
    joined = training.start.family == "decoder-only"
    length = inputs + output if joined else max(inputs, output)
    for role, model in _list_models(cell, folders):
        limit = folders.get_files(model).max_positions
        if limit is not None and length > limit:
            parts = f"max_input_tokens {inputs} {'and' if joined else 'or'} max_output_tokens {output}"
            yield f"{role} {_get_place(model)} has {limit} positions, too few for {parts}: lower them"
