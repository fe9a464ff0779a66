"""The command `show`: the resolved configuration of a cell, and where each value comes from.

A record holds the values and the command that wrote it. The sources are those of the experiment which that
command names, if it still resolves to the same fingerprint, or of the one that `--experiment` names.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gkd_lab import experiments
from gkd_lab.cli.command_table import load_command
from gkd_lab.cli.completion import complete_experiments
from gkd_lab.cli.options import (
    CellArgument,
    OutputFormat,
    OutputsOption,
    ScaleOption,
    SetOption,
    check_outputs_folder,
    format_grid_options,
    load_grid,
    parse_cell_fields,
)
from gkd_lab.config import Cell, ConfigError, Grid
from gkd_lab.config.cell import list_references
from gkd_lab.config.errors import suggest_choices
from gkd_lab.config.explain_cell import GROUP_ORDER, ResolvedValue, list_values
from gkd_lab.config.fingerprint import SHOWN_DIGITS
from gkd_lab.config.value_sources import ValueSource
from gkd_lab.store import Record, Store
from gkd_lab.store.files import read_json
from gkd_lab.store.lookup import find_record

_REFERENCE_GROUPS = {"teacher": ("teacher", "data"), "start": ("student", "data")}
"""Role of a reference model -> groups of a cell's values that are the model's."""
_MAX_CHARACTERS = 60


@dataclass(frozen=True)
class ShownCell:
    """A cell or reference model with its values and their sources."""

    fingerprint: str
    role: str
    folder: str
    status: str
    experiment: str | None
    """The request whose sources are given, as options of `plan`, and its file."""
    note: str | None
    """Reason for missing sources, and the command that shows them."""
    values: list[ResolvedValue]


def show_cell(
    cell: CellArgument,
    experiment: Annotated[
        str | None,
        typer.Option(
            metavar="EXP",
            help="Experiment of the cell, which then need not have been run.",
            autocompletion=complete_experiments,
        ),
    ] = None,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    format: Annotated[OutputFormat, typer.Option(help="Format of the output.")] = "text",
) -> None:
    """Print the resolved configuration of a cell and where each value comes from.

    CELL is a record, or with --experiment a cell of `gkd-lab plan EXP`, run or not.
    """
    check_outputs_folder(outputs)
    if experiment is None:
        if scale is not None or sets:
            raise ConfigError("--scale and --set belong to an experiment: add --experiment EXP")
        shown = _show_record(cell, outputs)
    else:
        request = _Request(experiment, scale, tuple(sets or ()))
        grid = request.load(outputs)
        if grid.missing_revisions:
            raise ConfigError(grid.missing_revisions)
        shown = _show_grid_cell(grid, _read_fingerprint(cell), request, outputs)
    print(_encode(shown) if format == "json" else "\n".join(_format_lines(shown)))


@dataclass(frozen=True)
class _Request:
    """An experiment with the options that change it."""

    name: str
    scale: Any
    sets: tuple[str, ...]

    def load(self, outputs: Path) -> Grid:
        """Return its grid. Raises ConfigError."""
        return load_grid(self.name, self.scale, self.sets, outputs, allow_missing_revisions=True)

    def format(self) -> str:
        """Return its options as `plan` takes them."""
        return shlex.join([self.name, *format_grid_options(self.scale, self.sets)])


def _show_record(name: str, outputs: Path) -> ShownCell:
    """Return a record, with sources if the experiment of the command that wrote it still gives it."""
    try:
        record = find_record(name, outputs)
    except ConfigError as error:
        raise ConfigError(f"{error}; a cell that was not run is shown with --experiment EXP") from error
    header = read_json(record.folder / "spec.json") or {}
    fingerprint = str(header.get("fingerprint", ""))
    request = _parse_command(record.read_provenance().get("command") or [])
    reason = "its record does not say by which experiment it was run"
    if request is not None:
        try:
            shown = _show_grid_cell(request.load(outputs), fingerprint, request, outputs)
            return replace(shown, folder=str(record.folder), status=_read_status(record))
        except ConfigError as error:
            reason = f"it was run by `{request.format()}`, which does not give it now ({error})"
    digits = fingerprint[:SHOWN_DIGITS]
    return ShownCell(
        fingerprint=fingerprint,
        role=header.get("role", "cell" if "labels" in header else "artifact"),
        folder=str(record.folder),
        status=_read_status(record),
        experiment=None,
        note=f"{reason}; where each value comes from: gkd-lab show {digits} --experiment EXP",
        values=_list_stored_values(record, header),
    )


def _read_status(record: Record) -> str:
    """Return `done`, `failed`, or `missing` for a record that is not finished."""
    return str(record.read_status().get("state", "missing"))


def _parse_command(words: Sequence[str]) -> _Request | None:
    """Return the experiment and its options of a recorded command line; None if it has no experiment."""
    if len(words) < 2 or words[1] not in ("run", "cell"):
        return None
    try:
        context = load_command(words[1]).make_context(words[1], list(words[2:]), resilient_parsing=True)
        name = context.params.get("name") or context.params.get("experiment")
        fields = parse_cell_fields(context.args) if words[1] == "cell" else {}
    except ConfigError:
        return None
    sets = context.params.get("sets") or [f"{key}={value}" for key, value in fields.items()]
    return None if name is None else _Request(name, context.params.get("scale"), tuple(sets))


def _read_fingerprint(name: str) -> str:
    """Return the fingerprint of a record's folder; another name as it is, its first digits."""
    path = Path(name) / "spec.json"
    return str((read_json(path) or {}).get("fingerprint", name)) if path.is_file() else name


