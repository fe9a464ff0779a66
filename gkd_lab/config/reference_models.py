"""Teachers and starting students, as an experiment asks for them: by name, or by their fields."""

from collections.abc import Iterable, Mapping
from typing import Any

from gkd_lab.config.cell import DataSpec, Family, ModelSpec, OptimizerSpec, SftModel, SftSpec
from gkd_lab.config.errors import SpecError, unknown
from gkd_lab.config.offline_teachers import OF_SERVER, Finds, served
from gkd_lab.config.settings import ModelSettings, Settings, merge
from gkd_lab.config.tokenizer_checks import tokenizer_of

OF_TEACHING = ("dtype", "parked")
"""Fields of a teacher that say how its weights are held while it teaches, not what it is."""


def optimizer_of(settings: Settings) -> OptimizerSpec:
    """Of the settings; a schedule need not fit into their steps."""
    return OptimizerSpec(
        name=settings.optimizer,  # type: ignore[arg-type]  # a None is refused by the model
        **{name: getattr(settings, name) for name in _OF_OPTIMIZER},
    )


_OF_OPTIMIZER = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "cooldown_steps",
)
READ = (
    "data",
    "tokenizer",
    "teacher_tokenizer",
    "max_input_tokens",
    "max_output_tokens",
    "precision",
)
"""What a teacher or a starting student takes from the settings besides its own description."""


def sft_model(
    task: str,
    family: Family,
    role: str,
    settings: Settings,
    recipe: Settings,
    models: Mapping[str, ModelSettings],
    data: DataSpec,
    find: Finds,
) -> SftModel:
    """The model that `settings` ask for in a role, "teacher" or "student". Raises SpecError.

    recipe: The scale's own settings: what an experiment changes of the distillation leaves the models that it
        starts from as they are. models: Those of the scale, by name.
    """
    name, model = _named(role, getattr(settings, role), models)
    return SftModel(
        task=task,
        family=family,
        data=data,
        tokenizer=tokenizer_of(role, settings),
        model=_model(role, name, model, find),
        sft=_sft(model, recipe),
        dropout=recipe.dropout,  # type: ignore[arg-type]
        max_input_tokens=settings.max_input_tokens,  # type: ignore[arg-type]
        max_output_tokens=settings.max_output_tokens,  # type: ignore[arg-type]
        precision="fp32" if settings.precision == "bf16" else settings.precision,  # type: ignore[arg-type]
    )


def _named(
    role: str, asked: str | ModelSettings, models: Mapping[str, ModelSettings]
) -> tuple[str, ModelSettings]:
    """What a model is called, and all of its fields."""
    if isinstance(asked, str):
        if asked in models:
            return asked, models[asked]
        if not ("/" in asked or asked.startswith((".", "~", "pypi:"))):
            raise unknown(role, asked, models)
        return asked.rstrip("/").rsplit("/", 1)[-1], ModelSettings(pretrained=asked)
    stated = asked.model_dump(exclude_none=True, exclude={"size"})
    if role != "teacher" and not stated.keys().isdisjoint(OF_TEACHING):
        name = min(stated.keys() & set(OF_TEACHING))
        raise SpecError(
            f"{role}.{name}: says how a teacher's weights are held; leave it out, or set it for a teacher"
        )
    if asked.size is None:
        return "custom", asked
    if asked.size not in models:
        raise unknown(f"{role}.size", asked.size, models)
    whole = merge(models[asked.size].model_dump(exclude_none=True), stated)
    return asked.size if stated.keys() <= set(OF_TEACHING) else "custom", ModelSettings(**whole)


def held(teachers: Iterable[str | ModelSettings | None]) -> dict[str, Any]:
    """Fields of a training that say how its teachers' weights are held while they teach."""
    asked = [one if isinstance(one, ModelSettings) else ModelSettings() for one in teachers]
    dtypes, parked = tuple(one.dtype for one in asked), tuple(bool(one.parked) for one in asked)
    return {"teacher_dtypes": dtypes if any(dtypes) else (), "parked": parked if any(parked) else ()}


def _model(role: str, name: str, model: ModelSettings, find: Finds) -> ModelSpec:
    if model.server is not None:
        return served(role, model, find)
    for field in OF_SERVER:
        if getattr(model, field) is not None:
            raise SpecError(
                f"{role}.{field}: is of a teacher behind a server; give `server` too, or leave it out"
            )
    if model.pretrained is not None:
        hub, path, revision = find(model.pretrained)
        return ModelSpec(
            name=name, pretrained=hub, path=path, revision=revision, keep_layers=model.keep_layers
        )
    if model.keep_layers is not None:
        raise SpecError(f"model {name!r}: keep_layers is for a model that is loaded: give `pretrained`")
    architecture = model.architecture()
    if architecture is None:
        raise SpecError(
            f"model {name!r}: give layers, width and heads to make one, `pretrained` to load one, or "
            "`size`, a model of the scale"
        )
    if architecture.width % architecture.heads:
        raise SpecError(
            f"model {name!r}: width {architecture.width} is not a multiple of heads {architecture.heads}"
        )
    return ModelSpec(name=name, architecture=architecture, init_seed=model.init_seed or 0)


def _sft(model: ModelSettings, settings: Settings) -> SftSpec | None:
    """The model's own recipe; what it leaves out is the scale's default for the distillation."""
    sft = model.sft
    if sft is None or not sft.steps:
        return None
    optimizer = optimizer_of(settings)
    stated = sft.model_dump(exclude_none=True)
    share = sft.steps / (settings.steps or sft.steps)
    kept = {name: int(getattr(optimizer, name) * share) for name in ("warmup_steps", "cooldown_steps")}
    changes = {name: stated[name] for name in _OF_OPTIMIZER if name in stated}
    name = stated.get("optimizer", optimizer.name)
    own = OptimizerSpec(**{**optimizer.model_dump(), **kept, **changes, "name": name})
    check_schedule(own, sft.steps, "sft: ")
    return SftSpec(
        steps=sft.steps,
        batch_size=sft.batch_size or settings.batch_size,  # type: ignore[arg-type]
        seed=sft.seed or 0,
        optimizer=own,
    )


def check_schedule(optimizer: OptimizerSpec, steps: int, where: str) -> None:
    """Raises SpecError, which begins with `where`, for a warm-up and a cool-down longer than the steps."""
    needed = optimizer.warmup_steps + optimizer.cooldown_steps
    if needed > steps:
        raise SpecError(
            f"{where}warmup_steps {optimizer.warmup_steps} and cooldown_steps {optimizer.cooldown_steps} "
            f"do not fit into {steps} steps"
        )
