"""Resolve a point of a grid to a cell.

Settings come from the task's defaults at a scale, the experiment file and the point; later ones win.
Shorthand (`lmbda`, `beta`, `method`, `reward`, ...) becomes loss terms and a source.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gkd_lab.config.artifact_specs import (
    CLASSIFIER_FAMILIES,
    DataSpec,
    Family,
    FindModel,
    OptimizerSpec,
    SftModel,
    TeacherText,
)
from gkd_lab.config.cell import AnyEvaluation, Cell, Selection, Source, Training
from gkd_lab.config.cell_checks import check_cell
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.evaluation_settings import (
    AnyEvaluationSettings,
    parse_evaluation_settings,
    resolve_evaluations,
)
from gkd_lab.config.experiment import ExperimentFile
from gkd_lab.config.fingerprint import canonical_json
from gkd_lab.config.loss_terms import (
    CrossEntropyConfig,
    DivergenceConfig,
    ResolvedDivergence,
    ResolvedReward,
    ResolvedTerm,
    RewardConfig,
    TermConfig,
)
from gkd_lab.config.reference_models import (
    REFERENCE_SETTINGS,
    build_optimizer_spec,
    check_schedule,
    check_vocab_sizes,
    resolve_lora,
    resolve_sft_model,
)
from gkd_lab.config.reward_objectives import build_reward_terms, resolve_reward
from gkd_lab.config.settings import METHODS, DataSettings, Settings
from gkd_lab.config.settings_layers import (
    MergedLayers,
    TaskDefaults,
    list_models,
    merge_layers,
    select_settings,
)
from gkd_lab.config.teacher_settings import (
    START_TEACHER,
    drop_unused_scores,
    number_teachers,
    parse_teacher_scores,
    resolve_extra_teachers,
    resolve_teacher_placements,
)
from gkd_lab.config.trl_cells import resolve_implementation

PER_CELL_FIELDS = (
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
"""Settings that are resolved for each cell. All others are resolved once per combination of their values."""

TRAINING_FIELDS = (
    "loss_normalization",
    "steps",
    "batch_size",
    "dropout",
    "max_input_tokens",
    "max_output_tokens",
    "precision",
)
"""Fields of a training that are settings of the same name."""


EvaluationEntries = Mapping[AnyEvaluation, tuple[int, AnyEvaluationSettings]]
"""Evaluation -> (number of the entry that it was resolved from, the entry), in order."""


@dataclass(frozen=True)
class RevisionLookup:
    """Functions that identify data and models by their content: a hash, a commit or a version."""

    resolve_data: Callable[[str, DataSettings], DataSpec]
    """(task, settings) -> spec."""
    resolve_model: FindModel


@dataclass(frozen=True)
class SharedParts:
    """Resolved parts that all cells have in common that differ only in `PER_CELL_FIELDS`."""

    merged: MergedLayers
    """What `settings` was validated from, with the source of each value."""
    training_fields: dict[str, Any]
    evaluations: tuple[AnyEvaluation, ...]
    evaluation_entries: EvaluationEntries
    settings: Settings
    method: Mapping[str, Any]
    source: Source | None
    reward: ResolvedReward | None
    reverse_kl_optimizer: OptimizerSpec
    resolve_start: Callable[[int], SftModel] | None
    """Cell's seed -> its SFT student; None where the seed does not matter to it."""


