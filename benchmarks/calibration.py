"""Try the rules of `gkd_lab.judge` on simulated tables of known truth: false verdicts, coverage, power.

    python benchmarks/calibration.py [--tables N] [--case TEXT ...] [--workers N] [--json FILE] [--smoke]
    python benchmarks/calibration.py --old PATH   beside them the rules of commit 72e5606, by a checkout of it
                                                  or by the JSON of an earlier run

Each case of `calibration_cases.py` is judged on N tables (4,000; 1,000 by the old rules), equal in every run.
The output is a Markdown table. Limits: `holds` of a claim that is false, `fails` of one that is not, at most
3.5 % each (on the boundary both are false); coverage of the true least effect by [low, high], among tables
with an interval, at least 93 %, for plain differences with all noises and 5 seeds at most 98 %; `holds` in
cases of power at least 80 %. `!` stands behind a share that misses its limit by more than three binomial
errors, `~` behind one that does within them. Exit status 1 if there is a `!`.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from calibration_cases import CASES
from calibration_simulation import Array, Case, Judged, Model, judge_cases

import gkd_lab

FALSE_VERDICTS, COVERAGE, PLAIN_COVERAGE, POWER = 0.035, 0.93, 0.98, 0.8
THREE_ERRORS = 0.00135
"""Tail of a normal distribution beyond three standard errors."""


# ---- tables ----

_COLUMNS = (
    "cell", "role", "scale", "task", "student", "teacher", "seed", "lmbda", "divergence", "beta",
    "learning_rate", "train_rows", "evaluation", "decoding", "temperature", "split", "metric", "value",
    "n_examples", "text", "reward", "distillation_share", "anchor", "start_cell", "status",
)  # fmt: skip
_DECLARED_AXES = ("learning_rate", "train_rows")


@cache
def build_table(case: Case) -> pd.DataFrame:
    """Build the long table of a case without values: a row per model and seed, one per reference model."""
    rows = [
        _build_row(case, number, model, seed)
        for number, model in enumerate(case.models)
        for seed in ([None] if model.is_reference else range(case.seeds))
    ]
    absent = [name for name in _DECLARED_AXES if all(row[name] is None for row in rows)]
    table = pd.DataFrame(rows, columns=list(_COLUMNS)).drop(columns=absent)
    return table.astype({"seed": "Int64", "lmbda": float, "beta": float, "value": float})


def _build_row(case: Case, number: int, model: Model, seed: int | None) -> dict[str, Any]:
    """Build the row of one model and seed."""
    settings = model.settings
    evaluation = f"{settings['decoding']}{settings.get('temperature', '')}"
    return {
        **dict.fromkeys(_COLUMNS),
        **{"role": "cell", "scale": "nano", "student": "small", "teacher": "teacher", "divergence": "jsd"},
        **{"evaluation": evaluation, "split": "test", "text": "data", "reward": False, "status": "done"},
        **settings,
        **{"cell": f"m{number}s{seed}", "seed": seed, "start_cell": None if seed is None else "m0sNone"},
        **{"value": math.nan, "n_examples": case.examples},
    }


@cache
def build_examples(case: Case) -> pd.DataFrame:
    """Build the frame of a case's scores of examples, without values."""
    table, count = build_table(case), case.examples
    names = {name: pd.Categorical(table[name]).repeat(count) for name in ("cell", "evaluation", "metric")}
    return pd.DataFrame({**names, "example": np.tile(np.arange(count), len(table)), "value": math.nan})


def judge_scores(case: Case, scores: Array, examples: Array | None) -> Judged:
    """Judge (M, S) scores, and (M, S, N) scores of examples, by `gkd_lab.judge`."""
    table = build_table(case)
    table["value"] = _flatten(case, scores)
    frame = None
    if examples is not None:
        frame = build_examples(case)
        frame["value"] = _flatten(case, examples)
    row = gkd_lab.judge(table, [case.claim], frame).iloc[0]
    effect, low, high = (math.nan if pd.isna(row[name]) else float(row[name]) for name in Judged._fields[1:])
    return Judged(row["verdict"], effect, low, high)


