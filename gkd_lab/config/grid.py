"""From an experiment to its cells: cross the axes, fill in defaults, resolve shorthand, collapse twins."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import ValidationError

from gkd_lab.config.artifact_specs import DataSpec, Family, OptimizerSpec, SftModel, TeacherText
from gkd_lab.config.cell import AnyEvaluation, Cell, Source, Training
from gkd_lab.config.classifier_checks import check_classifier_cell
from gkd_lab.config.errors import ConfigError, build_unknown_name_error, explain_validation_error
from gkd_lab.config.evaluation_settings import resolve_evaluations
from gkd_lab.config.experiment import Experiment, Scale
from gkd_lab.config.fingerprint import canonical_json
from gkd_lab.config.layer_checks import check_layer_terms
from gkd_lab.config.loss_terms import (
    CrossEntropyConfig,
    DivergenceConfig,
    ResolvedDivergence,
    ResolvedReward,
    ResolvedTerm,
    RewardConfig,
    RewardFields,
    TermConfig,
)
from gkd_lab.config.multi_teacher import (
    START_TEACHER,
    check_not_only_own_start,
    number_teachers,
    resolve_extra_teachers,
)
from gkd_lab.config.offline_teachers import (
    check_cached_teacher_placement,
    check_served_teacher,
    parse_teacher_scores,
    resolve_teacher_scores,
)
from gkd_lab.config.reference_models import (
    REFERENCE_SETTINGS,
    build_optimizer_spec,
    check_schedule,
    resolve_sft_model,
    resolve_teacher_placements,
)
from gkd_lab.config.reward_objectives import build_reward_terms, check_terms_learn, resolve_reward
from gkd_lab.config.settings import (
    DataSettings,
    ModelSettings,
    Settings,
    merge_settings,
    parse_evaluation_settings,
)
from gkd_lab.config.tokenizer_checks import check_tokenizers, check_vocab_sizes


class TaskDefaults(Protocol):
    """What a grid must know of a task; `gkd_lab.tasks.Task` is one."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> Family: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...
    def get_defaults(self, scale: str, source: str | None) -> Mapping[str, Any]:
        """Settings at `scale` for a data source (None: the task's own), `models`, `evaluations`."""
        ...


@dataclass(frozen=True)
class RevisionLookup:
    """How places become contents: two functions that look at the data and at the checkpoints."""

    resolve_data: Callable[[str, DataSettings], DataSpec]
    resolve_model: Callable[[str], tuple[str | None, str | None, str | None]]
    """Name or folder -> (hub name or None, folder or None, revision)."""


@dataclass(frozen=True)
class Grid:
    """The cells of one experiment at one scale, in order."""

    name: str
    scale: str
    experiment: Experiment
    axes: dict[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]
    stands_for: dict[str, tuple[dict[str, Any], ...]]
    """Full fingerprint -> labels of all combinations that came out as one cell, where several did."""