def _show_grid_cell(grid: Grid, prefix: str, request: _Request, outputs: Path) -> ShownCell:
    """Return the one cell or reference model of a grid whose fingerprint begins with `prefix`.

    Raises ConfigError for none and for several.
    """
    candidates: dict[str, tuple[str, Cell]] = {
        model.full_fingerprint: (role, cells[0]) for role, model, cells in list_references(grid.cells)
    }
    candidates.update({cell.full_fingerprint: ("cell", cell) for cell in grid.cells})
    matches = [fingerprint for fingerprint in candidates if fingerprint.startswith(prefix)]
    if len(matches) != 1:
        shown = [fingerprint[:SHOWN_DIGITS] for fingerprint in matches or candidates]
        problem = f"{len(matches)} cells {prefix!r}" if matches else f"no cell {prefix[:SHOWN_DIGITS]!r}"
        raise ConfigError(f"{grid.name} has {problem} at {grid.scale}; {suggest_choices(prefix, shown)}")
    fingerprint, store = matches[0], Store(outputs)
    role, cell = candidates[fingerprint]
    values = experiments.explain_grid_cell(grid, cell)
    record = store.get_record(cell)
    if role != "cell":
        values = [value for value in values if value.group in _REFERENCE_GROUPS[role]]
        model = next(
            model for _, model in cell.training.reference_models if model.full_fingerprint == fingerprint
        )
        record = store.get_artifact(grid.scale, role, model)
    scale = ResolvedValue("cell", "scale", grid.scale, (_find_scale_source(grid, request),))
    return ShownCell(
        fingerprint=fingerprint,
        role=role,
        folder=str(record.folder),
        status=_read_status(record),
        experiment=f"{request.format()} ({grid.experiment.origin.name})",
        note=None,
        values=[scale, *values],
    )


def _find_scale_source(grid: Grid, request: _Request) -> str:
    """Return where the scale comes from, in words."""
    if request.scale is not None:
        return "--scale"
    origin = grid.experiment.origin
    if ("scale",) not in origin.lines:
        return "built-in default"
    return ValueSource("file", ("scale",)).describe(origin, "", grid.scale)


def _list_stored_values(record: Record, header: dict[str, Any]) -> list[ResolvedValue]:
    """Return the values of a record, without their sources."""
    spec = header.get("spec") or {}
    if "labels" not in header:  # a reference model or a text, whose fields have no groups
        spec = {"start": spec} if "model" in spec else {"start": {"data": spec.get("data")}, **spec}
    values = [ResolvedValue("cell", "scale", header["scale"], ())] if "scale" in header else []
    values += [ResolvedValue(group, field, value, ()) for group, field, _, value in list_values(spec)]
    values.sort(key=lambda value: GROUP_ORDER.index(value.group))
    for path in sorted(record.folder.glob("evaluations/*/spec.json")):
        for field, value in ((read_json(path) or {}).get("spec") or {}).items():
            if value is not None:
                values.append(ResolvedValue(f"evaluation {path.parent.name}", field, value, ()))
    return values


def _encode(shown: ShownCell) -> str:
    """Return a shown cell as JSON text; the sources of a value are its `from`."""
    fields = asdict(replace(shown, values=[]))
    fields["values"] = [
        {"group": v.group, "field": v.field, "value": v.value, "from": list(v.sources)} for v in shown.values
    ]
    return json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False)


def _format_lines(shown: ShownCell) -> Iterator[str]:
    """Yield the lines of a shown cell: groups of `field  value  source`."""
    yield f"{shown.role} {shown.fingerprint[:SHOWN_DIGITS]}, {shown.status}: {shown.folder}"
    if shown.experiment is not None:
        yield f"experiment: {shown.experiment}"
    if shown.note is not None:
        yield f"note: {shown.note}"
    rows = [(value.group, _shorten_field(value), _format_value(value.value)) for value in shown.values]
    field_width = max((len(field) for _, field, _ in rows), default=0)
    value_width = max((len(text) for _, _, text in rows), default=0)
    group = None
    for value, (name, field, text) in zip(shown.values, rows, strict=True):
        if name != group:
            yield ""
            yield name
            group = name
        line = f"  {field:{field_width}}  {text:{value_width}}  {'; '.join(value.sources)}"
        yield line.rstrip()


def _shorten_field(value: ResolvedValue) -> str:
    """Return a field's name without the part that its group says."""
    head, _, rest = value.field.partition(".")
    return rest if head in ("data", "teacher", "start") and rest else value.field


def _format_value(value: Any) -> str:
    """Return a value as text, cut to 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 3]}..."
