"""Facts and faults of a checkpoint folder, read in milliseconds: no weights are loaded, nor torch."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.tokenizer_files import TokenizerFiles, read_json_fields

_ENCODER_DECODER_TYPES = {"t5", "mt5", "umt5", "longt5", "bart", "mbart", "pegasus", "marian", "led"}
"""Types of models whose older configurations do not say that they are encoder-decoders."""
_CLASSIFIER_ENDINGS = ("ForSequenceClassification", "ForTokenClassification")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_WEIGHTS_INDEX = "pytorch_model.bin.index.json"
_TOKENIZERS = ("tokenizer.json", "*.model", "*.spm", "vocab*.json", "vocab.txt", "tekken.json")
"""Forms of a tokenizer's files."""
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of settings, which the library reads or, where they are damaged, ignores in part."""
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_BYTE_TOKENIZERS = {"ByT5Tokenizer", "PerceiverTokenizer", "CanineTokenizer"}
"""Tokenizers that need no file, because their tokens are bytes or characters."""
_RELATIVE_POSITIONS = ("rope_theta", "rope_parameters", "rope_scaling", "relative_attention_num_buckets")
"""Fields of a configuration whose model has no last position."""
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_target_positions")


@dataclass(frozen=True)
class CheckpointFiles:
    """Files of a checkpoint folder.

    Of a .gguf file, and of an adapter, which has no configuration and weights of its own, nothing is known.
    """

    path: Path
    is_partial: bool = False
    """Whether further files may be fetched: those of a hub's cache. Missing ones are no faults then."""

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration; {} without a valid one."""
        return read_json_fields(self.path / "config.json")

    def _has_tokenizer(self) -> bool:
        """Return whether the folder has a tokenizer's files, or names one that needs none."""
        if any(any(self.path.glob(pattern)) for pattern in _TOKENIZERS):
            return True
        settings = read_json_fields(self.path / "tokenizer_config.json")
        return settings.get("tokenizer_class") in _BYTE_TOKENIZERS

    @property
    def is_folder_of_model(self) -> bool:
        """Whether the path is a folder that should hold a whole model."""
        return self.path.is_dir() and not (self.path / "adapter_config.json").is_file()

    @property
    def family(self) -> Family | None:
        """Family of the model by its configuration; None if it is unknown, or a classifier's."""
        architectures = self.config.get("architectures") or [""]
        model_type = self.config.get("model_type")
        if model_type is None or str(architectures[0]).endswith(_CLASSIFIER_ENDINGS):
            return None
        if self.config.get("is_encoder_decoder") or model_type in _ENCODER_DECODER_TYPES:
            return "encoder-decoder"
        return "decoder-only"

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens that the model has positions for; None if there is no bound."""
        if any(self.config.get(name) is not None for name in _RELATIVE_POSITIONS):
            return None
        limits = [self.config.get(name) for name in _LENGTH_FIELDS]
        return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)

    @cached_property
    def parameter_count(self) -> int | None:
        """Number of weights by the headers of the safetensors files; None without a readable one."""
        counts = [_count_weights(path) for path in self.path.glob("model*.safetensors")]
        return sum(filter(None, counts)) if counts and None not in counts else None

    @cached_property
    def tokenizer(self) -> TokenizerFiles | None:
        """The tokenizer of `tokenizer.json`; None without a valid one."""
        if not (self.path / "tokenizer.json").is_file():
            return None
        try:
            return TokenizerFiles(self.path)
        except Exception:
            # The library raises a bare Exception. `list_faults` says that the file is damaged.
            return None

    def list_faults(self) -> Iterator[str]:
        """Yield a sentence for each file that is missing or damaged."""
        if not self.is_folder_of_model:
            yield from self._list_adapter_faults()
            return
        damaged = list(filter(None, map(self._explain_json, _JSON_FILES)))
        yield from damaged
        if not (self.path / "config.json").is_file():
            if not self.is_partial:
                yield f"{self.path / 'config.json'} is missing"
        elif not damaged and not self.config.get("model_type"):
            yield f"{self.path / 'config.json'} is not the configuration of a model: it has no model_type"
        yield from self._list_weight_faults()
        if not self._has_tokenizer() and not self.is_partial:
            yield f"{self.path} has no tokenizer: tokenizer.json, or another form of it, is missing"
        elif (self.path / "tokenizer.json").is_file() and self.tokenizer is None:
            yield f"{self.path / 'tokenizer.json'} is damaged; copy it again"

    def _explain_json(self, name: str) -> str | None:
        """Return a sentence if the folder has this file of settings, and it is no JSON; else None."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            return f"{path}:{error.lineno} is not valid JSON; copy the file again"
        except (OSError, UnicodeDecodeError):
            return f"{path} cannot be read as text; copy the file again"
        return None

    def _list_adapter_faults(self) -> Iterator[str]:
        """Yield a sentence if the path is the folder of an adapter without weights, or with damaged ones."""
        if self.path.is_dir():
            if not self.is_partial and not any((self.path / name).is_file() for name in _ADAPTER_WEIGHTS):
                yield f"{self.path} has no weights of its adapter: {_ADAPTER_WEIGHTS[0]} is missing"
            if (self.path / _ADAPTER_WEIGHTS[0]).is_file():
                yield from _check_safetensors(self.path / _ADAPTER_WEIGHTS[0])

    def _list_weight_faults(self) -> Iterator[str]:
        """Yield a sentence for each file of weights that is missing or cut short."""
        has_weights = any((self.path / name).is_file() for name in (*_WEIGHTS, _WEIGHTS_INDEX))
        if not has_weights and not self.is_partial:
            yield f"{self.path} has no weights: {_WEIGHTS[0]}, its shards, or {_WEIGHTS[-1]} is missing"
        shards = []
        for index in (_WEIGHTS[1], _WEIGHTS_INDEX):
            if (self.path / index).is_file() and not (self.path / _WEIGHTS[0]).is_file():
                weight_map = read_json_fields(self.path / index).get("weight_map")
                if isinstance(weight_map, dict):
                    shards = sorted(set(map(str, weight_map.values())))
                else:
                    yield f"{self.path / index} is damaged; copy it again"
        for name in shards:
            if not (self.path / name).is_file() and not self.is_partial:
                yield f"{self.path / name} is missing"
        for path in sorted(self.path.glob("*.safetensors")):
            yield from _check_safetensors(path)


def _count_weights(path: Path) -> int | None:
    """Return the number of weights in a safetensors file by its header; None if that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _check_safetensors(path: Path) -> Iterator[str]:
    """Yield a sentence if a file's header is damaged, or does not fit the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        reason = str(error).rpartition(": ")[2]
        yield f"{path} is cut short or damaged ({reason}; {path.stat().st_size:,} bytes); copy it again"