# Read from each cell alone; everything else is resolved once per combination of its values.
_PER_CELL_FIELDS = (
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


def expand_grid(
    name: str,
    experiment: Experiment,
    tasks: Mapping[str, TaskDefaults],
    revisions: RevisionLookup,
    scale: Scale | None = None,
) -> Grid:
    """Every combination of the experiment's axes as a cell; the first axis varies slowest.

    Combinations that describe the same training are one cell. Raises SpecError.
    """
    chosen = scale or experiment.scale
    axes = experiment.list_axes()
    if "task" not in axes:
        if experiment.task is None:
            raise ConfigError(f"{name}: no task: set `task:` or an axis `grid.task`")
        axes = {"task": (experiment.task,), **axes}
    for task in (*axes["task"], *experiment.per_task):
        if task not in tasks:
            raise build_unknown_name_error("task", task, tasks)
    resolver = _CellResolver(experiment, tasks, revisions, chosen)
    found: dict[str, Cell] = {}
    labels: dict[str, list[dict[str, Any]]] = {}
    for point in _cross_axes(axes):
        try:
            cell = resolver.resolve_cell(point)
        except ValidationError as error:
            raise explain_validation_error(
                error, f"{name}: {chosen} scale of {point['task']}", Settings
            ) from error
        found.setdefault(cell.full_fingerprint, cell)
        labels.setdefault(cell.full_fingerprint, []).append(point)
    twins = {key: tuple(points) for key, points in labels.items() if len(points) > 1}
    return Grid(name, chosen, experiment, axes, tuple(found.values()), twins)


def _cross_axes(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    names = list(axes)
    for values in itertools.product(*axes.values()):
        yield dict(zip(names, values, strict=True))


class _CellResolver:
    """Turns points of a grid into cells; what points share is resolved once."""

    def __init__(
        self,
        experiment: Experiment,
        tasks: Mapping[str, TaskDefaults],
        revisions: RevisionLookup,
        scale: str,
    ) -> None:
        self.experiment = experiment
        self.tasks = tasks
        self.revisions = revisions
        self.scale = scale
        self.axes = experiment.list_axes().keys()
        self.shared: dict[str, _SharedParts] = {}
        self.cache: dict[Hashable, Any] = {}

    def resolve_cell(self, point: dict[str, Any]) -> Cell:
        slow = {key: value for key, value in point.items() if key not in _PER_CELL_FIELDS}
        key = canonical_json(slow)
        if key not in self.shared:
            self.shared[key] = self._resolve_shared(slow)
        shared = self.shared[key]
        fast = {key: point[key] for key in _PER_CELL_FIELDS if key in point}
        values = {**shared.per_cell_defaults, **fast, **shared.method}
        stated = _resolve_listed_terms(shared, values, self.revisions)
        objectives = stated or build_reward_terms(_build_divergence(values), shared.reward, values)
        of_reverse_kl = {"optimizer": shared.reverse_kl_optimizer} if objectives[0].beta == 1 else {}
        source = shared.source or _build_source(values)
        check_terms_learn(objectives, source)
        scores = resolve_teacher_scores(shared.training["teacher_scores"], objectives, source)
        teachers = {"teachers": (shared.training["start"],)} if values["anchor"] == "start" else {}
        training = Training(
            objectives=objectives,
            source=source,
            seed=values["seed"],
            **{**shared.training, **of_reverse_kl, **teachers, "teacher_scores": scores},
        )
        check_layer_terms(training)
        check_tokenizers(training)
        check_not_only_own_start(training)
        check_served_teacher(training)
        check_cached_teacher_placement(training)
        check_classifier_cell(training, shared.evaluations)
        return Cell(self.scale, training, shared.evaluations, point)

    def _resolve_shared(self, point: dict[str, Any]) -> "_SharedParts":
        task = self.tasks[point["task"]]
        stated = self._merge_stated_settings(task, point)
        try:
            defaults = task.get_defaults(self.scale, stated.get("data", {}).get("source"))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        own, reverse_kl = _get_student_settings(defaults, stated)
        settings = Settings.model_validate(
            _scale_schedule(merge_settings(_select_settings(defaults), own, stated), defaults, stated)
        )
        shared = _build_shared_parts(
            task, settings, defaults, self._resolve_evaluations(task, defaults, settings), self
        )
        rates = {name: value for name, value in reverse_kl.items() if name not in stated}
        return replace(shared, reverse_kl_optimizer=build_optimizer_spec(settings.model_copy(update=rates)))

    def resolve_reference_model(
        self, task: TaskDefaults, role: str, settings: Settings, defaults: Mapping[str, Any]
    ) -> SftModel:
        """The teacher or the student that some settings ask for; the same ones give the same one."""
        key = (task.name, role, getattr(settings, role), *_get_fields(settings, REFERENCE_SETTINGS))
        if key not in self.cache:
            data = _apply_data_format(
                self.revisions.resolve_data(task.name, settings.data or DataSettings()), settings.data
            )
            models = {n: ModelSettings.model_validate(m) for n, m in defaults["models"].items()}
            recipe = Settings.model_validate(_select_settings(defaults))
            family = defaults.get("family", task.family)
            self.cache[key] = resolve_sft_model(
                task.name, family, role, settings, recipe, models, data, self.revisions.resolve_model
            )
        return self.cache[key]

    def _merge_stated_settings(self, task: TaskDefaults, point: Mapping[str, Any]) -> dict[str, Any]:
        axes: dict[str, Any] = {}
        for axis, value in point.items():
            if axis != "task":
                section, _, name = axis.partition(".")
                axes = merge_settings(axes, {section: {name: value}} if name else {section: value})
        stated = merge_settings(self.experiment.merge_task_settings(task.name), axes)
        for long, short in _SHORTHANDS.items():
            twice = [name for name in short if name in stated or name in self.axes]
            if not isinstance(stated.get(long), str | None) and twice:
                raise ConfigError(f"{long} and {', '.join(twice)} say the same twice; leave one out")
        return stated

    def _resolve_evaluations(
        self, task: TaskDefaults, defaults: Mapping[str, Any], settings: Settings
    ) -> tuple[AnyEvaluation, ...]:
        key = (task.name, settings.data, settings.max_output_tokens)
        if key not in self.cache:
            stated = self.experiment.get_task_evaluations(task.name) or tuple(
                parse_evaluation_settings(e) for e in defaults["evaluations"]
            )
            limit = settings.max_output_tokens
            assert limit is not None, "every scale states max_output_tokens"
            rows = settings.data or DataSettings()
            found = (e for asked in stated for e in resolve_evaluations(asked, task.metrics, limit, rows))
            self.cache[key] = tuple(dict.fromkeys(found))
        return self.cache[key]


_SHORTHANDS = {
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
class _SharedParts:
    """What all cells have in common that differ only in the fast axes."""

    training: dict[str, Any]
    evaluations: tuple[AnyEvaluation, ...]
    per_cell_defaults: dict[str, Any]
    objectives: tuple[TermConfig, ...] | None
    source: Source | None
    method: Mapping[str, Any]
    reward: ResolvedReward | None = None
    reverse_kl_optimizer: OptimizerSpec | None = None


def _build_shared_parts(
    task: TaskDefaults,
    settings: Settings,
    defaults: Mapping[str, Any],
    evaluations: tuple[AnyEvaluation, ...],
    resolver: _CellResolver,
) -> _SharedParts:
    start = resolver.resolve_reference_model(task, "student", settings, defaults)
    more = resolve_extra_teachers(settings.objectives or (), settings.teachers or {})
    training = {
        "task": task.name,
        "teacher": resolver.resolve_reference_model(task, "teacher", settings, defaults),
        "teachers": tuple(
            start
            if name == START_TEACHER
            else resolver.resolve_reference_model(
                task, "teacher", settings.model_copy(update={"teacher": asked}), defaults
            )
            for name, asked in more.items()
        ),
        **resolve_teacher_placements((settings.teacher, *more.values())),
        "start": start,
        "optimizer": build_optimizer_spec(settings),
        "train_rows": _limit_train_rows(settings.train_rows, settings.data),
        "teacher_scores": parse_teacher_scores(settings.teacher_scores),
        **{name: getattr(settings, name) for name in _TRAINING_FIELDS},
    }
    fast = {name: getattr(settings, name) for name in _PER_CELL_FIELDS}
    _check_settings(settings)
    source, method = settings.source, METHODS[settings.method or "gkd"]
    reward = _resolve_reward(settings.reward, resolver.revisions)
    if reward is None and "alpha" in method:
        raise ConfigError(f"method {settings.method} learns from a reward: set `reward`, such as exact_match")
    if isinstance(source, Source):
        said = source.model_dump(exclude_none=True)
        source = _build_source({"temperature": settings.temperature, **said})
        return _SharedParts(training, evaluations, fast, settings.objectives, source, method, reward)
    if source == "teacher":
        method = {**method, "text": TeacherText()}
    return _SharedParts(training, evaluations, fast, settings.objectives, None, method, reward)


def _limit_train_rows(rows: int | None, data: DataSettings | None) -> int | None:
    """None where it is all there are."""
    there = None if data is None else data.train
    return None if rows is None or (there is not None and rows >= there) else rows


_NON_SETTING_KEYS = ("models", "evaluations", "family", "per_student")


def _get_student_settings(
    defaults: Mapping[str, Any], stated: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the scale sets for the chosen student alone, and besides when it learns by reverse KL."""
    student = stated.get("student", defaults["student"])
    own = dict(defaults.get("per_student", {}).get(student, {})) if isinstance(student, str) else {}
    return own, own.pop("reverse_kl", {})


def _apply_data_format(data: DataSpec, settings: DataSettings | None) -> DataSpec:
    """The rows in the form that is asked for, whatever their source."""
    asked = settings or DataSettings()
    form = {"shots": asked.shots or 0, "calculator_marks": asked.calculator_marks or False}
    return DataSpec(**{**data.model_dump(), **form})


def _select_settings(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in defaults.items() if name not in _NON_SETTING_KEYS}


def _scale_schedule(
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


def _check_settings(settings: Settings) -> None:
    """What can be said but not be done."""
    check_schedule(build_optimizer_spec(settings), settings.steps or 0, "")
    check_vocab_sizes(settings)


def _get_fields(settings: Settings, names: Iterable[str]) -> list[Any]:
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


def _build_divergence(values: Mapping[str, Any]) -> ResolvedTerm:
    """The defaults of `ResolvedDivergence` stand for what neither the experiment nor the task's scale says."""
    if values.get("type") == "cross_entropy":
        return CrossEntropyConfig()
    stated = {
        "divergence": values["divergence"],
        "beta": values["beta"],
        "rescale": values["rescale_divergence"],
        "teacher_temperature": values["teacher_temperature"],
        "student_temperature": values["student_temperature"],
    }
    return ResolvedDivergence(**{name: value for name, value in stated.items() if value is not None})


def _build_source(values: Mapping[str, Any]) -> Source:
    lmbda = values["lmbda"]
    return Source(
        lmbda=lmbda,
        temperature=values["temperature"] if lmbda > 0 else None,
        text=values.get("text") if lmbda < 1 else None,
    )


def _resolve_listed_terms(
    shared: _SharedParts, values: Mapping[str, Any], revisions: RevisionLookup
) -> tuple[ResolvedTerm, ...]:
    """What is stated as a list, its divergences with the temperatures that hold besides."""
    number = number_teachers(shared.objectives or ())
    return tuple(_resolve_term(one, values, number, revisions) for one in shared.objectives or ())


def _resolve_term(
    term: TermConfig, values: Mapping[str, Any], number: Mapping[str, int], revisions: RevisionLookup
) -> ResolvedTerm:
    if isinstance(term, DivergenceConfig):
        return term.resolve(values, number)
    return resolve_reward(term, revisions.resolve_model) if isinstance(term, RewardConfig) else term


def _resolve_reward(stated: str | RewardFields | None, revisions: RevisionLookup) -> ResolvedReward | None:
    """A name is short for a reward with the default baseline."""
    if stated is None:
        return None
    fields = {"name": stated} if isinstance(stated, str) else stated.model_dump()
    return resolve_reward(RewardConfig(**fields), revisions.resolve_model)
