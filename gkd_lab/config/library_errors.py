"""Sentences for errors of libraries: what is wrong, in which file, and the way out, in one line.

The libraries' own text is in the traceback, which the record of a failed part keeps.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from gkd_lab.config.checkpoint_files import CheckpointFiles
from gkd_lab.config.errors import ConfigError, suggest_choices
from gkd_lab.config.hub_cache import is_hub_offline

_PACKAGE_FOLDER = str(Path(__file__).parents[1]) + os.sep
_MAX_CHARACTERS = 200
"""Of a library's text that no rule below explains."""

OUT_OF_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "defaultcpuallocator")
OUT_OF_MEMORY_REMEDY = (
    "take smaller models, shorter max_input_tokens and max_output_tokens, or a device with more memory"
)

_UNREACHABLE = re.compile(
    r"couldn't connect to|OfflineModeIsEnabled|LocalEntryNotFound|in the local cache|offline mode|"
    r"Couldn't reach|Max retries exceeded|Name or service not known|Connection (refused|error)|timed out"
)
_GATED = re.compile(r"gated repo|GatedRepo|401 Client|403 Client|Unauthorized|is a gated", re.IGNORECASE)
_ABSENT = re.compile(r"not a valid model identifier|Repository Not Found|404 Client|doesn't exist on the Hub")

_MODEL_RULES: Sequence[tuple[str, str]] = (
    (
        r"does not appear to have a file named (?P<file>\S+)",
        "it has no file {file}: copy the model's folder again",
    ),
    (
        r"model type `(?P<type>[^`]*)` but Transformers does not recognize",
        "its model type {type!r} is unknown to transformers {version}: correct `model_type` in config.json, "
        "or install a transformers that has it",
    ),
    (
        r"custom code|trust_remote_code",
        "it has Python code of its own, which is never run: choose a model that transformers has built in",
    ),
    (
        r"ignore_mismatched_sizes|size mismatch",
        "its weights have other shapes than its config.json says: copy both from the same model",
    ),
    (
        r"Weights only load failed|UnpicklingError|PytorchStreamReader|invalid magic number",
        "its pytorch_model.bin is damaged, or holds more than weights: copy it again, or save the model as "
        "safetensors",
    ),
    (
        r"[Ee]rror while deserializing|HeaderTooLarge|MetadataIncompleteBuffer|incomplete metadata|"
        r"SafetensorError",
        "its file of weights is cut short or damaged: copy it again",
    ),
    (
        r"Field '(?P<name>\w+)' expected (?P<type>\w+), got (?P<other>[^\n]*)",
        "its config.json is not valid: {name} must be of type {type}, got {other}",
    ),
    (
        r"Class validation error for validator.*?\n\s*\w+: (?P<reason>[^\n]*)",
        "its config.json is not valid: {reason}",
    ),
    (
        r"backend tokenizer|sentencepiece|tiktoken|SentencePiece|protobuf|tokenizer",
        "it has no tokenizer that transformers can read: save the model's tokenizer.json there (another form "
        "needs the packages sentencepiece and protobuf, or tiktoken)",
    ),
    (
        r"Target modules? (?P<names>.*?) not found in the base model",
        "its adapter names layers that the base model lacks, {names}: take the base that it was trained on",
    ),
    (
        r"No such file or directory:? (?P<file>\S+)",
        "the file {file} is missing: copy the model's folder again",
    ),
)
"""Pattern in a library's text -> what is wrong and the way out, with the pattern's groups."""


def explain_model_error(error: BaseException, place: str) -> str:
    """Return what is wrong with a model's folder or hub name, and the way out, for an error of loading it.

    Faults of a folder's files come first, each with its file.
    """
    faults = list(CheckpointFiles(Path(place)).list_faults()) if Path(place).is_dir() else []
    if faults:
        return "; ".join(faults)
    text = _collect_text(error)
    if is_out_of_memory_text(text) or isinstance(error, MemoryError):
        return "it does not fit into memory: take a smaller model, or a device with more memory"
    if not Path(place).exists() and (reason := _explain_hub_error(text, place, "model")):
        return reason
    for pattern, sentence in _MODEL_RULES:
        if match := re.search(pattern, text, re.DOTALL):
            groups = {group: (value or "").strip() for group, value in match.groupdict().items()}
            return sentence.format(**groups, version=version("transformers"))
    return f"it cannot be loaded: {_shorten(error)}"


@contextmanager
def explain_model_errors(place: str, name: str) -> Iterator[None]:
    """Raise ConfigError `NAME PLACE: REASON` of `explain_model_error` for an error of loading in the block.

    name: What the model is in the request, such as `teacher`. Sentences of this package stay as they are, and
    so do errors of the machine, which have a number.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, ConfigError) else error
        if cause is None or _is_machine_error(cause) or _is_package_sentence(cause):
            raise
        raise ConfigError(f"{name} {place}: {explain_model_error(cause, place)}") from error


def _is_machine_error(error: BaseException) -> bool:
    """Return whether the operating system raised an error, other than for a file that is missing."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)


