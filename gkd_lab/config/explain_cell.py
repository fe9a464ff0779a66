"""Say of each value of a resolved cell where it comes from.

The sources are those that `SourcedSettings` noted while the cell's settings were merged. This module knows
from which settings `resolve_cell` and `reference_models` resolve each field of a `Training`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gkd_lab.config.cell import AnyEvaluation, Cell, Evaluation
from gkd_lab.config.errors import Location
from gkd_lab.config.evaluation_settings import LmEvalSettings
from gkd_lab.config.loss_terms import DivergenceConfig, ResolvedDivergence, ResolvedReward
from gkd_lab.config.reference_models import find_size
from gkd_lab.config.resolve_cell import PER_CELL_FIELDS, CellResolver
from gkd_lab.config.settings import ModelSettings
from gkd_lab.config.teacher_settings import resolve_extra_teachers
from gkd_lab.config.value_sources import ValueSource

BUILT_IN = ValueSource("built-in")
Sources = tuple[ValueSource, ...]


@dataclass(frozen=True)
class ResolvedValue:
    """A value of a resolved cell."""

    group: str
    """One of `GROUP_ORDER`, or `evaluation NAME`."""
    field: str
    """Dotted name of the field in the record's `spec.json`, such as `optimizer.learning_rate`."""
    value: Any
    sources: tuple[str, ...]
    """Where it comes from, in words; () where that is not known."""


_GROUPS = {
    "task": "cell",
    "seed": "cell",
    "objectives": "loss",
    "loss_normalization": "loss",
    "teacher_scores": "loss",
    "source": "text",
    "max_input_tokens": "lengths",
    "max_output_tokens": "lengths",
    "teacher": "teacher",
    "teacher_dtypes": "teacher",
    "parked": "teacher",
    "teachers": "teachers",
    "start": "student",
}
"""First part of a field -> group; other fields are of `training`."""
GROUP_ORDER = ("cell", "loss", "text", "training", "lengths", "data", "teacher", "teachers", "student")


def list_values(cell_training: Mapping[str, Any]) -> Iterator[tuple[str, str, Location, Any]]:
    """Yield (group, field, path, value) of a training as plain data: the data once, without unset values."""
    for path, value in _flatten((), {"data": cell_training["start"]["data"], **cell_training}):
        is_repeated = path[0] in ("teacher", "start", "teachers") and "data" in path
        is_repeated |= path[0] in ("teacher", "start") and path[1] == "task"
        if value is None or value == [] or is_repeated:
            continue
        group = "data" if path[0] == "data" else _GROUPS.get(str(path[0]), "training")
        yield group, ".".join(map(str, path)), path, value


