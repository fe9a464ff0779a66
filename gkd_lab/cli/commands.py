"""Commands that load no model: plan, status, tables, claims, reports, stored predictions. No torch."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gkd_lab import experiments
from gkd_lab.cli.completion import complete_cells, complete_metrics, complete_score_sources
from gkd_lab.cli.exit_status import exit_with_message
from gkd_lab.cli.options import (
    CELL_HELP,
    ExampleNoiseOption,
    ExperimentArgument,
    NoiseFromOption,
    NoiseOption,
    OutputFormat,
    OutputsOption,
    PackOption,
    PowerOption,
    ScaleOption,
    SetOption,
    TableFormat,
    check_output_file,
    load_grid,
    load_grid_without_cache,
    parse_metric_names,
    parse_overrides,
    pause_garbage_collection,
)
from gkd_lab.config import ConfigError, Grid
from gkd_lab.config.packs import PackLimit, parse_pack_limit
from gkd_lab.store import Store
from gkd_lab.store.files import write_bytes
from gkd_lab.store.output_folders import check_outputs_folder
from gkd_lab.store.pack_limits import PackLimits
from gkd_lab.store.unit_files import UnitFiles


def list_experiments() -> None:
    """List all experiments by name with number of cells, figures and question."""
    from gkd_lab.status.render import Listing, print_listing

    rows, broken = [], []
    for name in experiments.list_experiment_files():
        try:
            experiment, cells = experiments.outline_experiment(name)
        except ConfigError as error:
            rows.append([name, "?", "", "cannot be read, see below"])
            broken.append(f"gkd-lab: {error}")
            continue
        figures = ", ".join(experiment.paper.figures)
        rows.append([name, str(cells), figures, experiment.question])
    print_listing(Listing(["experiment", "cells", "figures", "question"], rows))
    for line in broken:
        print(line, file=sys.stderr)
    if broken:
        raise typer.Exit(2)


def show_plan(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    pack: PackOption = "auto",
    units: Annotated[
        bool, typer.Option("--units", help="Show the units that a cluster would run, in place of cells.")
    ] = False,
    power: PowerOption = False,
    noise_from: NoiseFromOption = None,
    noise: NoiseOption = None,
    example_noise: ExampleNoiseOption = None,
) -> None:
    """Show the status and estimated cost of every cell, and the total, or with --power what it could show.

    Runs nothing.
    """
    if power:
        _show_power(load_grid(name, scale, sets, outputs), outputs, noise_from, noise, example_noise)
        return
    if (noise_from, noise, example_noise) != (None, None, None):
        raise ConfigError("--noise-from, --noise and --example-noise are about power: add --power")
    from gkd_lab.status.overview import build_overview
    from gkd_lab.status.render import list_cells, print_listing, render_summary

    limit = parse_pack_limit(pack)
    if units:
        _show_units(load_grid(name, scale, sets, outputs), Store(outputs), limit)
        return
    with pause_garbage_collection():
        grid = load_grid(name, scale, sets, outputs, allow_missing_revisions=True)
        experiments.check_models_and_splits(grid)
        experiments.check_peft(grid)
        overview = build_overview(grid, Store(outputs), limit)
    print_listing(list_cells(grid, overview, show_progress=False))
    print("\n".join([*render_summary(overview), *experiments.list_unchecked_sources(grid)]), flush=True)
    _show_run_units(grid, Store(outputs))
    if grid.missing_revisions:
        raise ConfigError(grid.missing_revisions)


def _show_units(grid: Grid, store: Store, limit: PackLimit) -> None:
    """Print the units of a grid with what they ask a cluster for, and what became of those submitted."""
    from gkd_lab.status.render import print_listing
    from gkd_lab.status.unit_listing import list_planned_units

    listing, margins = list_planned_units(
        grid, store, PackLimits(store.root).find_grid_limit(grid.cells, limit)
    )
    print_listing(listing)
    print(margins)
    _show_run_units(grid, store)


def _show_run_units(grid: Grid, store: Store) -> None:
    """Print the units that an engine was given, with queue, place, requeues and log; nothing without any."""
    from gkd_lab.runner.engines.driver import name_grid_in_place
    from gkd_lab.runner.engines.queues import describe_queues
    from gkd_lab.status.render import print_listing
    from gkd_lab.status.unit_listing import list_run_units

    ray_queue = name_grid_in_place(grid, UnitFiles.locate(store.root, grid.fingerprint))
    listing = list_run_units(grid, store, partial(describe_queues, ray_queue=ray_queue))
    if listing is not None:
        print()
        print_listing(listing)


def _show_power(
    grid: Grid, outputs: Path, noise_from: str | None, noise: float | None, example_noise: float | None
) -> None:
    """Print which true differences each claim would show on a grid."""
    from gkd_lab.claims.grid_power import plan_power
    from gkd_lab.claims.noise_sources import choose_noise
    from gkd_lab.status.power_listing import list_claim_powers, list_noise, render_power_notes
    from gkd_lab.status.render import print_listing

    source = choose_noise(grid, outputs, noise_from, noise, example_noise)
    planned = plan_power(grid, source)
    print(f"noise: from {source.text}; standard deviations in points")
    print_listing(list_noise(planned))
    print()
    print_listing(list_claim_powers(planned))
    print("\n".join(render_power_notes(planned)))


def show_status(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until all is done or Ctrl-C.")] = False,
) -> None:
    """Show the progress, worker, speed and failure of every cell; exit with 1 if something failed."""
    from gkd_lab.status.overview import build_overview
    from gkd_lab.status.render import list_cells, print_listing, render_running_artifacts, render_totals
    from gkd_lab.tables.failure_causes import format_failures, list_failures

    if watch:
        from gkd_lab.status.terminal import watch_grid

        grid = load_grid(name, scale, sets, outputs)
        overview = watch_grid(grid, Store(outputs))
    else:
        with pause_garbage_collection():
            grid = load_grid(name, scale, sets, outputs)
            overview = build_overview(grid, Store(outputs), "auto")
    print_listing(list_cells(grid, overview, show_progress=True))
    failures = format_failures(list_failures(grid, Store(outputs))) if overview.has_failures else []
    totals = render_totals(overview)
    for line in (*render_running_artifacts(overview), *totals, *(f"failed: {line}" for line in failures)):
        print(line)
    _show_run_units(grid, Store(outputs))
    if failures:
        raise typer.Exit(1)


def print_sweep_file(name: ExperimentArgument, scale: ScaleOption = None, sets: SetOption = None) -> None:
    """Print a sweep file for wandb agents, which then run the experiment's cells."""
    from gkd_lab.config.sweep import format_sweep_file

    fields = parse_overrides(sets)
    experiment, _ = experiments.outline_experiment(name, scale=scale, overrides=fields)
    if experiments.is_file_name(name):  # agents may start in another folder
        name = str(Path(name).resolve())
    print(format_sweep_file(name, experiment, scale, fields), end="")


