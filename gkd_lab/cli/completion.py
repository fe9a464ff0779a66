"""Completion in a shell: experiments, `--set` keys and values, cells. Commands come from the command table.

typer asks these functions and filters what they return by what was typed. Data and models are read for the
cells of `show --experiment EXP` alone, as fingerprints need their hashes.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

COMPLETION_VARIABLE = "_GKD_LAB_COMPLETE"
_TYPED_VARIABLE = "_GKD_LAB_TYPED"
"""Holds what bash has cut off the word that is completed, such as `beta=`."""
_MAX_FINGERPRINTS = 500


def join_bash_words(environment: MutableMapping[str, str]) -> None:
    """Undo, where bash asks for completions, its splitting of words at `=` and `:`; else do nothing.

    The words before the cursor are joined again. Of the word at the cursor bash replaces the part behind the
    last `=` alone: that part stays, and what precedes it is noted in `environment` for `--set`.
    """
    words = environment.get("COMP_WORDS", "").split("\n")
    current = environment.get("COMP_CWORD", "")
    if environment.get(COMPLETION_VARIABLE) != "complete_bash" or not current.isdigit() or len(words) < 2:
        return
    joined, typed, is_open = [words[0]], "", False
    for word in [*words, ""][1 : int(current) + 1]:
        is_separator = bool(word) and not word.strip("=:")
        typed = ""
        if is_separator:
            joined[-1] += word
            typed = joined[-1]
        elif is_open:
            typed = joined[-1]
            joined[-1] += word
        else:
            joined.append(word)
        is_open = is_separator
    if typed:
        incomplete = joined.pop().removeprefix(typed)
        option, equals, rest = typed.partition("=")
        if equals and option.startswith("-"):
            joined.append(option)
            typed = rest
        joined.append(incomplete)
    environment.update(
        {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(len(joined) - 1), _TYPED_VARIABLE: typed}
    )


def complete_experiments(incomplete: str) -> Iterator[str]:
    """Yield the names of experiments; of what looks like a path, the YAML files in its folder."""
    from gkd_lab import experiments

    folder, separator, _ = incomplete.rpartition(os.sep)
    if not separator:
        yield from experiments.list_experiment_files()
    paths = [
        *Path(folder or separator or ".").glob("*.yaml"),
        *Path(folder or separator or ".").glob("*.yml"),
    ]
    yield from (f"{folder}{separator}{path.name}" for path in sorted(paths))


def complete_cells(ctx: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield (fingerprint, name) of the records below the outputs folder; none for a path.

    After `--experiment EXP` they are the cells of EXP, run or not.
    """
    if os.sep in incomplete:
        return
    outputs = Path(ctx.params.get("outputs") or os.environ.get("GKD_LAB_OUTPUTS") or "outputs")
    experiment = ctx.params.get("experiment")
    names = _list_grid_cells(experiment, outputs) if experiment else _list_records(outputs)
    yield from islice(names, _MAX_FINGERPRINTS)


def _list_records(outputs: Path) -> Iterator[tuple[str, str]]:
    """Yield (fingerprint, folder) of the records below the outputs folder."""
    from gkd_lab.store.lookup import iterate_records

    for fingerprint, record in iterate_records(outputs):
        yield fingerprint, str(record.folder.relative_to(outputs))


def _list_grid_cells(name: str, outputs: Path) -> Iterator[tuple[str, str]]:
    """Yield (fingerprint, folder) of the cells of an experiment; none for a file that is wrong."""
    from gkd_lab import experiments
    from gkd_lab.config.errors import ConfigError

    os.environ["HF_HUB_OFFLINE"] = "1"  # a key that is pressed asks no network; this process only completes
    try:
        grid = experiments.load(name, outputs=outputs)
    except ConfigError:
        return
    yield from ((cell.fingerprint, cell.folder) for cell in grid.cells)


def complete_score_sources(incomplete: str) -> Iterator[str]:
    """Yield `paper`, the tables of the current folder, and the experiments: what `claims` judges."""
    yield "paper"
    yield from sorted(str(path) for path in Path().glob("*.parquet"))
    yield from complete_experiments(incomplete)


def complete_metrics(incomplete: str) -> Iterator[str]:
    """Yield the names of the metrics, after those that are typed already: `rouge2,`."""
    from gkd_lab.metrics import METRICS

    done, comma, _ = incomplete.rpartition(",")
    yield from (f"{done}{comma}{name}" for name in METRICS if name not in done.split(","))