def _flatten(path: Location, value: Any) -> Iterator[tuple[Location, Any]]:
    """Yield (path, value) of the values inside dictionaries and lists of dictionaries."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flatten((*path, key), part)
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for number, part in enumerate(value):
            yield from _flatten((*path, number), part)
    else:
        yield path, value


def explain_cell(resolver: CellResolver, cell: Cell) -> list[ResolvedValue]:
    """Return the values of a cell that `resolver` resolved, or that equals one, with their sources."""
    cell_sources, origin = _CellSources(resolver, cell), resolver.experiment.origin

    def describe(sources: Sources) -> tuple[str, ...]:
        texts = (source.describe(origin, cell.task, cell.scale) for source in sources)
        return tuple(dict.fromkeys(texts))

    values = [
        ResolvedValue(group, field, value, describe(cell_sources.find(path)))
        for group, field, path, value in list_values(cell.training.model_dump(mode="json"))
    ]
    values.sort(key=lambda value: GROUP_ORDER.index(value.group))
    for evaluation in cell.evaluations:
        for field, value in evaluation.model_dump(mode="json").items():
            if value is not None:
                texts = describe(cell_sources.find_evaluation(evaluation, field))
                values.append(ResolvedValue(f"evaluation {evaluation.name}", field, value, texts))
    return values


class _CellSources:
    """Sources of the fields of one cell."""

    def __init__(self, resolver: CellResolver, cell: Cell) -> None:
        self.cell = cell
        self.experiment = resolver.experiment
        self.task = resolver.tasks[cell.task]
        self.shared = resolver.resolve_shared_parts(cell.labels)
        self.settings = self.shared.merged.settings
        self.defaults = self.shared.merged.defaults

    def find(self, path: Location) -> Sources:
        """Return the sources of a field of the training, or of `data`."""
        head, rest = str(path[0]), path[1:]
        finders = {
            "task": lambda _: self._find_task(),
            "optimizer": self._find_optimizer,
            "objectives": self._find_objective,
            "source": self._find_source,
            "data": self._find_data,
            "train_rows": self._find_train_rows,
            "selection": self._find_selection,
            "lora": lambda part: self._find_model_setting("student", ("lora", *part)) or (BUILT_IN,),
        }
        if head in finders:
            return finders[head](rest)
        if head in ("teacher", "start"):
            return self._find_model("teacher" if head == "teacher" else "student", rest)
        if head == "teachers":
            return self._find_extra_teacher(int(rest[0]), rest[1:])
        if head in ("teacher_dtypes", "parked"):
            field = "dtype" if head == "teacher_dtypes" else "parked"
            return self.settings.find(("teacher", field)) or self.settings.find(("teachers",))
        if head == "trl_version":
            return (ValueSource("derived", detail="the installed TRL"),)
        if head == "loss_normalization" and self.shared.settings.implementation == "trl":
            return (
                ValueSource("derived", detail="TRL divides by tokens"),
                *self._find_setting("implementation"),
            )
        return self._find_setting(head)

    def _find_setting(self, name: str) -> Sources:
        """Return the sources of a setting by its name: the method, else an axis, else the merged settings."""
        if name in PER_CELL_FIELDS:
            if name in self.shared.method:
                return self._find_method()
            if name in self.cell.labels:
                return (ValueSource("axis", ("grid", name)),)
        return self.settings.find((name,)) or (BUILT_IN,)

    def _find_method(self) -> Sources:
        """Return the source of what the method fixes: where it is named."""
        name = self.shared.settings.method
        if name is None:  # `source: teacher` fixes the text as a method does
            return self.settings.find(("source",))
        location = self.settings.find(("method",))[0].location
        return (ValueSource("method", location, name),)

    def _find_task(self) -> Sources:
        """Return the source of the task's name."""
        if "task" in self.experiment.axis_names:
            return (ValueSource("axis", ("grid", "task")),)
        return (ValueSource("file", ("task",)),)

    def _find_optimizer(self, path: Location) -> Sources:
        """Return the sources of a field of the optimizer."""
        name = "optimizer" if path[0] == "name" else str(path[0])
        if self.cell.training.objectives[0].beta == 1 and name in self.shared.merged.reverse_kl:
            student = self.shared.settings.student
            return (ValueSource("student", detail=f"the student {student} and reverse KL"),)
        return self._find_setting(name)

    def _find_objective(self, path: Location) -> Sources:
        """Return the sources of a field of a loss term: of `objectives`, or of the shorthand."""
        number, field = int(path[0]), str(path[1])
        listed = self.shared.settings.objectives
        if listed is not None:
            term = listed[number]
            stated = field if field in term.model_fields_set else _STATED_NAMES.get(field, field)
            if stated in term.model_fields_set:
                return self.settings.find(("objectives", number, stated, *path[2:]))
            if isinstance(term, DivergenceConfig) and field.endswith("_temperature"):
                return self._find_setting(field)
            return (BUILT_IN,)
        return self._find_shorthand(self.cell.training.objectives[number], field)

    def _find_shorthand(self, term: Any, field: str) -> Sources:
        """Return the sources of a field of a loss term that shorthand stands for."""
        if isinstance(term, ResolvedReward) and field not in ("weight", "type"):
            reward = self.settings.values.get("reward")
            path = ("reward", field) if isinstance(reward, dict) else ("reward",)
            is_stated = not isinstance(reward, dict) or field in reward
            return self.settings.find(path) if is_stated and (path[1:] or field == "name") else (BUILT_IN,)
        if field == "weight" and self.shared.reward is not None:
            return self._find_setting("alpha")
        if field == "type":
            if isinstance(term, ResolvedReward):
                return self.settings.find(("reward",))
            return self._find_method() if "type" in self.shared.method else (BUILT_IN,)
        if field == "teachers" and self.cell.training.teachers:
            return self._find_setting("anchor")
        if field in ("divergence", "beta", "teacher_temperature", "student_temperature"):
            return self._find_setting(field)
        if field == "rescale" and isinstance(term, ResolvedDivergence):
            return self._find_setting("rescale_divergence")
        return (BUILT_IN,)

    def _find_source(self, path: Location) -> Sources:
        """Return the sources of a field of `source`: of its long form, or of the shorthand."""
        if self.shared.source is not None:
            stated = self.settings.values["source"]
            if path[0] in stated and (len(path) < 2 or _has_nested(stated, path)):
                return self.settings.find(("source", *path))
            return self._find_setting("temperature") if path[0] == "temperature" else (BUILT_IN,)
        if path[0] == "text":
            is_stated = self.settings.values.get("source") == "teacher"
            return self.settings.find(("source",)) if is_stated else self._find_method()
        return self._find_setting(str(path[0]))

    def _find_data(self, path: Location) -> Sources:
        """Return the sources of a field of the data."""
        field = str(path[0])
        if field == "revision":
            return (ValueSource("derived", detail="content of the data"),)
        name = "source" if field in ("kind", "name", "path") else field
        return self.settings.find(("data", name, *path[1:])) or (BUILT_IN,)

    def _find_train_rows(self, path: Location) -> Sources:
        """Return the sources of the number of rows to distil on: stated, or that of the student's SFT."""
        if self.shared.settings.train_rows is not None:
            return self._find_setting("train_rows")
        return self._find_model("student", ("sft", "rows"))

    def _find_selection(self, path: Location) -> Sources:
        """Return the sources of a field of the selection of a checkpoint."""
        if path[0] == "metric":
            return self._find_metrics()
        return self._find_setting("eval_every" if path[0] == "every" else "eval_rows")

    def _find_metrics(self) -> Sources:
        """Return the source of the metrics of evaluations that name none."""
        location = self.experiment.locate_task_field("metrics", self.cell.task, self.cell.scale)
        return (ValueSource("task") if location is None else ValueSource("file", location),)

    def _find_extra_teacher(self, number: int, path: Location) -> Sources:
        """Return the sources of a field of a teacher besides the first."""
        if self.cell.training.teachers[number] == self.cell.training.start:
            return self._find_model("student", path)
        settings = self.shared.settings
        names = list(resolve_extra_teachers(settings.objectives or (), settings.teachers or {}))
        return self._find_model("teacher", path, ("teachers", names[number]))

    def _find_model(self, role: str, path: Location, place: Location | None = None) -> Sources:
        """Return the sources of a field of a teacher or student. place: Its settings; default: the role."""
        head = path[0]
        if head == "task":
            return self._find_task()
        if head == "family":
            return self.settings.find(("family",)) or (ValueSource("task"),)
        if head in ("max_input_tokens", "max_output_tokens"):
            return self._find_setting(str(head))
        if head == "precision":
            reduced = self.shared.settings.precision == "bf16"
            note = (ValueSource("derived", detail="models are fine-tuned in fp32 where cells train in bf16"),)
            return (*(note if reduced else ()), *self._find_setting("precision"))
        if head == "dropout":
            return self.defaults.find(("dropout",))
        if head == "tokenizer":
            return self._find_tokenizer(role, path[1])
        if head == "sft":
            return self._find_sft(role, path[1:], place)
        return self._find_model_field(role, path[1:], place)

    def _find_tokenizer(self, role: str, field: str | int) -> Sources:
        """Return the sources of a tokenizer's field: `teacher_tokenizer` if stated, else `tokenizer`."""
        sources: Sources = ()
        if role == "teacher" and self.shared.settings.teacher_tokenizer is not None:
            sources = self.settings.find(("teacher_tokenizer", field))
        return sources or self.settings.find(("tokenizer", field)) or (BUILT_IN,)

    def _find_sft(self, role: str, path: Location, place: Location | None) -> Sources:
        """Return the sources of a field of the SFT of a model; unstated ones are the scale's defaults."""
        field = str(path[-1])
        name = "optimizer" if field == "name" else field
        if stated_sources := self._find_model_setting(role, ("sft", name), place):
            return stated_sources
        if name in ("warmup_steps", "cooldown_steps"):
            return (
                ValueSource("derived", detail="the default's share of the SFT's steps"),
                *self.defaults.find((name,)),
            )
        return self.defaults.find((name,)) if name not in ("seed", "rows") else (BUILT_IN,)

    def _find_model_field(self, role: str, path: Location, place: Location | None) -> Sources:
        """Return the sources of a field of a model's description."""
        field = str(path[-1])
        place = place or (role,)
        if field == "revision":
            return (ValueSource("derived", detail="content or commit of the model"),)
        if field == "name":
            return self.settings.find(place)[:1]
        name = {"path": "pretrained", "served": "model"}.get(field, field)
        sources = self._find_model_setting(role, (name,), place)
        if not sources and field in ("path", "pretrained"):
            sources = self._find_model_setting(role, ("tokenizer",), place)
        if not sources and field == "feed_forward":
            return (ValueSource("derived", detail="4 times the width"),)
        return sources or (BUILT_IN,)

    def _find_model_setting(self, role: str, path: Location, place: Location | None = None) -> Sources:
        """Return the sources of a setting of a model: stated itself, or of the model of the scale; or ()."""
        place = place or (role,)
        stated: Any = self.settings.values
        for key in place:
            stated = stated[key]
        if isinstance(stated, str):
            size = stated if stated in self.defaults.values["models"] else None
            if size is None:
                return self.settings.find(place) if path == ("pretrained",) else ()
        else:
            if _has_nested(stated, path):
                return self._add_cell_seed(self.settings.find((*place, *path)), stated, path)
            size = find_size(ModelSettings.model_validate(stated), self.defaults.values.get(role))
        if size is None:
            return ()
        changes = self.defaults.values.get("students", {}) if role == "student" else {}
        bases: list[tuple[Location, Any]] = [
            (("students",), changes),
            (("models", size), self.defaults.values["models"][size]),
        ]
        for base, values in bases:
            if _has_nested(values, path):
                return self._add_cell_seed(self.defaults.find((*base, *path)), values, path)
        return ()

    def _add_cell_seed(self, sources: Sources, section: Any, path: Location) -> Sources:
        """Return the sources of a model's setting; with the cell's seed, where `cell` stands for it."""
        for key in path:
            section = section[key]
        if section != "cell":
            return sources
        return (*sources, ValueSource("derived", detail="seed of the cell"), *self._find_setting("seed"))

    def find_evaluation(self, evaluation: AnyEvaluation, field: str) -> Sources:
        """Return the sources of a field of an evaluation."""
        number, entry = self.shared.evaluation_entries[evaluation]
        location = self.experiment.locate_task_field("evaluations", self.cell.task, self.cell.scale)
        if location is None:
            place = self.defaults.find(("evaluations",))
        else:
            place = (ValueSource("file", (*location, number, field)),)
        if field == "checkpoint" and location is None:
            return (
                (BUILT_IN,) if self.shared.settings.eval_every is None else self._find_setting("eval_every")
            )
        if field in entry.model_fields_set or isinstance(entry, LmEvalSettings):
            return place
        if field == "metrics":
            return self._find_metrics()
        if field == "max_output_tokens":
            return self._find_setting(field)
        if field == "examples" and isinstance(evaluation, Evaluation):
            return self.settings.find(("data", evaluation.split)) or (BUILT_IN,)
        return (BUILT_IN,)


_STATED_NAMES = {"mixture": "weights", "mixture_temperatures": "temperatures", "routes": "routed"}
"""Field of a resolved divergence -> the setting that it is made of, where the names differ."""


def _has_nested(section: Any, path: Location) -> bool:
    """Return whether nested dictionaries have a value, not null, at a path of keys."""
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else None
    return section is not None
