"""What a training will take: learnt from finished cells of the same kind, else from its FLOPs.

Of one kind are cells of the same models, form of data, lengths, precision and optimizer, packed or alone.
Steps, batch size and share of sampling scale by the FLOPs that they ask for.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from gkd_lab.config import Cell
from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import Training
from gkd_lab.config.cost import NOMINAL_FLOPS_PER_SECOND, estimate_sft_flops, estimate_training_flops
from gkd_lab.config.fingerprint import canonical_json
from gkd_lab.status.model_sizes import count_parameters
from gkd_lab.store import Record, Store
from gkd_lab.store.files import read_json

EstimateBasis = Literal["finished cells", "FLOPs", "nothing"]
_MAX_RECORDS_READ = 200
"""Records of other experiments that are looked at for one task, newest first."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one training, and what they were made of."""

    seconds: float | None
    basis: EstimateBasis


@dataclass
class _MeasuredTime:
    """Finished cells of one kind on one device."""

    seconds: float = 0.0
    flops: float = 0.0
    cells: int = 0


@dataclass
class TimeEstimator:
    """Estimates for one scale of a store; asked for one cell after another."""

    store: Store
    scale: str
    _parameter_counts: dict[str, int | None] = field(default_factory=dict)
    _measured_times: dict[str, dict[str, _MeasuredTime]] = field(default_factory=dict)
    _kind_keys: dict[tuple[str, ...], str] = field(default_factory=dict)
    _searched_tasks: set[str] = field(default_factory=set)
    _flops_cache: dict[tuple[Any, ...], float | None] = field(default_factory=dict)
    _added_fingerprints: set[str] = field(default_factory=set)
    used_measurements: set[tuple[str, str]] = field(default_factory=set)
    """(kind, device) of the finished cells that some estimate rests on."""

    def add_finished_cell(self, training: Training, status: Mapping[str, Any]) -> None:
        """Take what a finished cell took; one that was recorded without its times teaches nothing."""
        if training.full_fingerprint in self._added_fingerprints:
            return
        if status.get("state") == "done" and status.get("seconds") and status.get("shared_by"):
            self._added_fingerprints.add(training.full_fingerprint)
            kind = self._build_kind_key(training, is_packed=status["shared_by"] > 1)
            seen = self._measured_times.setdefault(kind, {}).setdefault(
                str(status.get("device")), _MeasuredTime()
            )
            seen.seconds += status["seconds"] / status["shared_by"]
            seen.flops += self._compute_relative_flops(training)
            seen.cells += 1

    def estimate_cell(self, training: Training, *, is_packed: bool) -> Estimate:
        """Of one cell: alone, or its share of a pack."""
        kind = self._build_kind_key(training, is_packed=is_packed)
        if kind not in self._measured_times and training.task not in self._searched_tasks:
            self._searched_tasks.add(training.task)
            self._add_cells_of_other_experiments(training.task)
        if kind in self._measured_times:
            device, seen = max(self._measured_times[kind].items(), key=lambda item: item[1].cells)
            self.used_measurements.add((kind, device))
            return Estimate(
                self._compute_relative_flops(training) * seen.seconds / seen.flops, "finished cells"
            )
        return _estimate_seconds(self._compute_flops(training))

    def estimate_artifact(self, role: str, model: SftModel) -> Estimate:
        """Of building a teacher or a starting student."""
        return _estimate_seconds(estimate_sft_flops(model, self._get_parameter_count(role, model)))

    def describe_source(self) -> str | None:
        """`6 finished cells of the same kind (cpu)`; None where no estimate rests on any."""
        if not self.used_measurements:
            return None
        count = sum(self._measured_times[kind][device].cells for kind, device in self.used_measurements)
        devices = ", ".join(sorted({device for _, device in self.used_measurements}))
        return f"{count} finished cell{'s' * (count > 1)} of the same kind ({devices})"

    def _get_parameter_count(self, role: str, model: SftModel) -> int | None:
        key = model.full_fingerprint
        if key not in self._parameter_counts:
            self._parameter_counts[key] = count_parameters(
                model, self.store.get_artifact(self.scale, role, model)
            )
        return self._parameter_counts[key]

    def _compute_relative_flops(self, training: Training) -> float:
        """FLOPs; of models whose size is not known, as if both were of one weight: the scale cancels out."""
        known = self._compute_flops(training)
        found = estimate_training_flops(training, 1, 1) if known is None else known
        assert found is not None
        return found

    def _compute_flops(self, training: Training) -> float | None:
        key = (
            *(training.start.full_fingerprint, training.teacher.full_fingerprint),
            *(training.max_input_tokens, training.max_output_tokens),
            *(training.steps, training.batch_size, training.source.lmbda),
        )
        if key not in self._flops_cache:
            student = self._get_parameter_count("start", training.start)
            teacher = self._get_parameter_count("teacher", training.teacher)
            self._flops_cache[key] = estimate_training_flops(training, student, teacher)
        return self._flops_cache[key]

    def _build_kind_key(self, training: Training, *, is_packed: bool) -> str:
        parts = (
            training.start.full_fingerprint,
            training.teacher.full_fingerprint,
            *(str(training.max_input_tokens), str(training.max_output_tokens), training.precision),
            *(training.optimizer.name, str(is_packed)),
        )
        if parts not in self._kind_keys:
            models = [_list_speed_fields(model) for model in (training.start, training.teacher)]
            self._kind_keys[parts] = canonical_json([training.task, *models, *parts[2:]])
        return self._kind_keys[parts]

    def _add_cells_of_other_experiments(self, task: str) -> None:
        for record in islice(
            _list_newest_cell_records(self.store.root / self.scale / task), _MAX_RECORDS_READ
        ):
            status = record.read_status()
            if status.get("shared_by"):
                for training in _load_training(record):
                    self.add_finished_cell(training, status)


def _estimate_seconds(flops: float | None) -> Estimate:
    return Estimate(None, "nothing") if flops is None else Estimate(flops / NOMINAL_FLOPS_PER_SECOND, "FLOPs")


def _list_speed_fields(model: SftModel) -> list[Any]:
    """Of a model what decides how fast it is; data by their form, as their content does not."""
    data = model.data
    return [
        *(model.family, model.model, model.precision, model.tokenizer),
        *(data.kind, data.name, data.config, data.shots),
    ]


def _list_newest_cell_records(folder: Path) -> Iterable[Record]:
    """The cells of a task, whoever asked for them."""
    paths = [path for path in folder.glob("lmbda=*") if path.is_dir()]
    return (Record(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True))


def _load_training(record: Record) -> Iterator[Training]:
    """Its description, if it is one of this version's."""
    spec = (read_json(record.folder / "spec.json") or {}).get("spec")
    try:
        yield Training.model_validate(spec)
    except ValidationError:
        return


def create_estimator(
    cells: Iterable[tuple[Cell, Mapping[str, Any]]], store: Store, scale: str
) -> TimeEstimator:
    """An estimator that knows the finished ones among these cells and their training's statuses."""
    found = TimeEstimator(store, scale)
    for cell, status in cells:
        found.add_finished_cell(cell.training, status)
    return found