def _is_package_sentence(error: BaseException) -> bool:
    """Return whether an error is a ValueError that this package raised, whose text is a sentence of ours."""
    return isinstance(error, ValueError) and is_raised_here(error)


def explain_data_error(error: BaseException, name: str, config: str | None, field: str) -> str:
    """Return a sentence for an error of `datasets.load_dataset` on a data set of the hub: `FIELD: REASON`.

    field: Name of the field of the request that names the data set; its config is beside it.
    """
    text = _collect_text(error)
    prefix, _, _ = field.rpartition(".")
    config_field = f"{prefix}.config" if prefix else "dataset_config"
    if match := re.search(
        r"BuilderConfig '?(?P<config>.*?)'? not found. Available: \[(?P<names>.*?)\]", text
    ):
        choices = suggest_choices(config, _split_names(match["names"]))
        return f"{config_field}: {name!r} has no config {config!r}; {choices}"
    if match := re.search(r"Config name is missing.*?\[(?P<names>.*?)\]", text, re.DOTALL):
        names = ", ".join(_split_names(match["names"]))
        return f"{config_field} is missing: {name!r} has several configs, name one; valid: {names}"
    if reason := _explain_hub_error(text, name, "dataset"):
        return f"{field}: {name!r}: {reason}"
    if re.search(r"scripts are no longer supported|trust_remote_code|loading script", text):
        reason = "it has Python code of its own, which is never run: give a folder of jsonl or parquet"
        return f"{field}: {name!r}: {reason}"
    if re.search(r"DatasetGeneration|ArrowInvalid|CastError|ParserError|JSON parse error", text):
        reason = f"its files cannot be read as rows: {_shorten(error.__cause__ or error)}"
        return f"{field}: {name!r}: {reason}; give a folder of jsonl or parquet"
    if re.search(r"DataFilesNotFound|No \(supported\) data files", text):
        return f"{field}: {name!r}: it has no file of rows; give another data set, or a folder"
    return f"{field}: {name!r} cannot be loaded: {_shorten(error)}"


def _explain_hub_error(text: str, name: str, kind: str) -> str | None:
    """Return why a model or data set could not be fetched from the hub; None for another error."""
    if _GATED.search(text):
        return "access to it is restricted: ask for it on its page of the hub, then `hf auth login`"
    if _ABSENT.search(text):
        return f"the hub has no such {kind}, or not for this login: correct the name, or give a folder"
    if not _UNREACHABLE.search(text):
        return None
    why = "HF_HUB_OFFLINE is set" if is_hub_offline() else "the hub cannot be reached"
    load = (
        f"`hf download {name}`" if kind == "model" else f"`datasets.load_dataset({name!r})` of this revision"
    )
    return f"it is not in the local cache and {why}: call {load} once with a network, or give a folder"


def format_error(error: BaseException) -> str:
    """Return the one line of an error that a record and the command line show.

    Errors that this package words itself are their sentence; of others the type and the first line remain.
    """
    text, is_ours = str(error), is_raised_here(error)
    if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory_text(f"{type(error)} {text}"):
        advice = f"out of memory: take a smaller batch_size; or {OUT_OF_MEMORY_REMEDY}"
        return join_lines(text) if is_ours else advice
    if is_ours:
        return join_lines(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")
    return _shorten(error)


def is_out_of_memory_text(text: str) -> bool:
    """Return whether an error's text says that memory ran out, on a GPU or as PyTorch says it on a CPU."""
    return any(phrase in text.lower() for phrase in (*OUT_OF_MEMORY_PHRASES, "outofmemory"))


def is_raised_here(error: BaseException) -> bool:
    """Return whether a function of this package raised the error, so that its text is ours."""
    frame: TracebackType | None = error.__traceback__
    if frame is None:
        return isinstance(error, ConfigError)
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_code.co_filename.startswith(_PACKAGE_FOLDER)


def join_lines(text: str) -> str:
    """Return a text as one line, each run of white space as one blank."""
    return " ".join(text.split())


def _collect_text(error: BaseException | None) -> str:
    """Return types and texts of an error and its causes, in which the rules look."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def _shorten(error: BaseException) -> str:
    """Return `TYPE: FIRST LINE` of an error, cut to `_MAX_CHARACTERS`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 4]} ..."


def _split_names(text: str) -> list[str]:
    """Return the names in the text of a Python list of texts."""
    return [name.strip().strip("'\"") for name in text.split(",")]