def complete_overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the completions of `--set`: keys with `=`, then values, also after a comma.

    If one key is left, both `KEY=` and `KEY=VALUE` are returned, so that no shell ends the word at `=`.
    """
    from gkd_lab.config.errors import ConfigError

    typed = os.environ.get(_TYPED_VARIABLE, "")
    key, equals, values = (typed + incomplete).partition("=")
    # `--set` without its value ends the parsing, and what precedes it is left among the arguments.
    words = [word for word in ctx.args if not word.startswith("-")]
    experiment = ctx.params.get("name") or (words[0] if words else None)
    scale = ctx.params.get("scale")

    def list_values(name: str) -> list[str]:
        try:
            return list_override_values(name, experiment, scale)
        except (ConfigError, OSError):
            return list_override_values(name, None, None)

    if not equals:
        keys = [name for name in list_override_keys() if name.startswith(key)]
        if len(keys) != 1:
            return [f"{name}=" for name in keys]
        return [f"{keys[0]}=", *(f"{keys[0]}={value}" for value in list_values(keys[0]) or ["VALUE"])]
    done, comma, _ = values.rpartition(",")
    choices = [value for value in list_values(key) if value not in done.split(",")]
    return [f"{key}={done}{comma}{value}".removeprefix(typed) for value in choices]


def list_override_keys() -> list[str]:
    """Return the dotted names of all fields and axes that `--set` can replace."""
    from gkd_lab.config.experiment import AXIS_NAMES, ExperimentFile
    from gkd_lab.config.settings import Section, Settings

    names = [name for name in ExperimentFile.model_fields if name not in _FILE_FIELDS]
    for name, field in Settings.model_fields.items():
        names += _list_section_fields(name, field.annotation, Section)
    return sorted({*AXIS_NAMES, *names})


_FILE_FIELDS = {"description", "paper", "grid", "per_scale", "per_task", "scale"}
"""Fields of an experiment file that `--set` does not replace, or that have an option of their own."""


def _list_section_fields(prefix: str, annotation: Any, section: type) -> Iterator[str]:
    """Yield the dotted names of the fields inside the sections that a type allows."""
    from gkd_lab.config.errors import list_field_types, list_model_classes

    for owner in list_model_classes(annotation):
        if issubclass(owner, section):
            for name, part in list_field_types(owner).items():
                yield f"{prefix}.{name}"
                yield from _list_section_fields(f"{prefix}.{name}", part, section)


def list_override_values(key: str, name: str | None, scale: str | None) -> list[str]:
    """Return values of a field as texts: the choices of its type, and those of the experiment `name`.

    Without an experiment lmbda and beta have the paper's values. Raises ConfigError for a file that is wrong.
    """
    from gkd_lab.config.errors import list_key_types
    from gkd_lab.config.experiment import ExperimentFile
    from gkd_lab.tasks import TASKS

    types: list[Any] = [ExperimentFile]
    for part in key.split("."):
        types = [item for annotation in types for item in list_key_types(annotation, part)]
    values = [*_list_choices(types), *(_list_experiment_values(key, name, scale) if name else ())]
    if key == "task":
        values += TASKS
    if key == "metrics":
        values += complete_metrics("")
    if not values:
        values += _PAPER_VALUES.get(key, ())
    return list(dict.fromkeys(filter(None, map(_format_value, values))))


_PAPER_VALUES: Mapping[str, tuple[float, ...]] = {"lmbda": (0, 0.5, 1), "beta": (0, 0.1, 0.5, 0.9, 1)}
"""Axes of Figures 7 and A.12 to A.14."""


def _list_choices(annotations: Iterable[Any]) -> Iterator[Any]:
    """Yield the values that types list: those of a Literal, and true and false."""
    from gkd_lab.config.errors import walk_annotation

    for annotation in annotations:
        for item in walk_annotation(annotation):
            if get_origin(item) is Literal:
                yield from get_args(item)
            elif item is bool:
                yield from (False, True)


def _list_experiment_values(key: str, name: str, scale: str | None) -> Iterator[Any]:
    """Yield an experiment's values of an axis, or its value of a field; of a model also all sizes."""
    from gkd_lab import experiments
    from gkd_lab.config.experiment import read_experiment
    from gkd_lab.config.settings import merge_settings
    from gkd_lab.tasks import TASKS

    experiment = read_experiment(experiments.find_experiment_file(name))
    axes = experiment.list_axes()
    yield from axes.get(key, ())
    used_scale = scale or experiment.scale
    for task in axes.get("task", (experiment.task,)):
        if task not in TASKS or used_scale not in TASKS[task].scales:
            continue
        settings = experiment.merge_task_settings(task, used_scale)
        source = settings.get("data", {}).get("source") or TASKS[task].scales[used_scale]["data"].get(
            "source"
        )
        if source is None:
            continue
        defaults = TASKS[task].get_defaults(used_scale, source)
        if key in ("teacher", "student", "teacher.size", "student.size"):
            yield from defaults["models"]
        if key not in axes:
            yield _get_nested_value(merge_settings(dict(defaults), settings), key)


def _get_nested_value(section: Any, key: str) -> Any:
    """Return a field of nested dictionaries by its dotted name; None where there is none."""
    for part in key.split("."):
        section = section.get(part) if isinstance(section, Mapping) else None
    return section


def _format_value(value: Any) -> str | None:
    """Return a scalar as YAML writes it; None for a list or section, and for text with spaces."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if abs(value) < 1e6 and float(f"{value:g}") == value else str(value)
    if isinstance(value, str) and not any(character in value for character in " ,[]{}'\""):
        return value
    return None