def _flatten(case: Case, values: Array) -> Array:
    """Return (M, S, ...) values in the order of the table's rows; those of lm-eval are shares of 1."""
    parts = [
        (values[n, :1] if model.is_reference else values[n]).ravel()
        * (0.01 if model.settings["metric"] == "acc" else 1.0)
        for n, model in enumerate(case.models)
    ]
    return np.concatenate(parts)


# ---- shares and limits ----


class Check(NamedTuple):
    """A share of tables with its limit."""

    name: str
    hits: int
    tables: int
    limit: float
    is_upper: bool

    @property
    def mark(self) -> str:
        """`!` beyond three binomial errors of the limit, `~` on its wrong side, else empty."""
        from scipy.special import bdtr

        expected = self.limit * self.tables
        if self.hits <= expected if self.is_upper else self.hits >= expected:
            return ""
        if self.is_upper:
            tail = 1 - bdtr(self.hits - 1, self.tables, self.limit)
        else:
            tail = bdtr(self.hits, self.tables, self.limit)
        return "!" if tail < THREE_ERRORS else "~"


class Shares(NamedTuple):
    """Counts over the tables of one case."""

    tables: int
    holds: int
    fails: int
    intervals: int
    covered: int
    mean_width: float
    mean_effect: float


def count_verdicts(case: Case, judged: Sequence[Judged]) -> Shares:
    """Count verdicts, intervals, and intervals that cover the true effect."""
    effect, low, high = np.array([table[1:] for table in judged]).T
    has_interval = ~(np.isnan(low) | np.isnan(high))
    covered = has_interval & (low <= case.effect) & (case.effect <= high)
    return Shares(
        len(judged),
        sum(table.verdict == "holds" for table in judged),
        sum(table.verdict == "fails" for table in judged),
        int(has_interval.sum()),
        int(covered.sum()),
        float((high - low)[has_interval].mean()) if has_interval.any() else math.nan,
        float(np.nanmean(effect)),
    )


def list_checks(case: Case, shares: Shares) -> list[Check]:
    """Return the shares of a case that have a limit; none in a case of stress."""
    if case.is_stress:
        return []
    checks = [Check("coverage", shares.covered, shares.intervals, COVERAGE, False)]
    if case.is_plain:
        checks.append(Check("coverage", shares.covered, shares.intervals, PLAIN_COVERAGE, True))
    distance = case.effect + case.margin
    if distance <= 0 and not case.is_measurement:
        checks.append(Check("holds", shares.holds, shares.tables, FALSE_VERDICTS, True))
    if distance >= 0 and not case.is_measurement:
        checks.append(Check("fails", shares.fails, shares.tables, FALSE_VERDICTS, True))
    if case.has_power:
        checks.append(Check("holds", shares.holds, shares.tables, POWER, False))
    return checks


# ---- output ----


def format_row(case: Case, shares: Shares, old: Shares | None) -> str:
    """Format a case as a row of the Markdown table."""
    marks: dict[str, str] = {}
    for check in list_checks(case, shares):
        marks[check.name] = marks.get(check.name, "") + check.mark
    distance = case.effect + case.margin
    truth = "measured" if case.is_measurement else "true" if distance > 0 else "boundary"
    before = [] if old is None else _format_shares(old, {})
    words = [case.name, truth, *before, *_format_shares(shares, marks), f"{shares.mean_width:.2f}"]
    return f"| {' | '.join('' if word == 'nan' else word for word in words)} |"


def _format_shares(shares: Shares, marks: dict[str, str]) -> list[str]:
    """Format the shares of `holds`, of `fails` and of intervals that cover, with their marks."""
    counts = {
        "holds": (shares.holds, shares.tables),
        "fails": (shares.fails, shares.tables),
        "coverage": (shares.covered, shares.intervals),
    }
    return [
        f"{100 * count / total:.1f} {marks.get(name, '')}".strip() if total else ""
        for name, (count, total) in counts.items()
    ]


