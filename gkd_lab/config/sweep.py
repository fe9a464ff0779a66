"""Write an experiment as a wandb sweep file: the same axes, and a command that runs one cell."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gkd_lab.config.errors import ConfigError
from gkd_lab.config.experiment import ExperimentFile
from gkd_lab.config.yaml_files import parse_yaml

WANDB_PROJECT = "gkd-lab"


def format_sweep_file(
    name: str, experiment: ExperimentFile, scale: str | None, fields: Mapping[str, str]
) -> str:
    """Return the YAML text of a wandb grid sweep over an experiment's cells. ConfigError without an axis.

    name: The experiment as the command line takes it. scale, fields: Options given beside the file; fields
    that are no axes become options of the command. The server varies the alphabetically first axis slowest.
    """
    axes = experiment.list_axes()
    if not axes:
        raise ConfigError(f"{name}: no axis to sweep over; make one with --set KEY=V1,V2")
    scale_options = ("--scale", scale) if scale else ()
    field_options = [f"--{key}={value}" for key, value in fields.items() if key not in axes]
    options = [*scale_options, *field_options]
    document = {
        "program": "gkd-lab",
        "command": ["${env}", "gkd-lab", "cell", "--experiment", name, *options, "${args}"],
        "project": WANDB_PROJECT,
        "name": Path(name).stem,
        "description": " ".join(experiment.description.split()),
        "method": "grid",
        "parameters": {
            axis: {"values": [encode_axis_value(value) for value in values]} for axis, values in axes.items()
        },
    }
    return yaml.dump(document, Dumper=_SweepDumper, sort_keys=False, allow_unicode=True, width=110)


def encode_axis_value(value: Any) -> Any:
    """Return a value that survives wandb's `--axis=value`: numbers and booleans unchanged, others as text.

    The client writes other values in Python's form (`None`, `{'a': 1}`), which cannot be read back.
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
    """Return whether YAML 1.2, as `gkd-lab cell` reads it, and YAML 1.1 parse `text` as the one `value`."""
    try:
        return all(read(f"[{text}]") == [value] for read in (parse_yaml, yaml.safe_load))
    except yaml.YAMLError:
        return False


def _dump_model(value: Any) -> Any:
    """Return a pydantic section as JSON-ready data, without fields that were not set."""
    return value.model_dump(mode="json", exclude_unset=True)


class _SweepDumper(yaml.SafeDumper):
    """YAML dumper that writes a list on one line, as the experiments do."""


def _represent_list_inline(dumper: _SweepDumper, values: Sequence[Any]) -> yaml.Node:
    """Return the YAML node of a list, written on one line."""
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_SweepDumper.add_representer(list, _represent_list_inline)
