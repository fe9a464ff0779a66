"""What a reward is called: one of our own by name, or a user's function by its import path. No torch.

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
"""(prompts, texts that the student wrote, the data's completions) -> a reward for each, more is better."""

ENTAILMENT = "entailment"
BUILT_IN_REWARDS = ("exact_match", "rouge2", "rougeL", ENTAILMENT)
"""Rewards of this package, each from 0 to 1."""

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def check_reward_name(name: str) -> None:
    """Raises SpecError for a name that is neither ours nor an import path."""
    if name not in BUILT_IN_REWARDS and not _IMPORT_PATH.fullmatch(name):
        raise ConfigError(
            f"unknown reward {name!r}; {suggest_choices(name, BUILT_IN_REWARDS)}, or a function's import "
            "path such as my_package.rewards:brevity"
        )


def check_reward_model(name: str, model: object) -> None:
    """Raises SpecError where a reward lacks the model that it asks, or is given one that it does not read."""
    if name == ENTAILMENT and model is None:
        raise ConfigError(
            "reward 'entailment' asks a sequence-classification model: give `model`, a checkpoint folder or "
            "a hub name"
        )
    if name != ENTAILMENT and model is not None:
        raise ConfigError(f"reward {name!r} reads no model, got {model!r}: leave `model` out")


def check_reward_baseline(baseline: str, normalize: bool) -> None:
    """Raises SpecError for a baseline that is unknown, or too little for what is asked."""
    if normalize and baseline == "none":
        raise ConfigError(
            "a reward's `normalize` divides by how far rewards lie from their mean, which baseline 'none' "
            "leaves in: take baseline 'leave_one_out', or normalize: false"
        )


def check_reward_sampling(lmbda: float, temperature: float | None) -> None:
    """Raises SpecError where nothing would be rewarded, or a policy gradient would be of another policy."""
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


def off_policy_message(lmbda: float) -> str:
    """Why a reward alone needs lmbda 1."""
    return (
        f"lmbda {lmbda:g} takes the other steps from the data, of which a reward teaches nothing: set lmbda "
        "to 1, or add a divergence or cross_entropy"
    )


def hash_reward_module(name: str) -> str | None:
    """SHA-256 of the module that a function's import path names; None for our own rewards.

    Raises SpecError for a module that is not there.
    """
    if name in BUILT_IN_REWARDS:
        return None
    module = name.partition(":")[0]
    file = _find_module_file(module)
    if file is None:
        raise _missing_module_error(name, module)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def import_reward(name: str) -> RewardFunction:
    """The function at `package.module:function`. Raises SpecError for what is missing or is no function."""
    module, _, place = name.partition(":")
    _add_current_folder_to_path()
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise _missing_module_error(name, error.name) from error
        raise _import_failure_error(name, module, error) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything, and may call exit()
        raise _import_failure_error(name, module, error) from error
    for part in place.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"reward {name!r}: {module} has no {part!r}; {suggest_choices(part, _public_names(found))}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"reward {name!r} is a {type(found).__name__}, not a function")
    rule: RewardFunction = found
    return rule


def _find_module_file(module: str) -> Path | None:
    """Where a module's source lies, found as an import would find it, without importing its packages."""
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
        return None if origin is None else _existing_file(Path(origin))
    places = [Path(folder).joinpath(*rest) for folder in folders]
    found = [
        _existing_file(path) for place in places for path in (place.with_suffix(".py"), place / "__init__.py")
    ]
    return next(filter(None, found), None)


def _existing_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _add_current_folder_to_path() -> None:
    """A function may lie beside the experiment; behind everything that is installed."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))


def _public_names(owner: Any) -> list[str]:
    return [name for name in vars(owner) if not name.startswith("_")] if hasattr(owner, "__dict__") else []


def _missing_module_error(name: str, module: str) -> ConfigError:
    return ConfigError(
        f"reward {name!r}: there is no module {module!r} among the installed ones and in {Path.cwd()}; "
        f"our own rewards: {', '.join(BUILT_IN_REWARDS)}"
    )


def _import_failure_error(name: str, module: str, error: BaseException) -> ConfigError:
    return ConfigError(f"reward {name!r}: importing {module} raised {type(error).__name__}: {error}")
