"""Errors of the libraries that load models and data become one sentence with the place and the way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from gkd_lab.config import ConfigError
from gkd_lab.config.artifact_specs import ModelSpec
from gkd_lab.config.library_errors import explain_data_error, explain_model_errors, format_error
from gkd_lab.models.pretrained import load_pretrained
from gkd_lab.tasks import get_task, load_rows

from ..training.scripts import chat_tokenizer, llama, saved


def change_settings(file: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        settings = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    return change


def drop_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def replace_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def replace_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_text("no tokenizer")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown type": (change_settings("config.json", model_type="foo"), "its model type 'foo' is unknown to"),
    "other shapes": (
        change_settings("config.json", hidden_size=48),
        "other shapes than its config.json says",
    ),
    "code": (
        change_settings("config.json", model_type="foo", auto_map={"AutoConfig": "a.B"}),
        "Python code of its own, which is never run",
    ),
    "text for a number": (
        change_settings("config.json", hidden_size="big"),
        "config.json is not valid: hidden_size must be of type int, got str (value: 'big')",
    ),
    "heads": (
        change_settings("config.json", num_attention_heads=5),
        "config.json is not valid: The hidden size (16) is not a multiple",
    ),
    "no tokenizer": (replace_tokenizer, "no tokenizer that transformers can read: save the model's"),
    "a weight": (drop_weight, "lack 1 of the model's weights, such as model.layers.0.mlp.down_proj.weight"),
    "cut weights": (cut_weights, "model.safetensors is cut short or damaged"),
    "a pickle": (replace_weights, "its pytorch_model.bin is damaged, or holds more than weights"),
    "no end token": (
        change_settings("tokenizer_config.json", eos_token=None, pad_token=None),
        "neither a pad nor an end token: set eos_token",
    ),
}
LIBRARY_WORDS = ("Traceback", "Couldn't instantiate", "weights_only", "trust_remote_code", "For details look")


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_model_is_one_sentence_with_its_folder(
    damage: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    saved(llama(1), folder, chat_tokenizer())
    damage(folder)
    with pytest.raises(ConfigError) as caught, explain_model_errors(str(folder), "teacher"):
        load_pretrained(ModelSpec(name="mine", path=str(folder)), "decoder-only", "fp32")
    message = str(caught.value)
    assert sentence in message and str(folder) in message and "\n" not in message
    assert not any(words in message for words in LIBRARY_WORDS) and len(message) < 500


def test_a_hub_model_that_is_not_cached_is_named_with_the_command_that_fetches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as caught, explain_model_errors("own/none", "teacher"):
        load_pretrained(
            ModelSpec(name="none", pretrained="own/none", revision="a" * 40), "decoder-only", "fp32"
        )
    assert str(caught.value) == (
        "teacher own/none: it is not in the local cache and HF_HUB_OFFLINE is set: call "
        "`hf download own/none` once with a network, or give a folder"
    )


def test_errors_of_the_machine_and_sentences_of_ours_are_not_reworded(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), explain_model_errors(str(tmp_path), "teacher"):
        raise PermissionError(13, "Permission denied")
    with (
        pytest.raises(ConfigError, match=r"^our own sentence$"),
        explain_model_errors(str(tmp_path), "teacher"),
    ):
        raise ConfigError("our own sentence")


def test_an_error_without_a_rule_keeps_its_type_and_first_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught, explain_model_errors(str(tmp_path / "x.gguf"), "student"):
        raise KeyError("one\ntwo " + 400 * "long")
    message = str(caught.value)
    assert message.startswith(f"student {tmp_path}/x.gguf: it cannot be loaded: KeyError: ")
    assert "\n" not in message and len(message) < 400


# ---- data ----


def load_broken(*arguments: Any, **named: Any) -> Exception:
    try:
        datasets.load_dataset(*arguments, **named)
    except Exception as error:
        return error
    raise AssertionError("it loads")


def test_a_config_that_a_data_set_lacks_is_answered_with_its_configs(tmp_path: Path) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: a.jsonl\n" for name in ("main", "extra"))
    card = f"---\nconfigs:\n{configs}---\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    error = load_broken(str(tmp_path), "mian", cache_dir=tmp_path / "cache")
    message = explain_data_error(error, "own/rows", "mian", "data.source")
    assert message.startswith("data.config: 'own/rows' has no config 'mian'; did you mean 'main'? valid:")
    error = load_broken(str(tmp_path), cache_dir=tmp_path / "cache")
    message = explain_data_error(error, "own/rows", None, "data.source")
    assert message.startswith("data.config is missing: 'own/rows' has several configs, name one; valid: ")
    assert "main" in message and "extra" in message


def test_files_that_are_no_rows_are_named_without_the_reader_s_text(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    files = str(tmp_path / "a.parquet")
    error = load_broken("parquet", data_files=files, cache_dir=tmp_path / "cache")
    message = explain_data_error(error, "own/rows", None, "data.source")
    assert message.startswith("data.source: 'own/rows': its files cannot be read as rows: ")
    assert "\n" not in message and "DatasetGenerationError" not in message


def test_a_hub_data_set_that_is_not_cached_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigError, match=r"^data.source: 'own/rows': it is not in the local cache and HF_HUB"
    ):
        load_rows(get_task("arithmetic"), "hub", name="own/rows", revision="a" * 40, split="train")


def test_a_parquet_file_that_is_damaged_inside_is_named_with_the_row(tmp_path: Path) -> None:
    rows = {"question": [f"{n} + 1" for n in range(5000)], "answer": ["#### 1"] * 5000}
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), path, row_group_size=100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"train\.parquet: the file is damaged after row \d+; copy it again$"
    ):
        load_rows(get_task("arithmetic"), "folder", path=tmp_path, split="train")


# ---- what a record and the command line say ----


def raise_foreign(error: Exception) -> str:
    """Format an error as a library would raise it, outside of this package."""
    try:
        raise error
    except Exception as caught:
        return format_error(caught)


def test_out_of_memory_is_one_sentence_with_the_way_out() -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB ..."
    for error in (torch.OutOfMemoryError(text), RuntimeError("[enforce fail] DefaultCPUAllocator: can't")):
        message = raise_foreign(error)
        assert message.startswith("out of memory: take a smaller batch_size") and "GiB" not in message


def test_an_error_of_a_library_keeps_its_type_and_first_line_alone() -> None:
    assert raise_foreign(KeyError("x")) == "KeyError: 'x'"
    assert raise_foreign(ValueError("\none\n two")) == "ValueError: one"


def test_a_sentence_of_ours_has_no_type_in_front(tmp_path: Path) -> None:
    try:
        load_rows(get_task("arithmetic"), "folder", path=tmp_path / "none", split="train")
    except ValueError as error:
        assert format_error(error).startswith("no folder ")
