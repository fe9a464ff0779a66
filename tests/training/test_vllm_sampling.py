"""Sampling through vLLM, with a stand-in that answers from a tiny model of transformers."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from gkd_lab.encoding.batches import collate_examples
from gkd_lab.models.forward import Sequences
from gkd_lab.training import sampling
from gkd_lab.training.arguments import GKDConfig
from gkd_lab.training.vllm_sampling import VllmSampler

from ..models.tiny import PAD, tiny_examples, tiny_model, tiny_tokenizer

COLD = 1e-6
"""A sampling temperature at which only the likeliest token is drawn."""


@dataclass
class Rank:
    """Stub with the attributes that the sampler reads of accelerate's Accelerator."""

    process_index: int
    device: torch.device


class FromModel:
    """Serves a copy of the student and answers row by row, as vLLM does: ids in, ids out, no padding."""

    def __init__(self, model: PreTrainedModel, accelerator: Any, processing_class: Any, **settings: Any):
        self.model, self.settings = model, settings
        self.served = copy.deepcopy(model).eval()
        self.temperature = settings["temperature"]
        self.max_completion_length = settings["max_completion_length"]
        self.syncs = 0
        self.asked: list[list[int]] = []

    def sync_weights(self) -> None:
        self.served.load_state_dict(self.model.state_dict())
        self.syncs += 1

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple[Any, ...]:
        assert num_generations == 1
        self.asked = prompts
        return prompts, [self._answer(prompt) for prompt in prompts], None, None

    def _answer(self, prompt: list[int]) -> list[int]:
        config = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            max_new_tokens=self.max_completion_length,
            eos_token_id=self.settings["generation_kwargs"]["stop_token_ids"],
            pad_token_id=PAD,
        )
        ids = torch.tensor([prompt])
        written = self.served.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answer: list[int] = written[0, len(prompt) :].tolist()
        return answer


Writer = Callable[..., VllmSampler]


@pytest.fixture
def student(tmp_path: Path) -> PreTrainedModel:
    model = tiny_model("decoder-only", 1)
    model.name_or_path = str(tmp_path)
    return model


@pytest.fixture
def writer_of(tmp_path: Path) -> Writer:
    def build(
        model: PreTrainedModel,
        rank: int = 0,
        vocabulary: int | None = None,
        backend: Any = FromModel,
        **changes: Any,
    ) -> VllmSampler:
        args = GKDConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], use_vllm=True, **changes)
        tokenizer = tiny_tokenizer()
        ends = sampling.collect_end_ids(model, tokenizer)
        return VllmSampler(model, tokenizer, Rank(rank, torch.device("cpu")), args, ends, vocabulary, backend)

    return build


def prompts() -> Sequences:
    """Eight prompts of different lengths, padded on the left."""
    return collate_examples(tiny_examples(8), PAD, is_encoder_decoder=False)


def written(writer: VllmSampler, step: int = 0, seed: int = 0, temperature: float = 1.0) -> Sequences:
    return writer.sample_completions(
        prompts(), max_new_tokens=12, temperature=temperature, step=step, seed=seed
    )


def same(one: Sequences, other: Sequences) -> bool:
    return torch.equal(one.completion_ids, other.completion_ids)


def test_prompts_go_in_as_ids_without_padding(student: PreTrainedModel, writer_of: Writer) -> None:
    writer = writer_of(student)
    written(writer)
    assert writer.backend.asked == [example.prompt_ids for example in tiny_examples(8)]


def test_the_likeliest_answers_are_those_of_transformers_generate(
    student: PreTrainedModel, writer_of: Writer
) -> None:
    ends = sampling.collect_end_ids(student, tiny_tokenizer())
    expected = sampling.generate_completions(student, prompts(), max_new_tokens=12, end_ids=ends, pad_id=PAD)
    answers = written(writer_of(student), temperature=COLD)
    lengths = set(answers.completion_mask.sum(-1).tolist())
    assert 12 in lengths and len(lengths) > 1, "rows that end and rows that are cut"
    for name in expected.named_tensors():
        torch.testing.assert_close(getattr(answers, name), getattr(expected, name), rtol=0, atol=0, msg=name)


def test_the_mask_covers_the_first_end_of_sequence_and_nothing_after_it(
    student: PreTrainedModel, writer_of: Writer
) -> None:
    class Scripted(FromModel):
        def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> tuple[Any, ...]:
            return prompts, [[5, 1, 6, 1], [5, 6, 7, 8, 9], [4], [1]] * 2, None, None

    answers = written(writer_of(student, backend=Scripted))
    assert answers.completion_mask[:4].tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ]
    assert answers.completion_ids[:4].tolist() == [
        [5, 1, PAD, PAD, PAD],
        [5, 6, 7, 8, 9],
        [4, PAD, PAD, PAD, PAD],
        [1, PAD, PAD, PAD, PAD],
    ]


