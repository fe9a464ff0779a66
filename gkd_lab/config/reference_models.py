"""Resolve the teacher and the SFT student of an experiment to specs: from a name, or from fields."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from gkd_lab.config.artifact_specs import (
    DataSpec,
    Family,
    FindModel,
    ModelSpec,
    OptimizerSpec,
    SftModel,
    SftSpec,
    TokenizerSpec,
)
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.lora import LoraSpec
from gkd_lab.config.model_places import build_unknown_model_error, is_model_place
from gkd_lab.config.settings import ModelSettings, Settings, TokenizerSettings, merge_settings

REFERENCE_SETTINGS = (
    "data",
    "family",
    "tokenizer",
    "teacher_tokenizer",
    "max_input_tokens",
    "max_output_tokens",
    "precision",
)
"""Settings that a reference model takes from the experiment besides its own description."""
MIN_BPE_VOCAB_SIZE = 300
"""All bytes, the special tokens and a few merges."""
_PLACEMENT_FIELDS = {"dtype", "parked"}
"""Fields of a teacher that say how its weights are held while it teaches, not what it is."""
_SHARED_SIZE_FIELDS = {"sft", "init_seed", "lora"}
"""Fields in which models of one size may differ."""
_SERVER_FIELDS = ("model", "top_k", "tokenizer", "patience")
"""Fields of a model that need `server`."""
_OPTIMIZER_FIELDS = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "cooldown_steps")


def resolve_sft_model(
    task: str,
    family: Family,
    role: str,
    settings: Settings,
    scale_settings: Settings,
    models: Mapping[str, ModelSettings],
    data: DataSpec,
    find_model: FindModel,
    cell_seed: int | None = None,
) -> SftModel:
    """Return the spec of the model that settings ask for in a role, "teacher" or "student", with its SFT.

    scale_settings: Defaults of the scale. They set dropout and SFT, so that an experiment's changes of the
        distillation leave its reference models unchanged.
    models: Models of the scale, by name.
    cell_seed: Seed that stands for `cell`; None: the model may not ask for it.

    Raises:
        ConfigError: for an unknown model, or fields that do not fit together.
    """
    default_size = getattr(scale_settings, role)
    name, model = _look_up_model(role, getattr(settings, role), models, default_size)
    model = _insert_cell_seed(role, model, cell_seed)
    return SftModel(
        task=task,
        family=family,
        data=data,
        tokenizer=_resolve_tokenizer(role, settings),
        model=_resolve_model_spec(role, name, model, find_model),
        sft=_resolve_sft_spec(model, scale_settings, data.train),
        dropout=scale_settings.dropout,  # type: ignore[arg-type]
        max_input_tokens=settings.max_input_tokens,  # type: ignore[arg-type]
        max_output_tokens=settings.max_output_tokens,  # type: ignore[arg-type]
        precision="fp32" if settings.precision == "bf16" else settings.precision,  # type: ignore[arg-type]
    )


def resolve_lora(
    settings: Settings, scale_settings: Settings, models: Mapping[str, ModelSettings]
) -> LoraSpec | None:
    """Return the adapter of the student, unstated values at their defaults; None: all weights are trained.

    The arguments are those of `resolve_sft_model`.
    """
    _, model = _look_up_model("student", settings.student, models, scale_settings.student)  # type: ignore[arg-type]
    if model.lora is None:
        return None
    stated = model.lora.model_dump(exclude_none=True)
    if isinstance(stated.get("targets"), tuple):
        stated["targets"] = tuple(sorted(set(stated["targets"])))  # their order means nothing
    return LoraSpec(**stated)


def build_optimizer_spec(settings: Settings) -> OptimizerSpec:
    """Return the optimizer of settings; whether its schedule fits into their steps is not checked."""
    return OptimizerSpec(
        name=settings.optimizer,  # type: ignore[arg-type]  # pydantic refuses None
        **{name: getattr(settings, name) for name in _OPTIMIZER_FIELDS},
    )


def check_schedule(optimizer: OptimizerSpec, steps: int, prefix: str = "") -> None:
    """Raise ConfigError, which begins with `prefix`, if warm-up and cool-down are longer than the steps."""
    if optimizer.warmup_steps + optimizer.cooldown_steps > steps:
        raise ConfigError(
            f"{prefix}warmup_steps {optimizer.warmup_steps} and cooldown_steps {optimizer.cooldown_steps} "
            f"do not fit into {steps} steps"
        )


def check_vocab_sizes(settings: Settings) -> None:
    """Raise ConfigError if a `bpe` tokenizer's vocab_size is below 300, too small for all bytes."""
    for name in ("tokenizer", "teacher_tokenizer"):
        tokenizer: TokenizerSettings | None = getattr(settings, name)
        if tokenizer is None or tokenizer.kind != "bpe" or tokenizer.vocab_size is None:
            continue
        if tokenizer.vocab_size < MIN_BPE_VOCAB_SIZE:
            raise ConfigError(
                f"{name}.vocab_size: {tokenizer.vocab_size} is too small for bpe: give at least "
                f"{MIN_BPE_VOCAB_SIZE}"
            )