def write_table(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    format: Annotated[TableFormat, typer.Option(help="Format of the table.")] = "md",
    output: Annotated[Path | None, typer.Option("-o", help="File to write; default: stdout.")] = None,
    long: Annotated[
        bool, typer.Option("--long", help="A row per score, not per model: csv, json or parquet.")
    ] = False,
    examples: Annotated[
        bool, typer.Option("--examples", help="Write NAME.examples.parquet beside -o NAME.parquet, too.")
    ] = False,
) -> None:
    """Print, or write to a file, a table of the scores of cells and reference models.

    A row is a model, or with --long a score (model, evaluation and metric); parquet files are always long.
    """
    if long and format == "md":
        raise ConfigError("--long has no Markdown form: add --format csv, json or parquet")
    if examples and (format != "parquet" or output is None):
        raise ConfigError("--examples needs a parquet file: add --format parquet -o NAME.parquet")
    from gkd_lab.tables.failure_causes import format_failures, list_failures

    check_output_file(output, f"{Path(name).stem}.{format}")
    with pause_garbage_collection():
        grid, store = load_grid(name, scale, sets, outputs), Store(outputs)
        content, has_failures = _encode_results(grid, store, format, long or format == "parquet")
    for line in format_failures(list_failures(grid, store)) if has_failures else ():
        print(f"failed: {line}", file=sys.stderr)
    if output is None:
        sys.stdout.buffer.write(content)
    else:
        write_bytes(output, content)
    if examples and output is not None:
        from gkd_lab.tables.examples import build_examples, get_examples_path, write_examples

        write_examples(build_examples(grid, store), get_examples_path(output))