def test_weights_are_synced_once_per_optimizer_step(student: PreTrainedModel, writer_of: Writer) -> None:
    writer = writer_of(student)
    first = [written(writer, step=0, temperature=COLD) for _ in range(2)]
    assert writer.backend.syncs == 1
    student.load_state_dict(tiny_model("decoder-only", 2).state_dict())
    assert same(written(writer, step=0, temperature=COLD), first[0])
    changed = written(writer, step=1, temperature=COLD)
    assert writer.backend.syncs == 2
    assert same(first[0], first[1]) and not same(changed, first[0])


def test_the_text_depends_on_seed_step_and_micro_batch_alone(
    student: PreTrainedModel, writer_of: Writer
) -> None:
    writer, resumed = writer_of(student), writer_of(student)
    torch.manual_seed(0)
    first, second, later = written(writer), written(writer), written(writer, step=3)
    torch.manual_seed(1)
    assert same(written(resumed, step=3), later)
    assert same(written(resumed, step=0), first)
    texts = [first, second, later, written(writer_of(student), seed=1)]
    assert not any(same(a, b) for n, a in enumerate(texts) for b in texts[:n])


def test_rows_with_the_same_prompt_get_different_answers(student: PreTrainedModel, writer_of: Writer) -> None:
    equal_rows = prompts().map_tensors(lambda tensor: tensor[:1].repeat(8, 1))
    answers = writer_of(student).sample_completions(
        equal_rows, max_new_tokens=12, temperature=1.0, step=0, seed=0
    )
    assert len({tuple(row) for row in answers.completion_ids.tolist()}) > 4


def test_sampling_leaves_the_generator_of_the_training_as_it_was(
    student: PreTrainedModel, writer_of: Writer
) -> None:
    writer = writer_of(student)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    written(writer)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_of_a_tensor_parallel_group_draw_the_same_noise_and_other_ranks_do_not(
    student: PreTrainedModel, writer_of: Writer
) -> None:
    texts = [written(writer_of(student, rank=rank, vllm_tensor_parallel_size=2)) for rank in range(3)]
    assert same(texts[0], texts[1])
    assert not same(texts[0], texts[2])


def test_a_server_draws_from_its_own_generator(student: PreTrainedModel, writer_of: Writer) -> None:
    texts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        texts.append(written(writer_of(student, vllm_mode="server")))
    assert not same(*texts)


def test_each_call_passes_its_temperature_and_limit(student: PreTrainedModel, writer_of: Writer) -> None:
    writer = writer_of(student, temperature=0.3, max_new_tokens=5)
    assert (writer.backend.temperature, writer.backend.max_completion_length) == (0.3, 5)
    written(writer, temperature=0.7)
    assert (writer.backend.temperature, writer.backend.max_completion_length) == (0.7, 12)


def test_the_sampling_parameters_are_complete_and_hold_no_seed(
    student: PreTrainedModel, writer_of: Writer
) -> None:
    student.generation_config.update(repetition_penalty=1.3, top_p=0.5, top_k=7, eos_token_id=[9, 1])
    settings = writer_of(student, vocabulary=3).backend.settings
    stated = {name: settings[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    assert stated == {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert settings["generation_kwargs"] == {"stop_token_ids": [9, 1], "allowed_token_ids": [0, 1, 2]}


def test_the_fields_of_the_configuration_reach_vllm(student: PreTrainedModel, writer_of: Writer) -> None:
    expected_settings = {
        "mode": "server",
        "server_base_url": "http://localhost:9",
        "server_timeout": 7.0,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.4,
        "max_model_length": 99,
        "enable_sleep_mode": True,
    }
    settings = writer_of(
        student, **{f"vllm_{name}": value for name, value in expected_settings.items()}
    ).backend.settings
    assert {name: settings[name] for name in expected_settings} == expected_settings


def test_the_calls_fit_the_signatures_of_trl(student: PreTrainedModel, writer_of: Writer) -> None:
    settings = writer_of(student).backend.settings
    models = {"model": None, "accelerator": None, "processing_class": None}
    constructor = inspect.signature(VLLMGeneration)
    assert constructor.bind(**models, **settings).arguments == {**models, **settings}
    inspect.signature(VLLMGeneration.generate).bind(None, prompts=[[1]], images=None, num_generations=1)
    inspect.signature(VLLMGeneration.sync_weights).bind(None)


@pytest.mark.skipif(is_vllm_available(), reason="vllm is installed")
def test_a_missing_vllm_is_reported_with_the_install_command(
    student: PreTrainedModel, writer_of: Writer
) -> None:
    with pytest.raises(ImportError, match=r"gkd-lab\[vllm\].*use_vllm"):
        writer_of(student, backend=None)


def test_an_encoder_decoder_is_refused_with_a_way_out(writer_of: Writer) -> None:
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*decoder-only.*use_vllm"):
        writer_of(tiny_model("encoder-decoder", 1), backend=None)


def test_a_model_from_nowhere_is_refused_with_a_way_out(writer_of: Writer) -> None:
    with pytest.raises(ValueError, match="save_pretrained"):
        writer_of(tiny_model("decoder-only", 1), backend=None)
