"""Which models have rotary frequencies that depend on a batch's length, and beyond how many tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config, T5Config

from gkd_lab.selfcheck.rotary import (
    describe_fixed_lengths,
    explain_length_dependence,
    find_fixed_length,
)


def build_llama(rope_type: str, **values: Any) -> LlamaConfig:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **values}
    return LlamaConfig(max_position_embeddings=128, rope_parameters=parameters)


def build_phi(tokens: int) -> Phi3Config:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    return Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=tokens,
        pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )


def test_dynamic_frequencies_are_fixed_up_to_the_model_s_positions() -> None:
    assert find_fixed_length(build_llama("dynamic", factor=2.0)) == ("dynamic", 128)


def test_longrope_frequencies_are_fixed_up_to_the_original_positions() -> None:
    assert find_fixed_length(build_phi(32)) == ("longrope", 32)


def test_layers_of_several_types_count_by_the_shortest() -> None:
    config = Gemma3TextConfig(
        max_position_embeddings=256,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    )
    assert find_fixed_length(config) == ("dynamic", 256)


@pytest.mark.parametrize(
    "config",
    (
        build_llama("default"),
        build_llama("linear", factor=2.0),
        build_llama("yarn", factor=2.0, original_max_position_embeddings=64),
        GPT2Config(),
        T5Config(),
    ),
)
def test_other_models_do_not_depend_on_the_length(config: Any) -> None:
    assert find_fixed_length(config) is None


def test_each_model_has_its_own_reason_beyond_its_length_and_a_note_up_to_it() -> None:
    models = {"student": SimpleNamespace(config=build_llama("dynamic", factor=2.0))}
    models["teacher"] = SimpleNamespace(config=build_phi(32))
    assert set(explain_length_dependence(models, 129)) == {"student", "teacher"}
    assert set(explain_length_dependence(models, 128)) == {"teacher"}
    assert explain_length_dependence(models, 32) == {}
    assert "student's" in describe_fixed_lengths(models, 128)
    assert "teacher's" not in describe_fixed_lengths(models, 128)
    assert describe_fixed_lengths(models, 129) == ""
