"""From an experiment to its cells: cross the axes, fill in defaults, resolve shorthand, collapse twins."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import ValidationError

from gkd_lab.config.cell import (
    AnyEvaluation,
    Cell,
    DataSpec,
    Family,
    OptimizerSpec,
    SftModel,
    Source,
    TeacherText,
    Training,
)
from gkd_lab.config.classifier_checks import check_classes
from gkd_lab.config.errors import SpecError, explain, unknown
from gkd_lab.config.evaluation_settings import evaluations_asked
from gkd_lab.config.experiment import Experiment, Scale
from gkd_lab.config.fingerprint import canonical
from gkd_lab.config.layer_checks import check_matching
from gkd_lab.config.loss_terms import (
    AnyObjective,
    AnyObjectiveSettings,
    CrossEntropyObjective,
    Divergent,
    Objective,
    Rewarded,
    RewardFields,
    RewardObjective,
)
from gkd_lab.config.multi_teacher import START, check_holds, more_teachers, numbered
from gkd_lab.config.offline_teachers import check_kept, check_served, kept, scores_of
from gkd_lab.config.reference_models import READ, check_schedule, held, optimizer_of, sft_model
from gkd_lab.config.reward_objectives import check_writer, resolved, terms_of
from gkd_lab.config.settings import DataSettings, ModelSettings, Settings, evaluation_settings, merge
from gkd_lab.config.tokenizer_checks import check_sizes, check_tokenizers


class TaskDefaults(Protocol):
    """What a grid must know of a task; `gkd_lab.tasks.Task` is one."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> Family: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    def defaults(self, scale: str, source: str | None) -> Mapping[str, Any]:
        """Settings at `scale` for a data source (None: the task's own), `models`, `evaluations`."""
        ...


@dataclass(frozen=True)
class Revisions:
    """How places become contents: two functions that look at the data and at the checkpoints."""

    data: Callable[[str, DataSettings], DataSpec]
    model: Callable[[str], tuple[str | None, str | None, str | None]]
    """Name or folder -> (hub name or None, folder or None, revision)."""


@dataclass(frozen=True)
class GridOfCells:
    """The cells of one experiment at one scale, in order."""

    name: str
    scale: str
    experiment: Experiment
    axes: dict[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]
    stands_for: dict[str, tuple[dict[str, Any], ...]]
    """Full fingerprint -> labels of all combinations that came out as one cell, where several did."""


# Read from each cell alone; everything else is resolved once per combination of its values.
_PER_CELL = (
    "lmbda",
    "beta",
    "divergence",
    "rescale_divergence",
    "seed",
    "teacher_temperature",
    "student_temperature",
    "temperature",
    "alpha",
    "anchor",
)


def expand(
    name: str,
    experiment: Experiment,
    tasks: Mapping[str, TaskDefaults],
    revisions: Revisions,
    scale: Scale | None = None,
) -> GridOfCells:
    """Every combination of the experiment's axes as a cell; the first axis varies slowest.

    Combinations that describe the same training are one cell. Raises SpecError.
    """
    chosen = scale or experiment.scale
    axes = experiment.axes()
    if "task" not in axes:
        if experiment.task is None:
            raise SpecError(f"{name}: no task: set `task:` or an axis `grid.task`")
        axes = {"task": (experiment.task,), **axes}
    for task in (*axes["task"], *experiment.per_task):
        if task not in tasks:
            raise unknown("task", task, tasks)
    resolver = _Resolver(experiment, tasks, revisions, chosen)
    found: dict[str, Cell] = {}
    labels: dict[str, list[dict[str, Any]]] = {}
    for point in _points(axes):
        try:
            cell = resolver.cell(point)
        except ValidationError as error:
            raise explain(error, f"{name}: {chosen} scale of {point['task']}", Settings) from error
        found.setdefault(cell.full_fingerprint, cell)
        labels.setdefault(cell.full_fingerprint, []).append(point)
    twins = {key: tuple(points) for key, points in labels.items() if len(points) > 1}
    return GridOfCells(name, chosen, experiment, axes, tuple(found.values()), twins)