class CellResolver:
    """Resolves the points of one grid to cells, and caches the parts that points share."""

    def __init__(
        self,
        experiment: ExperimentFile,
        tasks: Mapping[str, TaskDefaults],
        revisions: RevisionLookup,
        scale: str,
    ) -> None:
        self.experiment = experiment
        self.tasks = tasks
        self.revisions = revisions
        self.scale = scale
        self.shared_parts: dict[str, SharedParts] = {}
        self.models: dict[Hashable, SftModel] = {}
        self.evaluations: dict[Hashable, EvaluationEntries] = {}

    def resolve_cell(self, point: dict[str, Any]) -> Cell:
        """Return the resolved and checked cell of a point (axis name -> value). Raises ConfigError."""
        shared = self.resolve_shared_parts(point)
        defaults = {name: getattr(shared.settings, name) for name in PER_CELL_FIELDS}
        axis_values = {name: point[name] for name in PER_CELL_FIELDS if name in point}
        values = {**defaults, **axis_values, **shared.method}
        terms = self._resolve_terms(shared, values)
        fields = dict(shared.training_fields)
        fields["teacher_scores"] = drop_unused_scores(fields["teacher_scores"], terms)
        if terms[0].beta == 1:
            fields["optimizer"] = shared.reverse_kl_optimizer
        if values["anchor"] == START_TEACHER:
            fields["teachers"] = (fields["start"],)
        if shared.resolve_start is not None:
            start = shared.resolve_start(values["seed"])
            fields["teachers"] = tuple(start if t == fields["start"] else t for t in fields["teachers"])
            fields["start"] = start
        source = shared.source or _build_source(values)
        training = Training(**fields, objectives=terms, source=source, seed=values["seed"])
        check_cell(training, shared.evaluations)
        return Cell(self.scale, training, shared.evaluations, point)

    def resolve_shared_parts(self, point: Mapping[str, Any]) -> SharedParts:
        """Return a point's parts that do not depend on `PER_CELL_FIELDS`, cached by the other values."""
        axis_values = {name: value for name, value in point.items() if name not in PER_CELL_FIELDS}
        key = canonical_json(axis_values)
        if key not in self.shared_parts:
            self.shared_parts[key] = self._build_shared_parts(axis_values)
        return self.shared_parts[key]

    def _build_shared_parts(self, axis_values: Mapping[str, Any]) -> SharedParts:
        """Return the parts resolved from task defaults, experiment and axes, later wins."""
        task = self.tasks[axis_values["task"]]
        merged = merge_layers(self.experiment, task, self.scale, axis_values)
        stated, defaults = merged.stated.values, merged.defaults.values
        settings = Settings.model_validate(merged.settings.values)
        check_schedule(build_optimizer_spec(settings), settings.steps or 0)
        check_vocab_sizes(settings)
        method, source = _resolve_method(settings)
        evaluation_entries = self._resolve_evaluations(task, defaults, settings)
        return SharedParts(
            merged=merged,
            training_fields={
                **self._build_training_fields(task, settings, defaults),
                **resolve_implementation(settings, stated),
            },
            evaluations=tuple(evaluation_entries),
            evaluation_entries=evaluation_entries,
            settings=settings,
            method=method,
            source=source,
            reward=self._resolve_single_reward(settings, method),
            reverse_kl_optimizer=build_optimizer_spec(settings.model_copy(update=merged.reverse_kl)),
            resolve_start=self._build_start_resolver(task, settings, defaults),
        )

    def _build_training_fields(
        self, task: TaskDefaults, settings: Settings, defaults: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return Training field -> value for the fields that do not depend on `PER_CELL_FIELDS`."""
        sft_student = self._resolve_model(task, "student", settings, defaults)
        extra_teachers = resolve_extra_teachers(settings.objectives or (), settings.teachers or {})
        teachers = [
            sft_student
            if name == START_TEACHER
            else self._resolve_model(
                task, "teacher", settings.model_copy(update={"teacher": teacher}), defaults
            )
            for name, teacher in extra_teachers.items()
        ]
        return {
            "task": task.name,
            "teacher": self._resolve_model(task, "teacher", settings, defaults),
            "teachers": tuple(teachers),
            **resolve_teacher_placements((settings.teacher, *extra_teachers.values())),
            "start": sft_student,
            "lora": resolve_lora(
                settings,
                Settings.model_validate(select_settings(defaults)),
                list_models("student", defaults),
            ),
            "optimizer": build_optimizer_spec(settings),
            "train_rows": _limit_train_rows(settings, sft_student),
            "selection": _build_selection(settings, self._get_metrics(task)),
            "teacher_scores": parse_teacher_scores(settings.teacher_scores),
            "tf32": bool(settings.tf32) and settings.precision != "fp64",  # float64 has no such products
            **{name: getattr(settings, name) for name in TRAINING_FIELDS},
        }

    def _build_start_resolver(
        self, task: TaskDefaults, settings: Settings, defaults: Mapping[str, Any]
    ) -> Callable[[int], SftModel] | None:
        """Return a function from a cell's seed to its SFT student; None if all seeds have the same one."""

        def resolve_start(seed: int) -> SftModel:
            return self._resolve_model(task, "student", settings, defaults, seed)

        return None if resolve_start(0) == resolve_start(1) else resolve_start

    def _resolve_model(
        self, task: TaskDefaults, role: str, settings: Settings, defaults: Mapping[str, Any], seed: int = 0
    ) -> SftModel:
        """Return the SftModel of a role, "teacher" or "student"; equal inputs give the same object.

        seed: That of the cell, which a student's weights and SFT may take.
        """
        inputs = (getattr(settings, name) for name in (role, *REFERENCE_SETTINGS))
        key = (task.name, role, *inputs, seed)
        if key not in self.models:
            data_settings = settings.data or DataSettings()
            data = self.revisions.resolve_data(task.name, data_settings)
            self.models[key] = resolve_sft_model(
                task.name,
                _choose_family(task, settings),
                role,
                settings,
                scale_settings=Settings.model_validate(select_settings(defaults)),
                models=list_models(role, defaults),
                data=_apply_data_format(data, data_settings),
                find_model=self.revisions.resolve_model,
                cell_seed=seed if role == "student" else None,
            )
        return self.models[key]

    def _resolve_evaluations(
        self, task: TaskDefaults, defaults: Mapping[str, Any], settings: Settings
    ) -> EvaluationEntries:
        """Return the experiment's distinct evaluations for a task, or else the task's defaults; cached.

        With `eval_every` the defaults are also those of the checkpoint that it selects.
        """
        key = (task.name, settings.data, settings.max_output_tokens, settings.eval_every is None)
        if key not in self.evaluations:
            checkpoints = ("last",) if settings.eval_every is None else ("last", "best")
            stated = self.experiment.get_task_evaluations(task.name, self.scale) or tuple(
                parse_evaluation_settings(values if "lm_eval" in values else {**values, "checkpoint": name})
                for values in defaults["evaluations"]
                for name in checkpoints
            )
            max_output_tokens = settings.max_output_tokens
            assert max_output_tokens is not None, "every scale states max_output_tokens"
            data, metrics = settings.data or DataSettings(), self._get_metrics(task)
            entries: dict[AnyEvaluation, tuple[int, AnyEvaluationSettings]] = {}
            for number, entry in enumerate(stated):
                for evaluation in resolve_evaluations(entry, metrics, max_output_tokens, data):
                    entries.setdefault(evaluation, (number, entry))
            self.evaluations[key] = entries
        return self.evaluations[key]

    def _get_metrics(self, task: TaskDefaults) -> tuple[str, ...]:
        """Return the metrics that the experiment states for a task, or else the task's own."""
        return self.experiment.get_task_metrics(task.name, self.scale) or task.metrics

    def _resolve_single_reward(self, settings: Settings, method: Mapping[str, Any]) -> ResolvedReward | None:
        """Return the reward of the shorthand `reward`, or None; ConfigError if the method needs one."""
        if settings.reward is None:
            if "alpha" in method:
                raise ConfigError(
                    f"method {settings.method} needs a reward: set `reward`, such as exact_match"
                )
            return None
        is_name = isinstance(settings.reward, str)
        fields = {"name": settings.reward} if is_name else settings.reward.model_dump()  # type: ignore[union-attr]
        return resolve_reward(RewardConfig(**fields), self.revisions.resolve_model)

    def _resolve_terms(self, shared: SharedParts, values: Mapping[str, Any]) -> tuple[ResolvedTerm, ...]:
        """Return a cell's loss terms: `objectives` if stated, else what the shorthand `values` stand for."""
        listed = shared.settings.objectives
        if listed is None:
            return build_reward_terms(_build_shorthand_term(values), shared.reward, values)
        teacher_numbers = number_teachers(listed)
        return tuple(self._resolve_term(term, values, teacher_numbers) for term in listed)

    def _resolve_term(
        self, term: TermConfig, values: Mapping[str, Any], teacher_numbers: Mapping[str | int, int]
    ) -> ResolvedTerm:
        """Return one listed loss term with temperatures, teacher numbers and reward hashes filled in."""
        if isinstance(term, DivergenceConfig):
            return term.resolve(values, teacher_numbers)
        if isinstance(term, RewardConfig):
            return resolve_reward(term, self.revisions.resolve_model)
        return term


def _choose_family(task: TaskDefaults, settings: Settings) -> Family:
    """Return the family of a task's models; ConfigError if `family` is set for a task of classifiers."""
    if settings.family is not None and task.family in CLASSIFIER_FAMILIES:
        raise ConfigError(f"family: models of {task.name} are for {task.family}; leave it out")
    return settings.family or task.family


def _limit_train_rows(settings: Settings, sft_student: SftModel) -> int | None:
    """Return the rows to distil on: `train_rows`, or else those of the student's SFT; None for all."""
    rows = None if settings.train_rows == "all" else settings.train_rows
    if settings.train_rows is None and sft_student.sft is not None:
        rows = sft_student.sft.rows
    available = None if settings.data is None else settings.data.train
    return None if rows is None or (available is not None and rows >= available) else rows


def _build_selection(settings: Settings, metrics: Sequence[str]) -> Selection | None:
    """Return the selection of a checkpoint by the task's first metric; None without `eval_every`."""
    if settings.eval_every is None:
        if settings.eval_rows is not None:
            raise ConfigError("eval_rows: sets the rows of `eval_every`: give both, or leave it out")
        return None
    return Selection(every=settings.eval_every, rows=settings.eval_rows, metric=metrics[0])


def _apply_data_format(data: DataSpec, settings: DataSettings) -> DataSpec:
    """Return a copy of the data spec with the stated shots and calculator marks; default 0 and False."""
    row_format = {"shots": settings.shots or 0, "calculator_marks": settings.calculator_marks or False}
    return DataSpec(**{**data.model_dump(), **row_format})


def _resolve_method(settings: Settings) -> tuple[Mapping[str, Any], Source | None]:
    """Return (settings that the method fixes, Source if its long form is stated, else None)."""
    method = METHODS[settings.method or "gkd"]
    if isinstance(settings.source, Source):
        stated = settings.source.model_dump(exclude_none=True)
        return method, _build_source({"temperature": settings.temperature, **stated})
    if settings.source == "teacher":
        return {**method, "text": TeacherText()}, None
    return method, None


def _build_source(values: Mapping[str, Any]) -> Source:
    """Return the Source, temperature dropped if lmbda is 0 and teacher text if lmbda is 1."""
    lmbda = values["lmbda"]
    return Source(
        lmbda=lmbda,
        temperature=values["temperature"] if lmbda > 0 else None,
        text=values.get("text") if lmbda < 1 else None,
        corrupted=values.get("corrupted") if lmbda < 1 else None,
    )


def _build_shorthand_term(values: Mapping[str, Any]) -> ResolvedTerm:
    """Return the loss term of the shorthand values: a divergence, or cross-entropy by the method."""
    if values.get("type") == "cross_entropy":
        return CrossEntropyConfig()
    fields = {
        "divergence": values["divergence"],
        "beta": values["beta"],
        "rescale": values["rescale_divergence"],
        "teacher_temperature": values["teacher_temperature"],
        "student_temperature": values["student_temperature"],
    }
    return ResolvedDivergence(**{name: value for name, value in fields.items() if value is not None})
