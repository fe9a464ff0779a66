"""Notes on a grid: collapsed cells, unused and undeclared fields, what decodes."""

import re
from pathlib import Path
from typing import Any

import pytest

from gkd_lab.experiments import load
from gkd_lab.status.grid_notes import (
    describe_collapsed,
    describe_decoding,
    describe_undeclared_fields,
    describe_unused_beta,
)
from gkd_lab.status.overview import build_overview
from gkd_lab.status.render import render_summary
from gkd_lab.store import Store

from ..tables.synthetic_store import build_grid


def test_total_variation_collapses_over_beta_with_a_note() -> None:
    grid = build_grid(grid={"divergence": ["jsd", "tv"], "beta": [0, 0.5, 1]})
    (note,) = describe_collapsed(grid)
    assert note.startswith("3 combinations are one cell")
    assert "divergence=tv beta=0.5" in note
    (note,) = describe_unused_beta(grid)
    assert note.endswith("1 of 4 cells")


def test_an_unused_beta_is_noted() -> None:
    (note,) = describe_unused_beta(build_grid(divergence="tv", beta=0.5, grid={"lmbda": [0, 1]}))
    assert note.endswith("2 of 2 cells")
    assert describe_unused_beta(build_grid(divergence="tv", grid={"lmbda": [0, 1]})) == []


def test_fields_that_differ_with_the_task_alone_are_noted_as_such() -> None:
    axes = {"task": ["arithmetic", "translation"], "lmbda": [0, 1]}
    before = describe_undeclared_fields(build_grid(task=None, grid=axes))
    (note,) = describe_undeclared_fields(
        build_grid(task=None, grid=axes, per_task={"translation": {"batch_size": 4}})
    )
    assert "batch_size" in note.removeprefix("what depends on the task: ").split(", ")
    assert not any("batch_size" in other for other in before)


@pytest.mark.parametrize(
    ("document", "notes"),
    [
        ({"grid": {"lmbda": [0, 1]}}, ["2 cells: fused steps"]),
        (
            {"grid": {"implementation": ["gkd_lab", "trl"]}},
            ["1 cell: fused", "1 cell: .* for TRL's samples"],
        ),
        (
            {"grid": {"lmbda": [0]}, "student": {"size": "small", "lora": {"targets": ["q_proj"]}}},
            ["1 cell: .*`generate`, as the model has an adapter"],
        ),
    ],
)
def test_the_plan_names_what_decodes(document: dict[str, Any], notes: list[str]) -> None:
    decode_notes = list(describe_decoding(build_grid(**document)))
    assert len(decode_notes) == len(notes)
    for note, pattern in zip(decode_notes, notes, strict=True):
        assert re.match(f"decoding of {pattern}", note)


@pytest.mark.parametrize(
    ("experiment", "ways"),
    [
        ("quickstart", ["fused steps, once their logits equal the model's own"]),
        ("lambda_beta_translation", ["fused steps, once their logits equal the model's own"]),
        ("classification", []),
    ],
)
def test_the_plan_of_an_experiment_names_what_decodes(
    experiment: str, ways: list[str], tmp_path: Path
) -> None:
    overview = build_overview(load(experiment, outputs=tmp_path), Store(tmp_path), "auto")
    assert [note.partition(": ")[2] for note in overview.decode_notes] == ways
    assert set(overview.decode_notes) <= set(render_summary(overview))
