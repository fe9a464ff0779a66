"""Checks of a grid's local models before any is loaded: their files, and whether a pair goes together."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from gkd_lab.config.artifact_specs import CLASSIFIER_FAMILIES, SftModel
from gkd_lab.config.cell import Cell, Evaluation
from gkd_lab.config.cell_checks import OTHER_TOKENIZER_REMEDY, list_compared_teachers
from gkd_lab.config.checkpoint_files import CheckpointFiles, find_vocabulary_difference

_open_files = cache(CheckpointFiles)


def list_model_faults(cells: Iterable[Cell]) -> list[str]:
    """Return a sentence for each fault of the cells' models that are local folders, each once.

    Files that are missing or damaged, families that do not go together or are not the task's, tokenizers that
    differ where a loss compares tokens, and texts longer than a model has positions for.
    """
    for cached in (_open_files, _list_file_faults, _compare_vocabularies):
        cached.cache_clear()  # the user may have mended a folder since
    faults: dict[str, None] = {}
    cells = list(cells)
    for cell in cells:
        for _, model in _list_models(cell):
            faults.update(dict.fromkeys(_list_file_faults(model)))
    for cell in cells:
        for check in (_list_family_faults, _list_tokenizer_faults, _list_length_faults):
            faults.update(dict.fromkeys(check(cell)))
    return list(faults)


def _list_models(cell: Cell) -> list[tuple[str, SftModel]]:
    """Return (role, model) of the teachers and the SFT student that are local folders."""
    training = cell.training
    models = [("teacher", training.teacher), *(("teacher", model) for model in training.teachers)]
    models.append(("student", training.start))
    return [(role, model) for role, model in models if model.model.path and not model.model.server]


def _get_files(model: SftModel) -> CheckpointFiles:
    """Return the files of a local model."""
    return _open_files(Path(model.model.path or ""))


@cache
def _list_file_faults(model: SftModel) -> list[str]:
    """Return the faults of a model's files."""
    return list(_get_files(model).list_faults())


def _list_family_faults(cell: Cell) -> Iterator[str]:
    """Yield a sentence for each model whose family is not that of the cell or of its partner."""
    expected = cell.training.start.family
    if expected in CLASSIFIER_FAMILIES:
        return
    families = [(role, model, _get_files(model).family) for role, model in _list_models(cell)]
    known = [(role, model, family) for role, model, family in families if family is not None]
    if len({family for *_, family in known}) > 1:
        pair = ", ".join(f"{role} {model.model.path} is {family}" for role, model, family in known)
        yield f"{pair}: they do not go together; choose a pair of one kind"
        return
    for role, model, family in known:
        if family != expected:
            yield (
                f"{role} {model.model.path} is {family}, and the models of {cell.task} are {expected} here: "
                f"set `family: {family}`"
            )


def _list_tokenizer_faults(cell: Cell) -> Iterator[str]:
    """Yield a sentence for each teacher whose vocabulary differs where a loss compares token by token."""
    student = cell.training.start
    for term in cell.training.objectives:
        for teacher in list_compared_teachers(term, cell.training):
            if teacher.model.path and student.model.path and not teacher.model.server:
                reason = _compare_vocabularies(_get_files(teacher), _get_files(student))
                if reason is not None:
                    yield (
                        f"teacher {teacher.model.path} and student {student.model.path} have different "
                        f"tokenizers: {reason}; {OTHER_TOKENIZER_REMEDY}"
                    )


@cache
def _compare_vocabularies(teacher: CheckpointFiles, student: CheckpointFiles) -> str | None:
    """Return how two folders' vocabularies differ; None if they do not, or one is unknown."""
    vocabularies = teacher.read_vocabulary(), student.read_vocabulary()
    if teacher == student or vocabularies[0] is None or vocabularies[1] is None:
        return None
    return find_vocabulary_difference(vocabularies[0], vocabularies[1])


def _list_length_faults(cell: Cell) -> Iterator[str]:
    """Yield a sentence for each model that has fewer positions than the texts have tokens."""
    training = cell.training
    outputs = [training.max_output_tokens]
    outputs += [e.max_output_tokens for e in cell.evaluations if isinstance(e, Evaluation)]
    inputs, output = training.max_input_tokens, max(outputs)
    joined = training.start.family == "decoder-only"
    length = inputs + output if joined else max(inputs, output)
    for role, model in _list_models(cell):
        limit = _get_files(model).max_positions
        if limit is not None and length > limit:
            parts = f"max_input_tokens {inputs} {'and' if joined else 'or'} max_output_tokens {output}"
            yield f"{role} {model.model.path} has {limit} positions, too few for {parts}: lower them"
