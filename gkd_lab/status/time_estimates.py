"""Estimate training times from finished cells of the same kind, else from FLOPs.

Cells of one kind share models, form of data, lengths, precision and optimizer, and are all packed or all
alone. Their times are scaled by FLOPs to other steps, batch sizes and shares of sampling.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from gkd_lab.config import Cell, Evaluation
from gkd_lab.config.artifact_specs import SftModel
from gkd_lab.config.cell import AnyEvaluation, Training
from gkd_lab.config.checkpoint_files import CheckpointFiles
from gkd_lab.config.cost import (
    IMPORT_SECONDS,
    DeviceRate,
    count_model_parameters,
    count_sequential_tokens,
    estimate_decoding_seconds,
    estimate_sft_flops,
    estimate_training_flops,
    get_device_rate,
)
from gkd_lab.config.fingerprint import canonical_json
from gkd_lab.store import Record, Store
from gkd_lab.store.files import read_json
from gkd_lab.store.machine import MACHINE_FILE

EstimateBasis = Literal["finished cells", "FLOPs", "nothing"]
_MAX_RECORDS_READ = 200
"""Records of other experiments that are read for one task, newest first."""


@dataclass(frozen=True)
class Estimate:
    """Estimated seconds of one training and the basis of the estimate."""

    seconds: float | None
    basis: EstimateBasis


@dataclass
class _MeasuredTime:
    """Total time and FLOPs of finished cells of one kind on one device."""

    seconds: float = 0.0
    flops: float = 0.0
    cells: int = 0


@dataclass
class _DecodingTime:
    """Total rows and decoding time of the grid's finished evaluations of one kind."""

    rows: int = 0
    seconds: float = 0.0
    evaluations: int = 0


