"""Text of `list`, `plan` and `status`; rich, which takes time to load, is used in a terminal only."""

import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from gkd_lab.config import Grid
from gkd_lab.config.cost import DeviceRate
from gkd_lab.status.overview import CellView, Overview
from gkd_lab.status.time_estimates import EstimateBasis
from gkd_lab.store import State
from gkd_lab.store.live_progress import LiveProgress
from gkd_lab.tables.loss_labels import loss_label

_STATES: tuple[State, ...] = get_args(State)
_STATE_STYLES = {"done": "green", "failed": "red", "running": "yellow"}
TEXT_COLUMNS = {
    "cell", "task", "status", "owner", "now", "experiment", "figures", "question", "from", "scores", "claim",
    "unit", "work", "needs", "queue", "job", "host", "log", "basis",
}  # fmt: skip
"""Columns that are aligned to the left; all others hold numbers."""


@dataclass(frozen=True)
class Listing:
    """A table of texts, with a rich style for each row or none at all."""

    columns: list[str]
    rows: list[list[str]]
    styles: list[str] = field(default_factory=list)


def print_listing(listing: Listing) -> None:
    """Print a table: coloured and folded to its width in a terminal, plain in a pipe."""
    if sys.stdout.isatty():
        from gkd_lab.status.terminal import print_table

        print_table(listing)
    else:
        print(format_listing(listing))


def format_listing(listing: Listing) -> str:
    """Return a table as plain text, columns two spaces apart, names left and numbers right."""
    rows = [listing.columns, *listing.rows]
    text = "".join(map("".join, rows))
    if text.isascii() and text.isprintable():
        return _align_columns(rows)
    from tabulate import tabulate  # which knows wide characters, and is slow with 10,000 rows

    alignment = ["left" if name in TEXT_COLUMNS else "right" for name in listing.columns]
    return str(tabulate(rows, tablefmt="plain", colalign=alignment, disable_numparse=True))


def _align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of printable ASCII, the first of which holds the columns' names, as tabulate would."""
    columns = []
    for name, *texts in zip(*rows, strict=True):
        stripped = [name.strip(), *map(str.strip, texts)]
        width = max(map(len, stripped))
        pad = str.ljust if name in TEXT_COLUMNS else str.rjust
        columns.append([pad(text, width) for text in stripped])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def list_cells(
    grid: Grid, overview: Overview, *, show_progress: bool, states: Container[State] = _STATES
) -> Listing:
    """List the cells that are in `states`, a row each: progress, or else pack and estimated time."""
    axes = [axis for axis in grid.axes if axis not in ("task", "lmbda", "beta", "seed")]
    progress_columns = ["owner", "step", "loss", "on policy", "tokens/s", "left", "now"]
    columns = progress_columns if show_progress else ["pack", "about", "from"]
    views = [view for view in overview.cells if view.state in states]
    return Listing(
        columns=["cell", "task", "lmbda", "beta", "seed", *axes, "status", *columns],
        rows=[
            [
                # A fingerprint without the commits of all models and data is not the cell's.
                "?" if grid.missing_revisions else view.cell.fingerprint,
                *_format_identity(view, axes),
                view.state,
                *(_format_progress(view) if show_progress else _format_cost(view, overview.rate)),
            ]
            for view in views
        ],
        styles=[_STATE_STYLES.get(view.state, "") for view in views],
    )


def _format_identity(view: CellView, axes: list[str]) -> list[str]:
    """Return the texts of task, lmbda, beta (`-` without one), seed and other axes."""
    cell = view.cell
    beta = "-" if cell.beta is None else f"{cell.beta:g}"
    labels = [_format_axis_value(axis, cell.labels[axis]) for axis in axes]
    return [cell.task, f"{cell.lmbda:g}", beta, str(cell.seed), *labels]


def _format_axis_value(axis: str, label: Any) -> str:
    """Format an axis value: objectives by terms, dicts as `key=value,...`, lists as `a+b`, floats by `:g`."""
    if axis == "objectives":
        return loss_label(label)
    if isinstance(label, dict):
        return ",".join(f"{key}={_format_axis_value(key, value)}" for key, value in label.items())
    if isinstance(label, tuple):
        return "+".join(_format_axis_value(axis, item) for item in label)
    return f"{label:g}" if isinstance(label, float) else str(label)


def _format_progress(view: CellView) -> list[str]:
    """Return texts of owner, step, loss, on-policy share, tokens per second, time left and present work.

    What is not known is an empty text.
    """
    progress = view.progress
    return [
        progress.owner or "",
        f"{progress.step}/{view.cell.training.steps}",
        "" if progress.loss is None else f"{progress.loss:.4g}",
        "" if progress.on_policy is None else f"{progress.on_policy:.0%}",
        "" if progress.tokens_per_second is None else f"{progress.tokens_per_second:.0f}",
        "" if progress.seconds_left is None else _format_duration(progress.seconds_left),
        "" if progress.live is None else _format_live(progress.live),
    ]


def _format_live(live: LiveProgress) -> str:
    """Format `greedy 120/1000 rows`."""
    return f"{live.work} {live.done}/{live.total} {live.unit}"


def _format_cost(view: CellView, rate: DeviceRate) -> list[str]:
    """Return texts of pack number (or `alone`), estimated time and basis of the estimate."""
    pack = "alone" if view.unpacked_reason else str(view.pack)
    basis = "" if view.estimate_basis == "nothing" else view.estimate_basis
    return [pack, format_estimate(view.estimated_seconds, view.estimate_basis, rate), basis]


