"""Starts of a cell's own seed and rows, checkpoints selected on validation rows, new texts every epoch."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gkd_lab.config import ConfigError, Grid
from gkd_lab.runner.run import run_grid
from gkd_lab.runner.training_inputs import load_examples, load_sft_student
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table

from .tiny_experiments import interrupted_at, options, tiny_grid

OWN_STARTS: dict[str, Any] = {
    "student": {
        **{"layers": 1, "width": 8, "heads": 2, "init_seed": "cell"},
        "sft": {"steps": 4, "rows": 12, "seed": "cell"},
    },
    "grid": {"lmbda": [0, 1], "seed": [3, 4]},
}
SELECTED = {
    **OWN_STARTS,
    "eval_every": 2,
    "eval_rows": 4,
    "evaluations": [{"decoding": "greedy"}, {"decoding": "greedy", "checkpoint": "best"}],
}


def read_files(grid: Grid, store: Store) -> dict[str, Any]:
    """Return selections and hashes of both checkpoints of all cells."""
    contents = {}
    for cell in grid.cells:
        record = store.get_record(cell)
        contents[cell.fingerprint] = record.read_selection(), record.read_history()
        for folder in (record.checkpoint, record.best_checkpoint):
            contents[f"{cell.fingerprint} {folder.name}"] = (folder / "model.safetensors").read_bytes()
    return contents


def test_seeds_start_from_students_of_their_own_and_share_a_pack(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **OWN_STARTS)
    store = Store(tmp_path / "outputs")
    run_grid(grid, options(store.root))
    starts = {cell.seed: cell.training.start for cell in grid.cells}
    assert {seed: (s.model.init_seed, s.sft and s.sft.seed) for seed, s in starts.items()} == {
        3: (3, 3),
        4: (4, 4),
    }
    assert {cell.training.train_rows for cell in grid.cells} == {12}
    packs = {tuple(store.get_record(cell).read_provenance()["pack"]) for cell in grid.cells}
    assert len(packs) == 1 and len(next(iter(packs))) == 4
    table = build_long_table(grid, store)
    seeds = table[table["role"] == "start"].groupby("cell")["seed"].first()
    assert sorted(seeds) == [3, 4]


def test_a_pack_of_several_starts_equals_its_cells_alone(tmp_path: Path) -> None:
    grids = [tiny_grid(tmp_path / name, "arithmetic", **OWN_STARTS) for name in ("packed", "alone")]
    losses = []
    for grid, pack in zip(grids, ("auto", "off"), strict=True):
        store = Store(tmp_path / pack)
        run_grid(grid, options(store.root, pack=pack))
        losses.append([store.get_record(cell).read_history()[-1]["loss"] for cell in grid.cells])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == len(losses[0])


def test_the_best_checkpoint_is_that_of_the_best_score(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **SELECTED)
    store = Store(tmp_path / "outputs")
    run_grid(grid, options(store.root))
    for cell in grid.cells:
        record = store.get_record(cell)
        rows = record.read_selection()
        assert [row["step"] for row in rows] == [2, 4]
        last, best = (load_file(f / "model.safetensors") for f in (record.checkpoint, record.best_checkpoint))
        is_last = rows[1]["accuracy"] > rows[0]["accuracy"]
        assert all(bool((last[name] == best[name]).all()) for name in last) == is_last
    names = {evaluation.name for cell in grid.cells for evaluation in cell.evaluations}
    assert names == {"greedy", "greedy+best"}
    table = build_long_table(grid, store)
    assert set(table["checkpoint"].dropna()) == {"last", "best"}


def test_an_interrupted_training_selects_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", **SELECTED)
    whole, resumed = Store(tmp_path / "whole"), Store(tmp_path / "resumed")
    run_grid(grid, options(whole.root))
    with interrupted_at(3, monkeypatch):
        run_grid(grid, options(resumed.root))
    run_grid(grid, options(resumed.root))
    assert read_files(grid, resumed) == read_files(grid, whole)


def test_a_new_text_of_the_teacher_in_every_epoch(tmp_path: Path) -> None:
    source = {"lmbda": 0, "text": {"samples": 3}}
    changes = {**OWN_STARTS, "grid": {"seed": [3]}, "source": source, "batch_size": 12}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    store = Store(tmp_path / "outputs")
    run_grid(grid, options(store.root))
    text = grid.cells[0].training.text_spec
    assert text is not None and (text.rows, text.text.samples) == (12, 3)
    lines = (store.get_teacher_text("nano", text).folder / "texts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 36
    assert sum(texts[n] == texts[n + 12] for n in range(12)) < 6
    assert store.get_record(grid.cells[0]).read_status()["state"] == "done"


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"evaluations": [{"decoding": "greedy", "checkpoint": "best"}]}, "eval_every"),
        ({"eval_rows": 4}, "eval_every"),
        ({"teacher": {"layers": 1, "width": 16, "heads": 2, "init_seed": "cell"}}, "teacher"),
        (
            {"source": {"lmbda": 0, "text": {"decoding": "greedy", "samples": 2}}, "grid": {"seed": [0]}},
            "samples",
        ),
    ],
)
def test_what_cannot_be_selected_or_seeded_is_refused(
    changes: dict[str, Any], value: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=value):
        tiny_grid(tmp_path, "arithmetic", **changes)


def test_distillation_uses_the_rows_of_the_sft_unless_told_otherwise(tmp_path: Path) -> None:
    rows = [
        tiny_grid(tmp_path, "arithmetic", **{**OWN_STARTS, **changes}).cells[0].training.train_rows
        for changes in ({}, {"train_rows": "all"}, {"train_rows": 20})
    ]
    assert rows == [12, None, 20]


def test_corrupted_text_is_new_in_every_epoch_and_keeps_its_ends(tmp_path: Path) -> None:
    source = {"lmbda": 0, "corrupted": {"share": 0.3, "samples": 3}}
    changes = {**OWN_STARTS, "grid": {"seed": [3]}, "source": source, "batch_size": 12}
    grid = tiny_grid(tmp_path, "arithmetic", **changes)
    store = Store(tmp_path / "outputs")
    run_grid(grid, options(store.root))
    (cell,) = grid.cells
    assert store.get_record(cell).read_status()["state"] == "done" and "corrupted-text" in cell.folder
    assert set(build_long_table(grid, store).query("role == 'cell'")["text"]) == {"corrupted"}
    student = load_sft_student(cell, options(store.root))
    examples = load_examples(cell, student.tokenizer, [], options(store.root))
    plain = tiny_grid(tmp_path / "plain", "arithmetic", **{**changes, "source": {"lmbda": 0}}).cells[0]
    targets = [e.completion_ids for e in load_examples(plain, student.tokenizer, [], options(store.root))]
    assert len(examples) == 36 and len(targets) == 12
    end = student.tokenizer.eos_token_id
    replaced = []
    for example, target in zip(examples, targets * 3, strict=True):
        assert [token == end for token in example.completion_ids] == [token == end for token in target]
        pairs = zip(example.completion_ids, target, strict=True)
        replaced += [token != original for token, original in pairs if original != end]
    assert 0.2 < sum(replaced) / len(replaced) < 0.4
    assert examples[0].completion_ids != examples[12].completion_ids


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"method": "sft"}, "set the same twice"),
        ({"objectives": [{"type": "cross_entropy"}]}, "cross_entropy would learn the random tokens"),
        ({"teacher_scores": "full"}, "teacher_scores hold the data's own targets"),
    ],
)
def test_corrupted_text_is_refused_where_it_would_be_learned(
    changes: dict[str, Any], value: str, tmp_path: Path
) -> None:
    source = {"lmbda": 0, "corrupted": {"share": 0.3, "samples": 3}}
    with pytest.raises(ConfigError, match=value):
        tiny_grid(
            tmp_path, "arithmetic", **{**OWN_STARTS, "grid": {"seed": [3]}, "source": source, **changes}
        )