def _points(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    names = list(axes)
    for values in itertools.product(*axes.values()):
        yield dict(zip(names, values, strict=True))


class _Resolver:
    """Turns points of a grid into cells; what points share is resolved once."""

    def __init__(
        self,
        experiment: Experiment,
        tasks: Mapping[str, TaskDefaults],
        revisions: Revisions,
        scale: str,
    ) -> None:
        self.experiment = experiment
        self.tasks = tasks
        self.revisions = revisions
        self.scale = scale
        self.axes = experiment.axes().keys()
        self.shared: dict[str, _Shared] = {}
        self.known: dict[Hashable, Any] = {}

    def cell(self, point: dict[str, Any]) -> Cell:
        slow = {key: value for key, value in point.items() if key not in _PER_CELL}
        key = canonical(slow)
        if key not in self.shared:
            self.shared[key] = self._resolve(slow)
        shared = self.shared[key]
        fast = {key: point[key] for key in _PER_CELL if key in point}
        values = {**shared.fast, **fast, **shared.method}
        stated = _filled(shared, values, self.revisions)
        objectives = stated or terms_of(_objective(values), shared.reward, values)
        of_reverse_kl = {"optimizer": shared.of_reverse_kl} if objectives[0].beta == 1 else {}
        source = shared.source or _source(values)
        check_writer(objectives, source)
        scores = scores_of(shared.training["teacher_scores"], objectives, source)
        teachers = {"teachers": (shared.training["start"],)} if values["anchor"] == "start" else {}
        training = Training(
            objectives=objectives,
            source=source,
            seed=values["seed"],
            **{**shared.training, **of_reverse_kl, **teachers, "teacher_scores": scores},
        )
        check_matching(training)
        check_tokenizers(training)
        check_holds(training)
        check_served(training)
        check_kept(training)
        check_classes(training, shared.evaluations)
        return Cell(self.scale, training, shared.evaluations, point)

    def _resolve(self, point: dict[str, Any]) -> "_Shared":
        task = self.tasks[point["task"]]
        stated = self._stated(task, point)
        try:
            defaults = task.defaults(self.scale, stated.get("data", {}).get("source"))
        except ValueError as error:
            raise SpecError(str(error)) from error
        own, reverse_kl = _student_s_own(defaults, stated)
        settings = Settings.model_validate(
            _stretched(merge(_settings_of(defaults), own, stated), defaults, stated)
        )
        shared = _share(task, settings, defaults, self._evaluations(task, defaults, settings), self)
        rates = {name: value for name, value in reverse_kl.items() if name not in stated}
        return replace(shared, of_reverse_kl=optimizer_of(settings.model_copy(update=rates)))

    def sft_model(
        self, task: TaskDefaults, role: str, settings: Settings, defaults: Mapping[str, Any]
    ) -> SftModel:
        """The teacher or the student that some settings ask for; the same ones give the same one."""
        key = (task.name, role, getattr(settings, role), *_read(settings, READ))
        if key not in self.known:
            data = _in_form(self.revisions.data(task.name, settings.data or DataSettings()), settings.data)
            models = {n: ModelSettings.model_validate(m) for n, m in defaults["models"].items()}
            recipe = Settings.model_validate(_settings_of(defaults))
            family = defaults.get("family", task.family)
            self.known[key] = sft_model(
                task.name, family, role, settings, recipe, models, data, self.revisions.model
            )
        return self.known[key]

    def _stated(self, task: TaskDefaults, point: Mapping[str, Any]) -> dict[str, Any]:
        axes: dict[str, Any] = {}
        for axis, value in point.items():
            if axis != "task":
                section, _, name = axis.partition(".")
                axes = merge(axes, {section: {name: value}} if name else {section: value})
        stated = merge(self.experiment.stated(task.name), axes)
        for long, short in _LONG_FORM.items():
            twice = [name for name in short if name in stated or name in self.axes]
            if not isinstance(stated.get(long), str | None) and twice:
                raise SpecError(f"{long} and {', '.join(twice)} say the same twice; leave one out")
        return stated

    def _evaluations(
        self, task: TaskDefaults, defaults: Mapping[str, Any], settings: Settings
    ) -> tuple[AnyEvaluation, ...]:
        key = (task.name, settings.data, settings.max_output_tokens)
        if key not in self.known:
            stated = self.experiment.evaluations_of(task.name) or tuple(
                evaluation_settings(e) for e in defaults["evaluations"]
            )
            limit = settings.max_output_tokens
            assert limit is not None, "every scale states max_output_tokens"
            rows = settings.data or DataSettings()
            found = (e for asked in stated for e in evaluations_asked(asked, task.metrics, limit, rows))
            self.known[key] = tuple(dict.fromkeys(found))
        return self.known[key]


_LONG_FORM = {
    "source": ("lmbda", "temperature", "method"),
    "objectives": (
        "method",
        "beta",
        "divergence",
        "rescale_divergence",
        "reward",
        "alpha",
        "anchor",
    ),
}


@dataclass(frozen=True)
class _Shared:
    """What all cells have in common that differ only in the fast axes."""

    training: dict[str, Any]
    evaluations: tuple[AnyEvaluation, ...]
    fast: dict[str, Any]
    objectives: tuple[AnyObjectiveSettings, ...] | None
    source: Source | None
    method: Mapping[str, Any]
    reward: RewardObjective | None = None
    of_reverse_kl: OptimizerSpec | None = None


def _share(
    task: TaskDefaults,
    settings: Settings,
    defaults: Mapping[str, Any],
    evaluations: tuple[AnyEvaluation, ...],
    resolver: _Resolver,
) -> _Shared:
    start = resolver.sft_model(task, "student", settings, defaults)
    more = more_teachers(settings.objectives or (), settings.teachers or {})
    training = {
        "task": task.name,
        "teacher": resolver.sft_model(task, "teacher", settings, defaults),
        "teachers": tuple(
            start
            if name == START
            else resolver.sft_model(task, "teacher", settings.model_copy(update={"teacher": asked}), defaults)
            for name, asked in more.items()
        ),
        **held((settings.teacher, *more.values())),
        "start": start,
        "optimizer": optimizer_of(settings),
        "train_rows": _fewer(settings.train_rows, settings.data),
        "teacher_scores": kept(settings.teacher_scores),
        **{name: getattr(settings, name) for name in _TRAINING_FIELDS},
    }
    fast = {name: getattr(settings, name) for name in _PER_CELL}
    _check(settings)
    source, method = settings.source, METHODS[settings.method or "gkd"]
    reward = _reward(settings.reward, resolver.revisions)
    if reward is None and "alpha" in method:
        raise SpecError(f"method {settings.method} learns from a reward: set `reward`, such as exact_match")
    if isinstance(source, Source):
        said = source.model_dump(exclude_none=True)
        source = _source({"temperature": settings.temperature, **said})
        return _Shared(training, evaluations, fast, settings.objectives, source, method, reward)
    if source == "teacher":
        method = {**method, "text": TeacherText()}
    return _Shared(training, evaluations, fast, settings.objectives, None, method, reward)


def _fewer(rows: int | None, data: DataSettings | None) -> int | None:
    """None where it is all there are."""
    there = None if data is None else data.train
    return None if rows is None or (there is not None and rows >= there) else rows


_NOT_SETTINGS = ("models", "evaluations", "family", "per_student")


def _student_s_own(
    defaults: Mapping[str, Any], stated: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the scale sets for the chosen student alone, and besides when it learns by reverse KL."""
    student = stated.get("student", defaults["student"])
    own = dict(defaults.get("per_student", {}).get(student, {})) if isinstance(student, str) else {}
    return own, own.pop("reverse_kl", {})


def _in_form(data: DataSpec, settings: DataSettings | None) -> DataSpec:
    """The rows in the form that is asked for, whatever their source."""
    asked = settings or DataSettings()
    form = {"shots": asked.shots or 0, "calculator_marks": asked.calculator_marks or False}
    return DataSpec(**{**data.model_dump(), **form})


def _settings_of(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in defaults.items() if name not in _NOT_SETTINGS}


def _stretched(
    merged: dict[str, Any], defaults: Mapping[str, Any], stated: Mapping[str, Any]
) -> dict[str, Any]:
    """Warm-up and cool-down keep their share of the steps unless they are stated themselves."""
    share = merged["steps"] / defaults["steps"]
    kept = {
        name: int(defaults[name] * share)
        for name in ("warmup_steps", "cooldown_steps")
        if name not in stated and name in defaults
    }
    return {**merged, **kept}


def _check(settings: Settings) -> None:
    """What can be said but not be done."""
    check_schedule(optimizer_of(settings), settings.steps or 0, "")
    check_sizes(settings)


def _read(settings: Settings, names: Iterable[str]) -> list[Any]:
    return [getattr(settings, name) for name in names]


_TRAINING_FIELDS = (
    "loss_normalization",
    "steps",
    "batch_size",
    "dropout",
    "max_input_tokens",
    "max_output_tokens",
    "precision",
)


METHODS: Mapping[str, Mapping[str, Any]] = {
    "gkd": {},  # what lmbda and the divergence say
    "gkd_supervised": {"lmbda": 0.0},  # Fig. 3, 9: any divergence on fixed data
    "supervised_kd": {"lmbda": 0.0, "divergence": "jsd", "beta": 0.0},  # Eq. 3
    "on_policy_kd": {"lmbda": 1.0, "divergence": "jsd", "beta": 0.0},  # Eq. 4
    "imitkd": {"lmbda": 0.5, "divergence": "jsd", "beta": 0.0},  # Lin et al. 2020, as in §5
    "f_distill": {"lmbda": 0.5, "divergence": "tv", "beta": None},  # Wen et al. 2023
    "seqkd": {"lmbda": 0.0, "type": "cross_entropy", "text": TeacherText()},  # Kim and Rush 2016
    "sft": {"lmbda": 0.0, "type": "cross_entropy"},
    # ours: the smallest alpha of Fig. 5, next to which RLEF* lies there; its own is not stated
    "rlef": {"lmbda": 1.0, "anchor": "start", "alpha": 0.05},  # Roit et al. 2023, as RLEF* in Fig. 5
}
"""The paper's baselines in its own terms (§3, §4): what each one sets."""


def _objective(values: Mapping[str, Any]) -> AnyObjective:
    """The defaults of `Objective` stand for what neither the experiment nor the task's scale says."""
    if values.get("type") == "cross_entropy":
        return CrossEntropyObjective()
    stated = {
        "divergence": values["divergence"],
        "beta": values["beta"],
        "rescale": values["rescale_divergence"],
        "teacher_temperature": values["teacher_temperature"],
        "student_temperature": values["student_temperature"],
    }
    return Objective(**{name: value for name, value in stated.items() if value is not None})


def _source(values: Mapping[str, Any]) -> Source:
    lmbda = values["lmbda"]
    return Source(
        lmbda=lmbda,
        temperature=values["temperature"] if lmbda > 0 else None,
        text=values.get("text") if lmbda < 1 else None,
    )


def _filled(shared: _Shared, values: Mapping[str, Any], revisions: Revisions) -> tuple[AnyObjective, ...]:
    """What is stated as a list, its divergences with the temperatures that hold besides."""
    number = numbered(shared.objectives or ())
    return tuple(_whole(one, values, number, revisions) for one in shared.objectives or ())


def _whole(
    one: AnyObjectiveSettings, values: Mapping[str, Any], number: Mapping[str, int], revisions: Revisions
) -> AnyObjective:
    if isinstance(one, Divergent):
        return one.filled(values, number)
    return resolved(one, revisions.model) if isinstance(one, Rewarded) else one


def _reward(stated: str | RewardFields | None, revisions: Revisions) -> RewardObjective | None:
    """A name is short for a reward with the default baseline."""
    if stated is None:
        return None
    fields = {"name": stated} if isinstance(stated, str) else stated.model_dump()
    return resolved(Rewarded(**fields), revisions.model)
