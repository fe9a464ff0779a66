"""Teachers and starting students, as an experiment asks for them: by name, or by their fields."""

from collections.abc import Iterable, Mapping
from typing import Any

from gkd_lab.config.artifact_specs import DataSpec, Family, ModelSpec, OptimizerSpec, SftModel, SftSpec
from gkd_lab.config.errors import ConfigError, build_unknown_name_error
from gkd_lab.config.offline_teachers import SERVER_FIELDS, ModelFinder, resolve_served_teacher
from gkd_lab.config.settings import ModelSettings, Settings, merge_settings
from gkd_lab.config.tokenizer_checks import resolve_tokenizer

PLACEMENT_FIELDS = ("dtype", "parked")
"""Fields of a teacher that say how its weights are held while it teaches, not what it is."""


def build_optimizer_spec(settings: Settings) -> OptimizerSpec:
    """Of the settings; a schedule need not fit into their steps."""
    return OptimizerSpec(
        name=settings.optimizer,  # type: ignore[arg-type]  # a None is refused by the model
        **{name: getattr(settings, name) for name in _OPTIMIZER_FIELDS},
    )


_OPTIMIZER_FIELDS = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "cooldown_steps",
)
REFERENCE_SETTINGS = (
    "data",
    "tokenizer",
    "teacher_tokenizer",
    "max_input_tokens",
    "max_output_tokens",
    "precision",
)
"""What a teacher or a starting student takes from the settings besides its own description."""


def resolve_sft_model(
    task: str,
    family: Family,
    role: str,
    settings: Settings,
    scale_settings: Settings,
    models: Mapping[str, ModelSettings],
    data: DataSpec,
    find_model: ModelFinder,
) -> SftModel:
    """The model that `settings` ask for in a role, "teacher" or "student". Raises SpecError.

    recipe: The scale's own settings: what an experiment changes of the distillation leaves the models that it
        starts from as they are. models: Those of the scale, by name.
    """
    name, model = _look_up_model(role, getattr(settings, role), models)
    return SftModel(
        task=task,
        family=family,
        data=data,
        tokenizer=resolve_tokenizer(role, settings),
        model=_resolve_model_spec(role, name, model, find_model),
        sft=_resolve_sft_spec(model, scale_settings),
        dropout=scale_settings.dropout,  # type: ignore[arg-type]
        max_input_tokens=settings.max_input_tokens,  # type: ignore[arg-type]
        max_output_tokens=settings.max_output_tokens,  # type: ignore[arg-type]
        precision="fp32" if settings.precision == "bf16" else settings.precision,  # type: ignore[arg-type]
    )


def _look_up_model(
    role: str, stated_model: str | ModelSettings, models: Mapping[str, ModelSettings]
) -> tuple[str, ModelSettings]:
    """What a model is called, and all of its fields."""
    if isinstance(stated_model, str):
        if stated_model in models:
            return stated_model, models[stated_model]
        if not ("/" in stated_model or stated_model.startswith((".", "~", "pypi:"))):
            raise build_unknown_name_error(role, stated_model, models)
        return stated_model.rstrip("/").rsplit("/", 1)[-1], ModelSettings(pretrained=stated_model)
    stated = stated_model.model_dump(exclude_none=True, exclude={"size"})
    if role != "teacher" and not stated.keys().isdisjoint(PLACEMENT_FIELDS):
        name = min(stated.keys() & set(PLACEMENT_FIELDS))
        raise ConfigError(
            f"{role}.{name}: says how a teacher's weights are held; leave it out, or set it for a teacher"
        )
    if stated_model.size is None:
        return "custom", stated_model
    if stated_model.size not in models:
        raise build_unknown_name_error(f"{role}.size", stated_model.size, models)
    whole = merge_settings(models[stated_model.size].model_dump(exclude_none=True), stated)
    return stated_model.size if stated.keys() <= set(PLACEMENT_FIELDS) else "custom", ModelSettings(**whole)


def resolve_teacher_placements(teachers: Iterable[str | ModelSettings | None]) -> dict[str, Any]:
    """Fields of a training that say how its teachers' weights are held while they teach."""
    asked = [one if isinstance(one, ModelSettings) else ModelSettings() for one in teachers]
    dtypes, parked = tuple(one.dtype for one in asked), tuple(bool(one.parked) for one in asked)
    return {"teacher_dtypes": dtypes if any(dtypes) else (), "parked": parked if any(parked) else ()}


def _resolve_model_spec(role: str, name: str, model: ModelSettings, find_model: ModelFinder) -> ModelSpec:
    if model.server is not None:
        return resolve_served_teacher(role, model, find_model)
    for field in SERVER_FIELDS:
        if getattr(model, field) is not None:
            raise ConfigError(
                f"{role}.{field}: is of a teacher behind a server; give `server` too, or leave it out"
            )
    if model.pretrained is not None:
        hub, path, revision = find_model(model.pretrained)
        return ModelSpec(
            name=name, pretrained=hub, path=path, revision=revision, keep_layers=model.keep_layers
        )
    if model.keep_layers is not None:
        raise ConfigError(f"model {name!r}: keep_layers is for a model that is loaded: give `pretrained`")
    architecture = model.build_architecture()
    if architecture is None:
        raise ConfigError(
            f"model {name!r}: give layers, width and heads to make one, `pretrained` to load one, or "
            "`size`, a model of the scale"
        )
    if architecture.width % architecture.heads:
        raise ConfigError(
            f"model {name!r}: width {architecture.width} is not a multiple of heads {architecture.heads}"
        )
    return ModelSpec(name=name, architecture=architecture, init_seed=model.init_seed or 0)


def _resolve_sft_spec(model: ModelSettings, settings: Settings) -> SftSpec | None:
    """The model's own recipe; what it leaves out is the scale's default for the distillation."""
    sft = model.sft
    if sft is None or not sft.steps:
        return None
    optimizer = build_optimizer_spec(settings)
    stated = sft.model_dump(exclude_none=True)
    share = sft.steps / (settings.steps or sft.steps)
    kept = {name: int(getattr(optimizer, name) * share) for name in ("warmup_steps", "cooldown_steps")}
    changes = {name: stated[name] for name in _OPTIMIZER_FIELDS if name in stated}
    name = stated.get("optimizer", optimizer.name)
    own = OptimizerSpec(**{**optimizer.model_dump(), **kept, **changes, "name": name})
    check_schedule(own, sft.steps, "sft: ")
    return SftSpec(
        steps=sft.steps,
        batch_size=sft.batch_size or settings.batch_size,  # type: ignore[arg-type]
        seed=sft.seed or 0,
        optimizer=own,
    )


def check_schedule(optimizer: OptimizerSpec, steps: int, prefix: str) -> None:
    """Raises SpecError, which begins with `where`, for a warm-up and a cool-down longer than the steps."""
    needed = optimizer.warmup_steps + optimizer.cooldown_steps
    if needed > steps:
        raise ConfigError(
            f"{prefix}warmup_steps {optimizer.warmup_steps} and cooldown_steps {optimizer.cooldown_steps} "
            f"do not fit into {steps} steps"
        )