def print_table(cases: Sequence[Case], shares: dict[str, Shares], old: dict[str, Shares]) -> None:
    """Print the Markdown table of all cases; shares in per cent."""
    names = ["holds", "fails", "coverage"]
    before = [f"before: {names[0]}", *names[1:], f"now: {names[0]}", *names[1:]] if old else names
    header = ["case", "claim is", *before, "width"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for case in cases:
        print(format_row(case, shares[case.name], old.get(case.name)))


def read_old_shares(path: Path, cases: Sequence[Case]) -> dict[str, Shares]:
    """Read the counts of the old rules from the JSON of an earlier run."""
    rows = {row["case"]: row["before"] for row in json.loads(path.read_text())["cases"]}
    counts: dict[str, list[Any]] = {
        name: [math.nan if shares[field] is None else shares[field] for field in Shares._fields]
        for name, shares in rows.items()
    }
    return {case.name: Shares(*counts[case.name]) for case in cases}


def run_old_rules(checkout: Path, cases: Sequence[Case], tables: int, workers: int) -> dict[str, Shares]:
    """Judge the same scores by the rules of an older checkout, in a process that imports it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "judged.json"
        script = Path(__file__).with_name("calibration_old.py")
        command = [sys.executable, str(script), str(out), str(tables), str(workers)]
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        subprocess.run([*command, *(case.name for case in cases)], env=environment, check=True)
        judged = json.loads(out.read_text())
    return {
        case.name: count_verdicts(case, [Judged(*table) for table in judged[case.name]]) for case in cases
    }


def write_json(path: Path, cases: Sequence[Case], shares: dict[str, Shares], old: dict[str, Shares]) -> None:
    """Write counts, limits and versions."""
    lines = []
    for case in cases:
        row: dict[str, Any] = {"case": case.name, "claim": case.claim, "effect": case.effect}
        row |= {"margin": case.margin, "now": _round_shares(shares[case.name])}
        row["before"] = _round_shares(old[case.name]) if old else None
        checks = list_checks(case, shares[case.name])
        row["limits"] = [[c.name, "<=" if c.is_upper else ">=", c.limit, c.mark] for c in checks]
        lines.append(json.dumps(row, ensure_ascii=False).replace("NaN", "null"))
    versions = {package: version(package) for package in ("numpy", "pandas", "scipy")}
    machine = {"device": platform.machine(), "cpus": os.cpu_count(), "versions": versions}
    path.write_text(f'{json.dumps(machine)[:-1]}, "cases": [\n' + ",\n".join(lines) + "\n]}\n")


def _round_shares(shares: Shares) -> dict[str, float]:
    """Return the counts by name, means with four decimals."""
    return {name: round(value, 4) for name, value in shares._asdict().items()}


def main() -> int:
    """Judge the cases, print, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", type=int, default=4000)
    parser.add_argument("--case", nargs="+", default=[""], help="only cases whose names contain one of these")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--old", type=Path, help="a checkout of commit 72e5606, or a JSON file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="10 tables")
    options = parser.parse_args()
    tables = 10 if options.smoke else options.tables
    cases = [case for case in CASES if any(text in case.name for text in options.case)]
    if not cases:
        parser.error(
            f"no case contains {' or '.join(options.case)}; {len(CASES)} are in calibration_cases.py"
        )
    judged = judge_cases(cases, judge_scores, tables, options.workers)
    shares = {case.name: count_verdicts(case, judged[case.name]) for case in cases}
    old: dict[str, Shares] = {}
    if options.old is not None and options.old.is_file():
        old = read_old_shares(options.old, cases)
    elif options.old is not None:
        old = run_old_rules(options.old, cases, min(tables, 1000), options.workers)
    print_table(cases, shares, old)
    if options.json:
        write_json(options.json, cases, shares, old)
    checks = [(case, check) for case in cases for check in list_checks(case, shares[case.name])]
    missed = [f"{case.name}: {check.name}" for case, check in checks if check.mark == "!"]
    print(f"\n{len(checks)} limits, {len(missed)} missed{': ' if missed else ''}{'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