def _encode_results(grid: Grid, store: Store, format: TableFormat, long: bool) -> tuple[bytes, bool]:
    """Return (a grid's table in the long or wide form, whether a model failed).

    A parquet file holds its provenance.
    """
    if not long and format in ("json", "md"):  # needs no pandas, which takes long to load
        from gkd_lab.tables.formats import encode_json, encode_markdown
        from gkd_lab.tables.rows import build_wide_rows

        rows = build_wide_rows(grid, store)
        has_failures = any(row["status"] == "failed" for row in rows)
        return encode_json(rows) if format == "json" else encode_markdown(rows), has_failures
    from gkd_lab.tables.long_table import build_long_table
    from gkd_lab.tables.table import build_wide_table, collect_table_provenance, encode_table

    frame = build_long_table(grid, store) if long else build_wide_table(grid, store)
    if format == "parquet":
        frame.attrs.update(collect_table_provenance(grid, store))
    return encode_table(frame, format), bool((frame["status"] == "failed").any())


def judge_claims(
    name: Annotated[
        str,
        typer.Argument(
            metavar="EXP|paper|TABLE.parquet",
            help="An experiment; `paper`: the numbers of the paper; or a table that `gkd-lab table` wrote.",
            autocompletion=complete_score_sources,
        ),
    ],
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    format: Annotated[OutputFormat, typer.Option(help="Format of the output.")] = "text",
) -> None:
    """Print a verdict on each of the paper's claims: by an experiment, a table or the paper itself."""
    from gkd_lab.claims.judge import judge_paper, judge_run, judge_table_file
    from gkd_lab.claims.verdict_text import encode_verdicts, format_verdict_lines

    claim_ids: Sequence[str] = ()
    if name == "paper":
        if scale is not None or sets:
            raise ConfigError("the numbers of the paper take neither --scale nor --set")
        verdicts = judge_paper()
    elif name.endswith(".parquet"):
        if scale is not None or sets:
            raise ConfigError("a table's file takes neither --scale nor --set")
        verdicts = judge_table_file(name)
    else:
        grid = load_grid(name, scale, sets, outputs)
        claim_ids = grid.experiment.paper.claims
        verdicts = judge_run(grid, Store(outputs))
    lines = format_verdict_lines(verdicts, claim_ids)
    print(encode_verdicts(verdicts) if format == "json" else "\n".join(lines))


def write_report_page(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
    output: Annotated[
        Path | None, typer.Option("-o", help="File to write; default: in the outputs folder.")
    ] = None,
    with_paper: Annotated[
        bool,
        typer.Option("--paper", help="Show the paper's maps and claims; default: if EXP has `paper:`."),
    ] = False,
) -> None:
    """Write one HTML page with figures, table and samples, and print its path.

    Without -o it is outputs/reports/NAME-SCALE-FINGERPRINT.html, with a copy, NAME-SCALE-latest.html.
    """
    check_output_file(output, f"{Path(name).stem}.html")
    from gkd_lab.report.html_report import write_report

    with pause_garbage_collection():
        grid = load_grid(name, scale, sets, outputs)
        file = output or outputs / "reports" / f"{grid.name}-{grid.scale}-{grid.fingerprint}.html"
        path = write_report(grid, Store(outputs), file, with_paper=with_paper or None)
    if output is None:
        write_bytes(path.with_name(f"{grid.name}-{grid.scale}-latest.html"), path.read_bytes())
    print(f"report: {path.resolve()}")


