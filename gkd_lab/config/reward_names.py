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

from gkd_lab.config.errors import SpecError, nearest, unknown

Rule = Callable[[list[str], list[str], list[str]], list[float]]
"""(prompts, texts that the student wrote, the data's completions) -> a reward for each, more is better."""

ENTAILMENT = "entailment"
BUILT_IN = ("exact_match", "rouge2", "rougeL", ENTAILMENT)
"""Rewards of this package, each from 0 to 1."""

BASELINES = ("leave_one_out", "none")
"""What is taken from a reward: the mean of the step's other rewards, or nothing."""

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def check_name(name: str) -> None:
    """Raises SpecError for a name that is neither ours nor an import path."""
    if name not in BUILT_IN and not _IMPORT_PATH.fullmatch(name):
        raise SpecError(
            f"unknown reward {name!r}; {nearest(name, BUILT_IN)}, or a function's import path such as "
            "my_package.rewards:brevity"
        )


def check_model(name: str, model: object) -> None:
    """Raises SpecError where a reward lacks the model that it asks, or is given one that it does not read."""
    if name == ENTAILMENT and model is None:
        raise SpecError(
            "reward 'entailment' asks a sequence-classification model: give `model`, a checkpoint folder or "
            "a hub name"
        )
    if name != ENTAILMENT and model is not None:
        raise SpecError(f"reward {name!r} reads no model, got {model!r}: leave `model` out")


def check_baseline(baseline: str, normalize: bool) -> None:
    """Raises SpecError for a baseline that is unknown, or too little for what is asked."""
    if baseline not in BASELINES:
        raise unknown("baseline of a reward", baseline, BASELINES)
    if normalize and baseline == "none":
        raise SpecError(
            "a reward's `normalize` divides by how far rewards lie from their mean, which baseline 'none' "
            "leaves in: take baseline 'leave_one_out', or normalize: false"
        )


def check_sampling(lmbda: float, temperature: float | None) -> None:
    """Raises SpecError where nothing would be rewarded, or a policy gradient would be of another policy."""
    if lmbda == 0:
        raise SpecError(
            "a reward is of what the student writes, and with lmbda 0 it writes nothing: set lmbda to 1, or "
            "leave the reward out"
        )
    if temperature != 1:
        raise SpecError(
            f"a reward's gradient is that of the text which the student samples at temperature 1 (Eq. 5), "
            f"got temperature {temperature}: set it to 1"
        )


def nothing_off_policy(lmbda: float) -> str:
    """Why a reward alone needs lmbda 1."""
    return (
        f"lmbda {lmbda:g} takes the other steps from the data, of which a reward teaches nothing: set lmbda "
        "to 1, or add a divergence or cross_entropy"
    )


def content_of(name: str) -> str | None:
    """SHA-256 of the module that a function's import path names; None for our own rewards.

    Raises SpecError for a module that is not there.
    """
    if name in BUILT_IN:
        return None
    module = name.partition(":")[0]
    file = _file_of(module)
    if file is None:
        raise _no_module(name, module)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def imported(name: str) -> Rule:
    """The function at `package.module:function`. Raises SpecError for what is missing or is no function."""
    module, _, place = name.partition(":")
    _see_current_folder()
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise _no_module(name, error.name) from error
        raise _broken(name, module, error) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything, and may call exit()
        raise _broken(name, module, error) from error
    for part in place.split("."):
        if not hasattr(found, part):
            raise SpecError(f"reward {name!r}: {module} has no {part!r}; {nearest(part, _public(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"reward {name!r} is a {type(found).__name__}, not a function")
    rule: Rule = found
    return rule


def _file_of(module: str) -> Path | None:
    """Where a module's source lies, found as an import would find it, without importing its packages."""
    first, *rest = module.split(".")
    _see_current_folder()
    loaded = sys.modules.get(first)
    origin = getattr(loaded, "__file__", None) if loaded else None
    if loaded is None:
        spec = importlib.util.find_spec(first)
        origin = None if spec is None else spec.origin
        folders: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    else:
        folders = getattr(loaded, "__path__", ())
    if not rest:
        return None if origin is None else _existing(Path(origin))
    places = [Path(folder).joinpath(*rest) for folder in folders]
    found = [
        _existing(path) for place in places for path in (place.with_suffix(".py"), place / "__init__.py")
    ]
    return next(filter(None, found), None)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _see_current_folder() -> None:
    """A function may lie beside the experiment; behind everything that is installed."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))


def _public(owner: Any) -> list[str]:
    return [name for name in vars(owner) if not name.startswith("_")] if hasattr(owner, "__dict__") else []


def _no_module(name: str, module: str) -> SpecError:
    return SpecError(
        f"reward {name!r}: there is no module {module!r} among the installed ones and in {Path.cwd()}; "
        f"our own rewards: {', '.join(BUILT_IN)}"
    )


def _broken(name: str, module: str, error: BaseException) -> SpecError:
    return SpecError(f"reward {name!r}: importing {module} raised {type(error).__name__}: {error}")