def _look_up_model(
    role: str,
    stated_model: str | ModelSettings,
    models: Mapping[str, ModelSettings],
    default_size: str | ModelSettings | None,
) -> tuple[str, ModelSettings]:
    """Return (display name, all fields) of a model stated by name, path or fields. Raises ConfigError.

    default_size: The model of the scale that fields of its SFT or seed alone change.
    """
    if isinstance(stated_model, str):
        if stated_model in models:
            return stated_model, models[stated_model]
        if not is_model_place(stated_model):
            raise build_unknown_model_error(role, stated_model, models)
        return stated_model.rstrip("/").rsplit("/", 1)[-1], ModelSettings(pretrained=stated_model)
    fields = stated_model.model_dump(exclude_none=True, exclude={"size"})
    misplaced = fields.keys() & _PLACEMENT_FIELDS
    if role != "teacher" and misplaced:
        raise ConfigError(
            f"{role}.{min(misplaced)}: sets how a teacher's weights are held; leave it out, or set it for a "
            "teacher"
        )
    if role != "student" and "lora" in fields:
        raise ConfigError(f"{role}.lora: an adapter is trained on a student; leave it out of a {role}")
    size = find_size(stated_model, default_size)
    if size is None:
        return "custom", stated_model
    if size not in models and is_model_place(size):
        raise ConfigError(
            f"{role}.size: {size!r} is a folder or hub name, and `size` names a model of the scale: write "
            f"`{role}: {{pretrained: {size}}}` beside the other fields, or `{role}: {size}` alone"
        )
    if size not in models:
        raise build_unknown_model_error(f"{role}.size", size, models)
    merged = merge_settings(models[size].model_dump(exclude_none=True), fields)
    has_same_size = fields.keys() <= _PLACEMENT_FIELDS | _SHARED_SIZE_FIELDS
    return size if has_same_size else "custom", ModelSettings(**merged)


def find_size(model: ModelSettings, default_size: str | ModelSettings | None) -> str | None:
    """Return the name of the scale's model that fields change a part of; None: they are a whole model.

    default_size: The model of the scale that fields of its SFT, seed or adapter alone change.
    """
    fields = model.model_dump(exclude_none=True, exclude={"size"}).keys()
    if model.size is None and fields and fields <= _SHARED_SIZE_FIELDS and isinstance(default_size, str):
        return default_size
    return model.size


def _resolve_tokenizer(role: str, settings: Settings) -> TokenizerSpec:
    """Return the TokenizerSpec of a role: `teacher_tokenizer` for a teacher if set, else `tokenizer`."""
    assert settings.tokenizer is not None, "every scale states a tokenizer"
    stated = settings.teacher_tokenizer if role == "teacher" else None
    if stated is None:
        return TokenizerSpec(**settings.tokenizer.model_dump())
    return TokenizerSpec(**{**stated.model_dump(), "kind": stated.kind or settings.tokenizer.kind})


