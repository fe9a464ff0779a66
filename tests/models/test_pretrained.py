"""Load folders and GGUF files, and build students from some of a model's layers."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gkd_lab.config.artifact_specs import ModelSpec
from gkd_lab.config.errors import ConfigError
from gkd_lab.encoding.batches import collate_examples
from gkd_lab.models.build import load_tokenizer
from gkd_lab.models.forward import compute_completion_logits
from gkd_lab.models.pretrained import keep_layers, load_pretrained

from .families import make
from .tiny import PAD, tiny_examples, tiny_model, tiny_tokenizer

LAYERS = 4
DEEP = ("llama", "qwen3", "gpt2", "gemma3", "t5", "bart")
RESIDUAL = ("o_proj", "down_proj", "c_proj", "SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")
"""Projections into the residual stream: with zeros there a layer is the identity."""


def deep(family: str) -> PreTrainedModel:
    """Build a model like those of `make`, with four layers in each stack."""
    small = make(family, 0)
    config = copy.deepcopy(small.config)
    for name in ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if getattr(config, name, None) == 2:
            setattr(config, name, LAYERS)
    if getattr(config, "layer_types", None):
        config.layer_types = 2 * list(config.layer_types)
    torch.manual_seed(0)
    model = type(small)(config).eval().to(torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    rows = collate_examples(tiny_examples(6), PAD, is_encoder_decoder=model.config.is_encoder_decoder)
    with torch.no_grad():
        return compute_completion_logits(model, rows)


@pytest.mark.parametrize("family", DEEP)
def test_keeping_all_layers_gives_the_same_model(family: str) -> None:
    model = deep(family)
    again = keep_layers(model, LAYERS)
    assert torch.equal(logits(again), logits(model))
    assert again.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("family", tuple(name for name in DEEP if name != "bart"))
def test_dropped_layers_act_as_the_identity(family: str) -> None:
    model, layers = deep(family), (0, 2)
    if family == "gemma3":
        layers = (0, 1, 3)
    small = keep_layers(model, layers)
    for name, module in model.named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if name.endswith(RESIDUAL) and numbers and numbers[0] not in layers:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", DEEP)
def test_the_smaller_model_has_separate_weights_and_can_be_saved_and_loaded(
    family: str, tmp_path: Path
) -> None:
    model = deep(family)
    before = logits(model)
    small = keep_layers(model, (0, 3))
    assert small.config.num_hidden_layers == 2
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again), logits(small))
    for parameter in small.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("count", "expected"), [(1, (0,)), (2, (0, 3)), (3, (0, 2, 3)), (4, (0, 1, 2, 3))])
def test_a_number_of_layers_is_spread_evenly(count: int, expected: tuple[int, ...]) -> None:
    model = deep("llama")
    assert torch.equal(logits(keep_layers(model, count)), logits(keep_layers(model, expected)))


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("llama", 5, "keep_layers 5: .*4 layers"),
        ("llama", (0, 4), r"\[0, 4\].*0 to 3"),
        ("llama", (2, 1), "ascending order"),
        ("llama", (), "ascending order"),
        ("t5", (1, 2), "0, holds T5's"),
    ],
)
def test_invalid_layers_are_refused(family: str, layers: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        keep_layers(deep(family), layers)  # type: ignore[arg-type]


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    model = tiny_model("decoder-only", 0, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    spec = ModelSpec(name="tiny", path=str(tmp_path), keep_layers=(1,))
    loaded, tokenizer = load_pretrained(spec, "decoder-only", "fp32")
    assert loaded.config.num_hidden_layers == 1
    assert tokenizer("a b").input_ids == tiny_tokenizer()("a b").input_ids


# ---- GGUF ----


@pytest.mark.parametrize("text", [None, '{"a": 1}'])
def test_a_folder_without_a_readable_tokenizer_is_named_in_one_sentence(
    text: str | None, tmp_path: Path
) -> None:
    tiny_model("decoder-only", 0).save_pretrained(tmp_path)
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"'{tmp_path}' has no tokenizer that transformers can read")
    assert "\n" not in str(caught.value)


def write_gguf(path: Path, model: PreTrainedModel, words: list[str]) -> None:
    """Write a Llama as an unquantized GGUF file, with a byte-level BPE tokenizer of a few words."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(_name_in_gguf(name), _in_gguf(name, value, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_IN_GGUF = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def _name_in_gguf(name: str) -> str:
    for ours, theirs in _IN_GGUF.items():
        name = name.replace(ours, theirs)
    return name.removeprefix("model.")


def _in_gguf(name: str, value: Tensor, config: object) -> Tensor:
    """Permute a head's features: llama.cpp rotates neighbours together, transformers the two halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads  # type: ignore[attr-defined]
    return value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape).contiguous()


def test_a_gguf_file_is_loaded_as_a_model_that_trains_and_is_saved(tmp_path: Path) -> None:
    model = tiny_model("decoder-only", 0, width=32, dtype=torch.float32)
    words = ["<pad>", "</s>", "<s>", *"abcdefghijklmnopqrstuvwxyz"][: model.config.vocab_size - 1]
    words += ["ab"] * (model.config.vocab_size - len(words))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, words)
    loaded, tokenizer = load_pretrained(ModelSpec(name="tiny", path=str(file)), "decoder-only", "fp32")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert tokenizer("ab", add_special_tokens=False).input_ids == [words.index("ab")]
    assert not hasattr(loaded.config, "quantization_config")
    compute_completion_logits(
        loaded, collate_examples(tiny_examples(2), PAD, is_encoder_decoder=False)
    ).sum().backward()
    loaded.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(again), logits(loaded))
