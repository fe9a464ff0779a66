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
from gkd_lab.config.cell import SftModel, Training
from gkd_lab.config.cost import NOMINAL_RATE, sft_flops, training_flops
from gkd_lab.config.fingerprint import canonical
from gkd_lab.status.model_sizes import parameters
from gkd_lab.store import Record, Store
from gkd_lab.store.files import read_json

Basis = Literal["finished cells", "FLOPs", "nothing"]
_MOST_READ = 200
"""Records of other experiments that are looked at for one task, newest first."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one training, and what they were made of."""

    seconds: float | None
    basis: Basis


@dataclass
class _Seen:
    """Finished cells of one kind on one device."""

    seconds: float = 0.0
    work: float = 0.0
    cells: int = 0


@dataclass
class Estimator:
    """Estimates for one scale of a store; asked for one cell after another."""

    store: Store
    scale: str
    _weights: dict[str, int | None] = field(default_factory=dict)
    _seen: dict[str, dict[str, _Seen]] = field(default_factory=dict)
    _kinds: dict[tuple[str, ...], str] = field(default_factory=dict)
    _looked_for: set[str] = field(default_factory=set)
    _known: dict[tuple[Any, ...], float | None] = field(default_factory=dict)
    _learnt: set[str] = field(default_factory=set)
    used: set[tuple[str, str]] = field(default_factory=set)
    """(kind, device) of the finished cells that some estimate rests on."""

    def learn(self, training: Training, status: Mapping[str, Any]) -> None:
        """Take what a finished cell took; one that was recorded without its times teaches nothing."""
        if training.full_fingerprint in self._learnt:
            return
        if status.get("state") == "done" and status.get("seconds") and status.get("shared_by"):
            self._learnt.add(training.full_fingerprint)
            kind = self._kind(training, packed=status["shared_by"] > 1)
            seen = self._seen.setdefault(kind, {}).setdefault(str(status.get("device")), _Seen())
            seen.seconds += status["seconds"] / status["shared_by"]
            seen.work += self._work(training)
            seen.cells += 1

    def of_cell(self, training: Training, *, packed: bool) -> Estimate:
        """Of one cell: alone, or its share of a pack."""
        kind = self._kind(training, packed=packed)
        if kind not in self._seen and training.task not in self._looked_for:
            self._looked_for.add(training.task)
            self._look_around(training.task)
        if kind in self._seen:
            device, seen = max(self._seen[kind].items(), key=lambda item: item[1].cells)
            self.used.add((kind, device))
            return Estimate(self._work(training) * seen.seconds / seen.work, "finished cells")
        return _counted(self._flops(training))

    def of_artifact(self, role: str, model: SftModel) -> Estimate:
        """Of building a teacher or a starting student."""
        return _counted(sft_flops(model, self._parameters(role, model)))

    def learnt_from(self) -> str | None:
        """`6 finished cells of the same kind (cpu)`; None where no estimate rests on any."""
        if not self.used:
            return None
        count = sum(self._seen[kind][device].cells for kind, device in self.used)
        devices = ", ".join(sorted({device for _, device in self.used}))
        return f"{count} finished cell{'s' * (count > 1)} of the same kind ({devices})"

    def _parameters(self, role: str, model: SftModel) -> int | None:
        key = model.full_fingerprint
        if key not in self._weights:
            self._weights[key] = parameters(model, self.store.artifact(self.scale, role, model))
        return self._weights[key]

    def _work(self, training: Training) -> float:
        """FLOPs; of models whose size is not known, as if both were of one weight: the scale cancels out."""
        known = self._flops(training)
        found = training_flops(training, 1, 1) if known is None else known
        assert found is not None
        return found

    def _flops(self, training: Training) -> float | None:
        key = (
            *(training.start.full_fingerprint, training.teacher.full_fingerprint),
            *(training.max_input_tokens, training.max_output_tokens),
            *(training.steps, training.batch_size, training.source.lmbda),
        )
        if key not in self._known:
            student = self._parameters("start", training.start)
            teacher = self._parameters("teacher", training.teacher)
            self._known[key] = training_flops(training, student, teacher)
        return self._known[key]

    def _kind(self, training: Training, *, packed: bool) -> str:
        parts = (
            training.start.full_fingerprint,
            training.teacher.full_fingerprint,
            *(str(training.max_input_tokens), str(training.max_output_tokens), training.precision),
            *(training.optimizer.name, str(packed)),
        )
        if parts not in self._kinds:
            models = [_same_for_all(model) for model in (training.start, training.teacher)]
            self._kinds[parts] = canonical([training.task, *models, *parts[2:]])
        return self._kinds[parts]

    def _look_around(self, task: str) -> None:
        for record in islice(_newest(self.store.root / self.scale / task), _MOST_READ):
            status = record.status()
            if status.get("shared_by"):
                for training in _training(record):
                    self.learn(training, status)


def _counted(flops: float | None) -> Estimate:
    return Estimate(None, "nothing") if flops is None else Estimate(flops / NOMINAL_RATE, "FLOPs")


def _same_for_all(model: SftModel) -> list[Any]:
    """Of a model what decides how fast it is; data by their form, as their content does not."""
    data = model.data
    return [
        *(model.family, model.model, model.precision, model.tokenizer),
        *(data.kind, data.name, data.config, data.shots),
    ]


def _newest(folder: Path) -> Iterable[Record]:
    """The cells of a task, whoever asked for them."""
    paths = [path for path in folder.glob("lmbda=*") if path.is_dir()]
    return (Record(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True))


def _training(record: Record) -> Iterator[Training]:
    """Its description, if it is one of this version's."""
    spec = (read_json(record.folder / "spec.json") or {}).get("spec")
    try:
        yield Training.model_validate(spec)
    except ValidationError:
        return


def learn_from(cells: Iterable[tuple[Cell, Mapping[str, Any]]], store: Store, scale: str) -> Estimator:
    """An estimator that knows the finished ones among these cells and their training's statuses."""
    found = Estimator(store, scale)
    for cell, status in cells:
        found.learn(cell.training, status)
    return found