def render_running_artifacts(overview: Overview) -> Iterator[str]:
    """Yield a line for each reference model that is being trained now."""
    for artifact in overview.artifacts:
        if artifact.live is not None or artifact.state == "running":
            details = [] if artifact.live is None else [_format_live(artifact.live)]
            if artifact.live is not None and artifact.live.seconds_left is not None:
                details.append(f"{_format_duration(artifact.live.seconds_left)} left")
            yield f"{artifact.role} {artifact.name}: {', '.join(['running', *details])}"


def render_state_counts(overview: Overview) -> str:
    """Format `3 done, 2 running, 10 missing; left to do: about 4 min`."""
    return f"{_format_states(view.state for view in overview.cells)}; {render_time_left(overview)}"


def render_totals(overview: Overview) -> Iterator[str]:
    """Yield the totals of cells and of evaluations, those of reference models included, and the time left."""
    evaluations = [state for view in overview.cells for state in view.progress.evaluation_states]
    evaluations += [state for artifact in overview.artifacts for state in artifact.evaluation_states]
    models = [artifact.state for artifact in overview.artifacts]
    for noun, states in (
        ("cell", [view.state for view in overview.cells]),
        ("evaluation", evaluations),
        ("reference model", models),
    ):
        if states:
            yield f"{_format_count(len(states), noun)}: {_format_states(states)}"
    if not all(view.state == "done" for view in overview.cells):
        yield render_time_left(overview)
        yield from _render_estimate_bases(overview)


def render_time_left(overview: Overview) -> str:
    """Format `left to do: about 4 min, decoding and 10 s of imports included`, or in GPU-hours."""
    is_rated = any(view.estimate_basis == "FLOPs" for view in overview.cells)
    text = format_estimate(overview.seconds_left, "FLOPs" if is_rated else "finished cells", overview.rate)
    if not overview.seconds_left:
        return f"left to do: about {text}"
    is_decoding_known = "FLOPs" in overview.decoding_bases or "finished cells" in overview.decoding_bases
    imports = f"{overview.import_seconds:.0f} s of imports"
    if overview.decoding_bases and not is_decoding_known:
        return f"left to do: about {text}, {imports} included, decoding not"
    return f"left to do: about {text}, decoding and {imports} included"


def _format_states(states: Iterable[State]) -> str:
    """Format `3 done, 2 running`: how many there are of each state."""
    counts = Counter(states)
    return ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state])


def render_summary(overview: Overview) -> Iterator[str]:
    """Yield lines on reference models, packs, work left, estimates, collapsed cells and notes."""
    for artifact in overview.artifacts:
        scores = str(artifact.scores)
        detail = (
            scores
            if artifact.state == "done"
            else f"about {format_estimate(artifact.estimated_seconds, 'FLOPs', overview.rate)}"
        )
        yield f"{artifact.role} {artifact.name}: {', '.join(filter(None, (artifact.state, detail)))}"
    done = sum(view.state == "done" for view in overview.cells)
    sizes = Counter(overview.pack_sizes).items()
    packs = ", ".join(f"{_format_count(count, 'pack')} of {size}" for size, count in sizes)
    yield f"{_format_count(len(overview.cells), 'cell')}, {done} done; {packs}"
    yield render_time_left(overview)
    yield from _render_estimate_bases(overview)
    yield from overview.decode_notes
    yield from overview.collapsed_notes
    yield from overview.notes


def _render_estimate_bases(overview: Overview) -> Iterator[str]:
    """Yield a line for each basis of time estimates, with the number of cells that have it."""
    counts = Counter(view.estimate_basis for view in overview.cells)
    if counts["finished cells"]:
        cells = _format_count(counts["finished cells"], "cell")
        yield f"time of {cells}: as {overview.estimate_source} took"
    if counts["FLOPs"]:
        cells = _format_count(counts["FLOPs"], "cell")
        yield f"time of {cells}: of one alone, from its FLOPs at {overview.rate.name}"
    if counts["nothing"]:
        cells = _format_count(counts["nothing"], "cell")
        yield f"time of {cells}: unknown, the size of a model is not known before it is built"
    decoding = overview.decoding_bases
    if decoding.get("finished cells"):
        yield f"decoding of {_format_count(decoding['finished cells'], 'evaluation')}: as finished ones took"
    if decoding.get("FLOPs"):
        evaluations = _format_count(decoding["FLOPs"], "evaluation")
        yield f"decoding of {evaluations}: from FLOPs at {overview.rate.name}, texts of full length"
    if decoding.get("nothing"):
        evaluations = _format_count(decoding["nothing"], "evaluation")
        reason = "the number of rows, or the size of a model, is not known before they are read"
        yield f"decoding of {evaluations}: not counted, {reason}"


def render_all_done(name: str, cell_count: int) -> str:
    """Return the last line of a run that has done everything: `NAME: all 6 cells are done`."""
    cells = "the cell is" if cell_count == 1 else f"all {cell_count} cells are"
    return f"{name}: {cells} done"


def _format_count(count: int, noun: str) -> str:
    """Format `1 cell` or `2 cells`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_estimate(seconds: float | None, basis: EstimateBasis, rate: DeviceRate) -> str:
    """Format an estimate as `_format_duration` does, that of an assumed GPU in GPU-hours or GPU-days."""
    if seconds is None or not rate.is_gpu or basis != "FLOPs":
        return _format_duration(seconds)
    hours = seconds / 3600
    if hours < 1:
        return f"{60 * hours:.0f} GPU-min" if hours >= 1 / 60 else "under 1 GPU-min"
    return f"{hours:.3g} GPU-h" if hours < 48 else f"{hours / 24:.3g} GPU-days"


def _format_duration(seconds: float | None) -> str:
    """Format seconds: `89 s`, from 90 s on `12 min`, from 90 min on `1.5 h`; None as `unknown`."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
