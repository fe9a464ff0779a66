"""Cut a grid into units: the pieces of work that an engine such as Slurm starts, each by one command line.

A unit is an artifact that cells share (a reference model with its evaluations, a teacher's text or scores)
or a pack of cells. The units depend on the experiment's full list of cells and the pack limit, never on what
is left to do: a later process of any machine finds the same ids.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from gkd_lab.config.artifact_specs import SftModel, TeacherScoresSpec, TeacherTextSpec
from gkd_lab.config.cell import Cell, list_references
from gkd_lab.config.fingerprint import canonical_json, compute_fingerprint
from gkd_lab.config.packs import PackLimit, group_cells_into_packs

UnitKind = Literal["teacher", "start", "text", "scores", "pack"]
ArtifactSpec = SftModel | TeacherTextSpec | TeacherScoresSpec
ID_DIGITS = 12
"""Hexadecimal digits of a unit's id: among a million units two equal ids are unlikely."""

_OutputSpec = TypeVar("_OutputSpec", TeacherTextSpec, TeacherScoresSpec)
_KIND_NAMES = {"start": "SFT student", "text": "teacher's text", "scores": "teacher's scores"}


@dataclass(frozen=True)
class Unit:
    """A piece of work with what it needs: one artifact that cells share, or one pack of cells."""

    kind: UnitKind
    id: str
    """First hexadecimal digits of a hash of the kind and the full fingerprints of what the unit makes."""
    scale: str
    cells: tuple[Cell, ...]
    """Cells of a pack in the pack's order, or all cells of the grid that need the artifact."""
    spec: ArtifactSpec | None
    """Spec of the artifact; None for a pack."""
    needs: tuple[str, ...]
    """Ids of the units whose results each of its cells reads: if one of them fails, nothing is left to do."""
    partial_needs: tuple[str, ...] = ()
    """Ids of the units whose results some of its cells read: each seed may have a student of its own."""

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.cells[0].task

    @property
    def name(self) -> str:
        """Name for people: `arithmetic: teacher`, `arithmetic: pack of 5 cells`."""
        if self.kind != "pack":
            return f"{self.task}: {_KIND_NAMES.get(self.kind, self.kind)}"
        count = len(self.cells)
        return (
            f"{self.task}: {f'pack of {count} cells' if count > 1 else f'cell {self.cells[0].fingerprint}'}"
        )


def plan_units(cells: Sequence[Cell], limit: PackLimit) -> tuple[Unit, ...]:
    """Return the units of a grid's cells, each after those it needs; every cell is in exactly one pack."""
    artifacts: dict[str, Unit] = {}
    for reference in list_references(cells):
        _add_artifact(artifacts, reference.role, reference.model, reference.cells, ())
    for text, users in _group_by_spec((cell.training.text_spec, cell) for cell in cells):
        _add_artifact(artifacts, "text", text, users, [text.teacher])
    for scores, users in _group_by_spec((cell.training.scores_spec, cell) for cell in cells):
        read_specs: list[ArtifactSpec] = [scores.teacher]
        read_specs += [] if scores.text_spec is None else [scores.text_spec]
        _add_artifact(artifacts, "scores", scores, users, read_specs)
    packs = group_cells_into_packs(cells, limit)
    return (*artifacts.values(), *(_build_pack_unit(pack, artifacts) for pack in packs))


def list_needed_ids(cell: Cell, artifacts: Container[str]) -> list[str]:
    """Return the ids of the units whose results a cell's training reads, of those in `artifacts`."""
    training = cell.training
    made: list[tuple[UnitKind, ArtifactSpec | None]] = [
        *training.reference_models,
        ("text", training.text_spec),
        ("scores", training.scores_spec),
    ]
    ids = dict.fromkeys(_build_id(kind, [spec.full_fingerprint]) for kind, spec in made if spec is not None)
    return [unit_id for unit_id in ids if unit_id in artifacts]


def _group_by_spec(pairs: Iterable[tuple[_OutputSpec | None, Cell]]) -> list[tuple[_OutputSpec, list[Cell]]]:
    """Return (spec, its cells) per distinct spec, by first appearance; cells without one are left out."""
    groups: dict[str, tuple[_OutputSpec, list[Cell]]] = {}
    for spec, cell in pairs:
        if spec is not None:
            groups.setdefault(spec.full_fingerprint, (spec, []))[1].append(cell)
    return list(groups.values())


def _add_artifact(
    artifacts: dict[str, Unit],
    kind: UnitKind,
    spec: ArtifactSpec,
    cells: Sequence[Cell],
    read_specs: Sequence[ArtifactSpec],
) -> None:
    """Add the unit of an artifact that reads others; a served teacher among those is built by no unit."""
    ids = [
        _build_id("teacher" if isinstance(read, SftModel) else "text", [read.full_fingerprint])
        for read in read_specs
    ]
    unit_id = _build_id(kind, [spec.full_fingerprint])
    needs = tuple(need for need in ids if need in artifacts)
    artifacts[unit_id] = Unit(kind, unit_id, cells[0].scale, tuple(cells), spec, needs)


def _build_pack_unit(cells: Sequence[Cell], artifacts: Mapping[str, Unit]) -> Unit:
    """Return the unit of a pack, with what all of its cells need and what only some of them do."""
    counts = Counter(need for cell in cells for need in list_needed_ids(cell, artifacts))
    unit_id = _build_id("pack", [cell.full_fingerprint for cell in cells])
    return Unit(
        "pack",
        unit_id,
        cells[0].scale,
        tuple(cells),
        spec=None,
        needs=tuple(need for need, count in counts.items() if count == len(cells)),
        partial_needs=tuple(need for need, count in counts.items() if count < len(cells)),
    )


def _build_id(kind: UnitKind, fingerprints: Sequence[str]) -> str:
    """Return the id of the unit of a kind that makes what has these full fingerprints."""
    return compute_fingerprint(canonical_json([kind, *fingerprints]))[:ID_DIGITS]
