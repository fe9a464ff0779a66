"""Names of rewards: a built-in one, or a user's function by its import path. No torch.

A function is imported when a run begins, and only the one that the user names; its module's content is part
of a cell's identity, and is read without importing anything.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gkd_lab.config.errors import ConfigError, suggest_choices

RewardFunction = Callable[[list[str], list[str], list[str]], list[float]]
"""(prompts, the student's completions, references) -> a reward for each, larger is better."""

ENTAILMENT = "entailment"
BUILT_IN_REWARDS = ("exact_match", "rouge2", "rougeL", ENTAILMENT)
"""Rewards of this package, each from 0 to 1."""

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def check_reward_name(name: str) -> None:
    """Raise ConfigError for a name that is neither built in nor of the form `package.module:function`."""
    if name not in BUILT_IN_REWARDS and not _IMPORT_PATH.fullmatch(name):
        raise ConfigError(
            f"unknown reward {name!r}; {suggest_choices(name, BUILT_IN_REWARDS)}, or a function's import "
            "path such as my_package.rewards:brevity"
        )


def check_reward_model(name: str, model: object) -> None:
    """Raise ConfigError if `entailment` has no model, or another reward has one."""
    if name == ENTAILMENT and model is None:
        raise ConfigError(
            "reward 'entailment' asks a sequence-classification model: give `model`, a checkpoint folder or "
            "a hub name"
        )
    if name != ENTAILMENT and model is not None:
        raise ConfigError(f"reward {name!r} reads no model, got {model!r}: leave `model` out")


def check_reward_baseline(baseline: str, normalize: bool) -> None:
    """Raise ConfigError for `normalize` with the baseline 'none'."""
    if normalize and baseline == "none":
        raise ConfigError(
            "a reward's `normalize` divides by how far rewards lie from their mean, which baseline 'none' "
            "leaves in: take baseline 'leave_one_out', or normalize: false"
        )


def check_reward_sampling(lmbda: float, temperature: float | None) -> None:
    """Raise ConfigError if lmbda is 0 (the student writes nothing), or the temperature is not 1."""
    if lmbda == 0:
        raise ConfigError(
            "a reward is of what the student writes, and with lmbda 0 it writes nothing: set lmbda to 1, or "
            "leave the reward out"
        )
    if temperature != 1:
        raise ConfigError(
            f"a reward's gradient is that of the text which the student samples at temperature 1 (Eq. 5), "
            f"got temperature {temperature}: set it to 1"
        )


def format_off_policy_message(lmbda: float) -> str:
    """Return the error message for a reward as the only loss term where lmbda is below 1."""
    return (
        f"lmbda {lmbda:g} takes the other steps from the data, of which a reward teaches nothing: set lmbda "
        "to 1, or add a divergence or cross_entropy"
    )


def hash_reward_module(name: str) -> str | None:
    """Return the SHA-256 of a reward function's source file, not imported; None for built-in rewards.

    Raises ConfigError for a missing module.
    """
    if name in BUILT_IN_REWARDS:
        return None
    module = name.partition(":")[0]
    file = _find_module_file(module)
    if file is None:
        raise _build_missing_module_error(name, module)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def import_reward(name: str) -> RewardFunction:
    """Import and return the function at `package.module:function`. ConfigError: missing, broken."""
    module, _, attributes = name.partition(":")
    _add_current_folder_to_path()
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise _build_missing_module_error(name, error.name) from error
        raise _build_import_failure_error(name, module, error) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything, and may call exit()
        raise _build_import_failure_error(name, module, error) from error
    for part in attributes.split("."):
        if not hasattr(value, part):
            suggestion = suggest_choices(part, _list_public_names(value))
            raise ConfigError(f"reward {name!r}: {module} has no {part!r}; {suggestion}")
        value = getattr(value, part)
    if not callable(value):
        raise ConfigError(f"reward {name!r} is a {type(value).__name__}, not a function")
    function: RewardFunction = value
    return function


def _find_module_file(module: str) -> Path | None:
    """Return a module's source file as an import would find it, importing nothing; None if not found."""
    first, *rest = module.split(".")
    _add_current_folder_to_path()
    loaded = sys.modules.get(first)
    origin = getattr(loaded, "__file__", None) if loaded else None
    if loaded is None:
        spec = importlib.util.find_spec(first)
        origin = None if spec is None else spec.origin
        folders: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    else:
        folders = getattr(loaded, "__path__", ())
    if not rest:
        return Path(origin) if origin is not None and Path(origin).is_file() else None
    stems = [Path(folder).joinpath(*rest) for folder in folders]
    files = [file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")]
    return next(filter(Path.is_file, files), None)


def _add_current_folder_to_path() -> None:
    """Append the current folder to sys.path unless it is there: installed modules come first."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))


def _list_public_names(owner: Any) -> list[str]:
    """Return the attribute names of a module or class that have no leading underscore."""
    return [name for name in vars(owner) if not name.startswith("_")] if hasattr(owner, "__dict__") else []


def _build_missing_module_error(name: str, module: str) -> ConfigError:
    """Return (not raise) the ConfigError for a reward whose module is not found."""
    return ConfigError(
        f"reward {name!r}: there is no module {module!r} among the installed ones and in {Path.cwd()}; "
        f"built-in rewards: {', '.join(BUILT_IN_REWARDS)}"
    )


def _build_import_failure_error(name: str, module: str, error: BaseException) -> ConfigError:
    """Return (not raise) the ConfigError for a reward whose module raised `error` on import."""
    return ConfigError(f"reward {name!r}: importing {module} raised {type(error).__name__}: {error}")