@dataclass
class TimeEstimator:
    """Estimates training times for one scale of a store."""

    store: Store
    scale: str
    decoding_bases: Counter[EstimateBasis] = field(default_factory=Counter)
    """Number of evaluations whose decoding was estimated on each basis."""
    used_measurements: set[tuple[str, str]] = field(default_factory=set)
    """(kind, device) of the finished cells that some estimate rests on."""
    _measured_times: dict[str, dict[str, _MeasuredTime]] = field(default_factory=dict)
    """Kind -> device -> time."""
    _decoding_times: dict[str, _DecodingTime] = field(default_factory=dict)
    """Kind of model and decoding -> time."""
    _added_fingerprints: set[str] = field(default_factory=set)
    _searched_tasks: set[str] = field(default_factory=set)
    _parameter_counts: dict[str, int | None] = field(default_factory=dict)
    _kind_keys: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _flops_cache: dict[tuple[Any, ...], float | None] = field(default_factory=dict)

    def add_finished_cell(self, training: Training, status: Mapping[str, Any]) -> None:
        """Add a done cell's time to those of its kind; without a time, or again: ignored."""
        if training.full_fingerprint in self._added_fingerprints:
            return
        if status.get("state") == "done" and status.get("seconds") and status.get("shared_by"):
            self._added_fingerprints.add(training.full_fingerprint)
            kind = self._build_kind_key(training, is_packed=status["shared_by"] > 1)
            device = str(status.get("device"))
            measured = self._measured_times.setdefault(kind, {}).setdefault(device, _MeasuredTime())
            measured.seconds += status["seconds"] / status["shared_by"]
            measured.flops += self._compute_relative_flops(training)
            measured.cells += 1

    def estimate_cell(self, training: Training, *, is_packed: bool) -> Estimate:
        """Estimate a cell's training seconds by finished cells of its kind, else by FLOPs.

        `is_packed`: its share of a pack, else alone. Records of other experiments are read once per task.
        """
        kind = self._build_kind_key(training, is_packed=is_packed)
        if kind not in self._measured_times and training.task not in self._searched_tasks:
            self._searched_tasks.add(training.task)
            self._add_cells_of_other_experiments(training.task)
        if kind in self._measured_times:
            devices = self._measured_times[kind]
            device, measured = max(devices.items(), key=lambda item: item[1].cells)
            self.used_measurements.add((kind, device))
            flops = self._compute_relative_flops(training)
            return Estimate(flops * measured.seconds / measured.flops, "finished cells")
        return self._estimate_by_rate(self._compute_flops(training), count_sequential_tokens(training))

    def estimate_artifact(self, role: str, model: SftModel) -> Estimate:
        """Estimate the seconds to train a teacher or an SFT student, by FLOPs only."""
        return self._estimate_by_rate(estimate_sft_flops(model, self.get_parameter_count(role, model)))

    def add_decoding_time(
        self, model: SftModel, evaluation: AnyEvaluation, rows: int, seconds: float
    ) -> None:
        """Add the time in which a finished evaluation of a cell decoded its rows."""
        kind = self._build_decoding_key("start", model, evaluation)
        measured = self._decoding_times.setdefault(kind, _DecodingTime())
        measured.rows += rows
        measured.seconds += seconds
        measured.evaluations += 1

    def estimate_decoding(self, role: str, model: SftModel, evaluation: AnyEvaluation) -> float | None:
        """Estimate the seconds of an evaluation: as finished ones of the grid took, else by FLOPs.

        None: unknown, as lm-eval's tasks are, whose number of documents is not known.
        """
        seconds: float | None = None
        basis: EstimateBasis = "nothing"
        if isinstance(evaluation, Evaluation):
            measured = self._decoding_times.get(self._build_decoding_key(role, model, evaluation))
            count = evaluation.examples or getattr(model.data, evaluation.split)
            if measured is not None:  # all rows of a folder are as many in each evaluation
                total = measured.seconds
                seconds = total / measured.rows * count if count else total / measured.evaluations
                basis = "finished cells"
            else:
                parameters = self.get_parameter_count(role, model)
                seconds = estimate_decoding_seconds(model, evaluation, parameters, self.rate)
                basis = "nothing" if seconds is None else "FLOPs"
        self.decoding_bases[basis] += 1
        return seconds

    @property
    def rate(self) -> DeviceRate:
        """Rate of the device that estimates from FLOPs assume."""
        return get_device_rate(self.scale)

    def read_import_seconds(self) -> float:
        """Return the seconds that loading the libraries took in the last run on these outputs, or usually."""
        seconds = (read_json(self.store.root / MACHINE_FILE) or {}).get("import_seconds")
        return float(seconds) if isinstance(seconds, int | float) else IMPORT_SECONDS

    def _estimate_by_rate(self, flops: float | None, tokens: float = 0.0) -> Estimate:
        """Estimate the time of so many FLOPs and tokens one after the other; None gives basis `nothing`."""
        if flops is None:
            return Estimate(None, "nothing")
        seconds = flops / self.rate.flops_per_second + tokens * self.rate.seconds_per_token
        return Estimate(seconds, "FLOPs")

    def _build_decoding_key(self, role: str, model: SftModel, evaluation: AnyEvaluation) -> str:
        """Return a text that is equal for evaluations whose times per row can be compared."""
        key = (role, model.full_fingerprint, evaluation.folder)
        if key not in self._kind_keys:
            decoding = evaluation.model_dump(mode="json", exclude={"metrics", "examples"})
            self._kind_keys[key] = canonical_json([role, *_list_speed_fields(model), decoding])
        return self._kind_keys[key]

    def describe_source(self) -> str | None:
        """Return `6 finished cells of the same kind (cpu)`; None where no estimate rests on any."""
        if not self.used_measurements:
            return None
        count = sum(self._measured_times[kind][device].cells for kind, device in self.used_measurements)
        devices = ", ".join(sorted({device for _, device in self.used_measurements}))
        return f"{count} finished cell{'s' * (count > 1)} of the same kind ({devices})"

    def get_parameter_count(self, role: str, model: SftModel) -> int | None:
        """Return a model's number of parameters; None if not specified and not built yet."""
        key = model.full_fingerprint
        if key not in self._parameter_counts:
            count = count_model_parameters(model)
            if count is None and model.model.path and model.model.keep_layers is None:
                count = CheckpointFiles(Path(model.model.path)).parameter_count
            if count is None:
                count = self.store.get_artifact(self.scale, role, model).read_status().get("parameters")
            self._parameter_counts[key] = count
        return self._parameter_counts[key]

    def _compute_relative_flops(self, training: Training) -> float:
        """Return a training's FLOPs, or if a size is unknown those with one parameter each.

        For comparison within one kind only.
        """
        flops = self._compute_flops(training)
        if flops is None:
            flops = estimate_training_flops(training, 1, 1)
        assert flops is not None
        return flops

    def _compute_flops(self, training: Training) -> float | None:
        """Return the FLOPs of a training, cached; None where the size of a model is unknown."""
        key = (
            *(training.start.full_fingerprint, training.teacher.full_fingerprint),
            *(training.max_input_tokens, training.max_output_tokens),
            *(training.steps, training.batch_size, training.source.lmbda, training.lora is None),
        )
        if key not in self._flops_cache:
            student = self.get_parameter_count("start", training.start)
            teacher = self.get_parameter_count("teacher", training.teacher)
            self._flops_cache[key] = estimate_training_flops(training, student, teacher)
        return self._flops_cache[key]

    def _build_kind_key(self, training: Training, *, is_packed: bool) -> str:
        """Return a text that is equal for cells of one kind, whose times can be compared."""
        parts = (
            training.start.full_fingerprint,
            training.teacher.full_fingerprint,
            *(training.max_input_tokens, training.max_output_tokens, training.precision),
            *(training.tf32, training.optimizer.name, is_packed, training.implementation, training.lora),
        )
        if parts not in self._kind_keys:
            models = [_list_speed_fields(model) for model in (training.start, training.teacher)]
            self._kind_keys[parts] = canonical_json([training.task, *models, *parts[2:]])
        return self._kind_keys[parts]

    def _add_cells_of_other_experiments(self, task: str) -> None:
        """Add times of a task's newest cell records (200 at most), any experiment's."""
        records = _list_newest_cell_records(self.store.root / self.scale / task)
        for record in islice(records, _MAX_RECORDS_READ):
            status = record.read_status()
            training = _load_training(record) if status.get("shared_by") else None
            if training is not None:
                self.add_finished_cell(training, status)


def create_estimator(
    cells: Iterable[tuple[Cell, Mapping[str, Any]]], store: Store, scale: str
) -> TimeEstimator:
    """Create an estimator from (cell, status of its training) pairs; only done ones count."""
    estimator = TimeEstimator(store, scale)
    for cell, status in cells:
        estimator.add_finished_cell(cell.training, status)
    return estimator


def _list_speed_fields(model: SftModel) -> list[Any]:
    """Return the fields of a model and its data that decide its speed, not the data's content."""
    data = model.data
    return [
        *(model.family, model.model, model.precision, model.tokenizer),
        *(data.kind, data.name, data.config, data.shots),
    ]


def _list_newest_cell_records(folder: Path) -> Iterator[Record]:
    """Yield the records of the cells in a task's folder, last modified first."""
    paths = [path for path in folder.glob("lmbda=*") if path.is_dir()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        yield Record(path)


def _load_training(record: Record) -> Training | None:
    """Load the training that a record specifies; None where this version cannot read it."""
    spec = (read_json(record.folder / "spec.json") or {}).get("spec")
    try:
        return Training.model_validate(spec)
    except ValidationError:
        return None
