"""An experiment as a sweep file for wandb agents: the same axes, and a command that runs one cell of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gkd_lab.config.errors import ConfigError
from gkd_lab.config.experiment import Experiment

WANDB_PROJECT = "gkd-lab"


def format_sweep_file(name: str, experiment: Experiment, scale: str | None, fields: Mapping[str, str]) -> str:
    """The YAML text of a grid sweep whose cells are the experiment's. Raises SpecError where nothing varies.

    `name` is how the experiment is called, `scale` and `fields` what was asked for beside its file: fields
    that are no axes are said in the command. The server's grid varies the first name of the alphabet slowest.
    """
    axes = experiment.list_axes()
    if not axes:
        raise ConfigError(f"{name}: no axis to sweep over; make one with --set KEY=V1,V2")
    stated = [f"--{key}={value}" for key, value in fields.items() if key not in axes]
    words = [*(("--scale", scale) if scale else ()), *stated]
    document = {
        "program": "gkd-lab",
        "command": ["${env}", "gkd-lab", "cell", "--experiment", name, *words, "${args}"],
        "project": WANDB_PROJECT,
        "name": Path(name).stem,
        "description": " ".join(experiment.description.split()),
        "method": "grid",
        "parameters": {
            axis: {"values": [encode_axis_value(v) for v in values]} for axis, values in axes.items()
        },
    }
    return yaml.dump(document, Dumper=_SweepDumper, sort_keys=False, allow_unicode=True, width=110)


def encode_axis_value(value: Any) -> Any:
    """A value as the client can carry it to `--axis=value`: numbers and truth as they are, others as text.

    The client writes what is no text in Python's own form (`None`, `{'a': 1}`), which is not read back.
    """
    if isinstance(value, bool | int | float):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    plain = json.loads(json.dumps(value, default=_dump_model))
    if isinstance(plain, str) and _reads_back(plain, plain):
        return plain
    text = json.dumps(plain, ensure_ascii=False)
    assert _reads_back(text, plain), f"{text} is not read as it was written"
    return text


def _reads_back(text: str, value: Any) -> bool:
    """Whether `cell` takes the text for this one value."""
    try:
        return bool(yaml.safe_load(f"[{text}]") == [value])
    except yaml.YAMLError:
        return False


def _dump_model(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_unset=True)


class _SweepDumper(yaml.SafeDumper):
    """Lists of plain values on one line, as in the experiments."""


def _represent_list_inline(dumper: _SweepDumper, values: Sequence[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_SweepDumper.add_representer(list, _represent_list_inline)
