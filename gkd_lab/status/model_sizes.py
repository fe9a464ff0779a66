"""How many parameters a model has, without loading it: as described, as recorded, or by its files."""

import importlib.util
import json
import re
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from gkd_lab.config.artifact_specs import ModelSpec, SftModel
from gkd_lab.config.cost import count_model_parameters
from gkd_lab.store import Record

_LAYER = re.compile(r"(^|.*\.)(?:layers|layer|block|blk|h)\.(\d+)\.")
"""A stack and the number of a layer in it, in the names of transformers and of GGUF."""


def count_parameters(model: SftModel, record: Record) -> int | None:
    """Of a teacher or a starting student; None for a loaded one whose files are not here."""
    counted = count_model_parameters(model)
    if counted is not None:
        return counted
    built = record.read_status().get("parameters")
    return int(built) if built else in_files(model.model)


def in_files(model: ModelSpec) -> int | None:
    """Parameters of the layers that are kept of a local checkpoint, GGUF file or hub model in the cache."""
    place = Path(model.path) if model.path else _in_hub_cache(model)
    if place is None or not place.exists():
        return None
    sizes = dict(_of_gguf(place) if place.suffix == ".gguf" else _of_safetensors(place))
    return _of_kept_layers(sizes, model.keep_layers) if sizes else None


def _of_kept_layers(sizes: Mapping[str, int], kept: int | tuple[int, ...] | None) -> int:
    """All layers of a stack are of one size, to first order."""
    rest, stacks = 0, dict[str, dict[int, int]]()
    for name, size in sizes.items():
        match = _LAYER.match(name)
        if match is None:
            rest += size
        else:
            layers = stacks.setdefault(match[1], {})
            layers[int(match[2])] = layers.get(int(match[2]), 0) + size
    for layers in stacks.values():
        count = len(layers) if kept is None else kept if isinstance(kept, int) else len(kept)
        rest += sum(layers.values()) * min(count, len(layers)) // len(layers)
    return rest


def _of_safetensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Name -> numbers, from the headers: 8 bytes of length, then JSON (safetensors' format)."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        yield from ((name, prod(one["shape"])) for name, one in header.items() if name != "__metadata__")


def _of_gguf(path: Path) -> Iterator[tuple[str, int]]:
    if importlib.util.find_spec("gguf") is None:
        return
    import gguf

    yield from ((one.name, int(one.n_elements)) for one in gguf.GGUFReader(path).tensors)


def _in_hub_cache(model: ModelSpec) -> Path | None:
    if model.pretrained is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.pretrained, "config.json", revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None