def compare_cells(
    cell_a: Annotated[str, typer.Argument(metavar="CELL_A", help=CELL_HELP, autocompletion=complete_cells)],
    cell_b: Annotated[
        str,
        typer.Argument(
            metavar="CELL_B",
            help="The other record; the differences are B - A.",
            autocompletion=complete_cells,
        ),
    ],
    metric: Annotated[str | None, typer.Option(help="Default: the first metric that both have.")] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Name, such as greedy. Default: the first evaluation that both have.")
    ] = None,
    outputs: OutputsOption = Path("outputs"),
    format: Annotated[OutputFormat, typer.Option(help="Format of the output.")] = "text",
) -> None:
    """Print how two cells differ: settings, scores, paired difference (B - A), examples."""
    from gkd_lab.report.comparison import compare_records
    from gkd_lab.report.comparison_text import format_comparison_json, print_comparison
    from gkd_lab.store.lookup import find_record

    check_outputs_folder(outputs)
    pair = find_record(cell_a, outputs), find_record(cell_b, outputs)
    comparison = compare_records(*pair, evaluation=evaluation, metric=metric)
    if format == "json":
        print(format_comparison_json(comparison))
    else:
        print_comparison(comparison)


def rescore_experiment(
    name: ExperimentArgument,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="M1,M2",
            help="Default: the metrics of the evaluations.",
            autocompletion=complete_metrics,
        ),
    ] = None,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Recompute metrics from stored predictions and store the scores; load no model."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.tables.rescoring import (
        collect_rescore_jobs,
        format_rescored_lines,
        format_unscored_lines,
        rescore_records,
    )

    names = parse_metric_names(metrics)
    grid = load_grid(name, scale, sets, outputs)
    jobs, missing = collect_rescore_jobs(grid, Store(outputs), names)
    if not jobs:
        exit_with_message(
            f"nothing to rescore: {grid.name} has no finished evaluation below {str(outputs)!r} yet", 1
        )
    try:
        with Reporter().phase(f"{grid.name}: records", len(jobs)) as advance:
            outcome = rescore_records(jobs, advance)
    except OSError as error:
        exit_with_message(f"{error}; what was rescored is kept, rescore again to go on", 1)
    print("\n".join(format_rescored_lines(outcome, len(jobs))))
    for line in format_unscored_lines(grid, outcome, missing):
        print(line, file=sys.stderr)
    if not outcome.is_complete:
        raise typer.Exit(1)


def verify_experiment(
    name: ExperimentArgument,
    scale: ScaleOption = None,
    sets: SetOption = None,
    outputs: OutputsOption = Path("outputs"),
) -> None:
    """Check every record against its fingerprint and file hashes; print the mismatches."""
    from gkd_lab.runner.progress import Reporter
    from gkd_lab.status.verify import list_candidate_records, verify_records

    load_grid(name, scale, sets, outputs)  # raises errors of the request, with the paths of these outputs
    grid, store = load_grid_without_cache(name, scale, sets, outputs), Store(outputs)
    records = list_candidate_records(grid, store)
    with Reporter().phase(f"{grid.name}: records", len(records)) as advance:
        result = verify_records(grid, store, records, advance)
    for line in result.notes:
        print(f"note: {line}")
    for line in result.mismatches:
        print(f"mismatch: {line}")
    counts = f"{result.records} records, {result.evaluations} evaluations and {result.files} hashed files"
    missing = f"; {result.missing} of {len(grid.cells)} cells were not begun" if result.missing else ""
    verdict = f"{len(result.mismatches)} do not match" if result.mismatches else "all match"
    print(f"{grid.name}: {counts} read, {verdict}{missing}")
    if result.mismatches:
        raise typer.Exit(1)