def _resolve_model_spec(role: str, name: str, model: ModelSettings, find_model: FindModel) -> ModelSpec:
    """Return the ModelSpec of a model that is served, loaded or made from scratch. Raises ConfigError."""
    if model.server is not None:
        return _resolve_served_teacher(role, model, find_model)
    for field in _SERVER_FIELDS:
        if getattr(model, field) is not None:
            raise ConfigError(
                f"{role}.{field}: is for a teacher behind a server; give `server` too, or leave it out"
            )
    if model.pretrained is not None:
        hub, path, revision = find_model(model.pretrained)
        return ModelSpec(
            name=name, pretrained=hub, path=path, revision=revision, keep_layers=model.keep_layers
        )
    if model.keep_layers is not None:
        raise ConfigError(f"model {name!r}: keep_layers is for a loaded model: give `pretrained`")
    architecture = model.build_architecture()
    if architecture is None:
        raise ConfigError(
            f"model {name!r}: give layers, width and heads to make one, `pretrained` to load one, or `size` "
            "for a model of the scale"
        )
    if architecture.width % architecture.heads:
        raise ConfigError(
            f"model {name!r}: width {architecture.width} is not a multiple of heads {architecture.heads}"
        )
    return ModelSpec(name=name, architecture=architecture, init_seed=int(model.init_seed or 0))


def _insert_cell_seed(role: str, model: ModelSettings, cell_seed: int | None) -> ModelSettings:
    """Return a model's settings with its cell's seed for `cell`. ConfigError for a teacher."""
    sft = model.sft
    if "cell" not in (model.init_seed, None if sft is None else sft.seed):
        return model
    if cell_seed is None:
        raise ConfigError(f"{role}: the seed `cell` is for students: cells of all seeds share a {role}")
    if sft is not None and sft.seed == "cell":
        sft = sft.model_copy(update={"seed": cell_seed})
    init_seed = cell_seed if model.init_seed == "cell" else model.init_seed
    return model.model_copy(update={"init_seed": init_seed, "sft": sft})


def _resolve_sft_spec(
    model: ModelSettings, scale_settings: Settings, available_rows: int | None
) -> SftSpec | None:
    """Return a model's fine-tuning, unstated values from the scale's distillation; None without any.

    Rows that are all of the available ones are None.
    """
    sft = model.sft
    if sft is None or not sft.steps:
        return None
    default = build_optimizer_spec(scale_settings)
    # The schedule keeps its share of the steps.
    share = sft.steps / (scale_settings.steps or sft.steps)
    schedule = {name: int(getattr(default, name) * share) for name in ("warmup_steps", "cooldown_steps")}
    stated = sft.model_dump(exclude_none=True)
    changes = {name: stated[name] for name in _OPTIMIZER_FIELDS if name in stated}
    name = stated.get("optimizer", default.name)
    optimizer = OptimizerSpec(**{**default.model_dump(), **schedule, **changes, "name": name})
    check_schedule(optimizer, sft.steps, "sft: ")
    return SftSpec(
        steps=sft.steps,
        batch_size=sft.batch_size or scale_settings.batch_size,  # type: ignore[arg-type]
        seed=int(sft.seed or 0),
        rows=None if available_rows is not None and (sft.rows or 0) >= available_rows else sft.rows,
        optimizer=optimizer,
    )


def _resolve_served_teacher(role: str, model: ModelSettings, find_model: FindModel) -> ModelSpec:
    """Return the ModelSpec of a teacher behind a server. ConfigError: a student or unfit fields."""
    if role != "teacher":
        raise ConfigError("student: a model behind a server cannot be trained: give one that can be loaded")
    other_fields = model.model_dump(exclude_none=True).keys() - {"server", *_SERVER_FIELDS}
    if other_fields:
        raise ConfigError(
            f"teacher.{min(other_fields)}: cannot be set for a teacher behind a server; leave it out, or "
            "`server`"
        )
    if model.model is None or model.top_k is None:
        missing = "model" if model.model is None else "top_k"
        raise ConfigError(
            f"teacher.{missing}: missing; expected {{server: {model.server}, model: NAME, top_k: 20}}, the "
            "model's name on the server and the number of tokens to read of each distribution"
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
    """Return the address unchanged. ConfigError unless it is http(s) and holds no credentials or query."""
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"teacher.server: {server!r} is not an address such as http://127.0.0.1:8000/v1")
    try:
        _ = parts.port
    except ValueError:
        # The value is not repeated: it may be a password.
        raise ConfigError("teacher.server: the port of an address is a number from 0 to 65535") from None
    if parts.username or parts.password or parts.query:
        address = parts.hostname + (f":{parts.port}" if parts.port else "") + parts.path
        raise ConfigError(
            f"teacher.server: an address is written into records, so it must not hold a key: give "
            f"{parts.scheme}://{address}, and the key in the environment variable GKD_LAB_TEACHER_KEY"
        )
    return server
