"""Arguments as a user of TRL's GKDTrainer knows them."""

import copy
import pickle
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig
from trl.experimental.gkd import GKDConfig as TrlConfig

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.training.config_fields import DOCUMENT, REFUSED, WITHOUT_EFFECT, insert_options, list_readers

from ...training.scripts import (
    CHATML,
    chat,
    chat_tokenizer,
    config,
    conversations,
    llama,
    losses,
    saved,
    t5,
    trainer,
    weights,
)
from .common import HALF, OFF, Make, assert_same

# ---- other arguments ----


def test_a_formatting_function_makes_rows_of_other_columns(tmp_path: Path) -> None:
    rows = [
        {"question": r["messages"][0]["content"], "answer": r["messages"][1]["content"]}
        for r in conversations()
    ]
    plain = trainer(tmp_path, arguments=HALF)
    formatted = trainer(
        tmp_path,
        rows,
        formatting_func=lambda row: {"messages": chat(row["question"], row["answer"])},
        arguments=HALF,
    )
    for made in (plain, formatted):
        made.train()
    assert losses(plain) == losses(formatted)
    with pytest.raises(ValueError, match="formatting_func returned str"):
        trainer(tmp_path, rows, formatting_func=lambda row: row["question"], arguments=HALF).train()


def test_former_names_are_taken_with_a_warning_that_names_the_new_ones(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="max_length"):
        arguments = config(tmp_path, max_seq_length=48, **OFF)
    assert arguments.max_length == 48
    with pytest.warns(FutureWarning, match="processing_class"):
        made = GKDTrainer(
            model=llama(0),
            teacher_model=llama(1),
            args=arguments,
            train_dataset=conversations(),
            tokenizer=chat_tokenizer(),
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(tokenizer|max_seq_length) is deprecated")
        plain = trainer(tmp_path, teacher=llama(1), arguments={**OFF, "max_length": 48})
    for made_trainer in (made, plain):
        made_trainer.train()
    assert losses(made) == losses(plain)


@pytest.mark.parametrize("model", [llama, t5])
def test_models_may_be_named(tmp_path: Path, model: Make) -> None:
    names = [saved(model(n).bfloat16(), tmp_path / str(n), chat_tokenizer()) for n in (0, 1)]
    made = trainer(tmp_path, model=names[0], teacher=names[1], processing_class=None)
    assert made.model.dtype == torch.float32  # as in TRL, whatever the file's
    assert made.processing_class.chat_template == CHATML
    changed = trainer(
        tmp_path,
        model=names[0],
        teacher=names[1],
        arguments={
            "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"},
            "teacher_model_init_kwargs": {"dtype": "float32"},
        },
    )
    assert changed.model.dtype == torch.bfloat16 and changed.teacher_model.dtype == torch.float32
    assert changed.model.config._attn_implementation == "eager"
    for made_trainer in (made, changed):
        made_trainer.train()
        assert losses(made_trainer)[0] > 0


def test_a_quantization_is_passed_on_to_transformers(tmp_path: Path) -> None:
    """Which refuses it here: bitsandbytes is missing."""
    name = saved(llama(), tmp_path / "model", chat_tokenizer())
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ImportError, match="bitsandbytes"):
        trainer(tmp_path, model=name, quantization_config=quantization)
    with pytest.raises(ValueError, match="but model_init_kwargs have quantization_config"):
        trainer(
            tmp_path,
            model=name,
            arguments={"model_init_kwargs": {"quantization_config": {"load_in_8bit": True}}},
            quantization_config=quantization,
        )
    with pytest.warns(UserWarning, match="quantization_config is ignored"):
        trainer(tmp_path, quantization_config=quantization)


def test_a_teacher_of_a_revision_is_loaded_by_name(tmp_path: Path) -> None:
    """From a cache in the form of the hub's, with two revisions of one name."""
    folder = tmp_path / "cache" / "models--owner--teacher"
    for seed, revision in enumerate(("main", "v2")):
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(f"{seed}" * 40)
        saved(llama(seed), folder / "snapshots" / (f"{seed}" * 40), chat_tokenizer())
    files = {"cache_dir": str(tmp_path / "cache")}
    for revision, seed in ((None, 0), ("main", 0), ("v2", 1)):
        arguments = {"teacher_model_init_kwargs": files, "teacher_model_revision": revision}
        made = trainer(tmp_path, teacher="owner/teacher", arguments=arguments)
        expected = llama(seed).get_input_embeddings().weight
        assert torch.equal(made.teacher_model.get_input_embeddings().weight, expected)
    arguments = {"teacher_model_init_kwargs": {**files, "revision": "main"}, "teacher_model_revision": "v2"}
    with pytest.raises(ValueError, match="teacher_model_init_kwargs have revision='main'"):
        trainer(tmp_path, teacher="owner/teacher", arguments=arguments)


def test_tokens_and_template_may_be_set_in_the_arguments(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("<|im_start|>", "system"))
    tokenizer = chat_tokenizer()
    made = trainer(
        tmp_path,
        processing_class=tokenizer,
        arguments={"eos_token": "ten", "pad_token": "nine", "chat_template_path": str(template), **HALF},
    )
    ids = dict(
        zip(("end", "pad", "system"), tokenizer.convert_tokens_to_ids(["ten", "nine", "system"]), strict=True)
    )
    batch = made.data_collator(conversations(2))
    assert ids["system"] in batch["prompts"][0].tolist()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == ids["pad"]).all()
    assert ids["end"] in made.generation_config.eos_token_id
    made.train()
    assert made.model.generation_config.eos_token_id is not None
    for field in ("eos_token", "pad_token"):
        with pytest.raises(ValueError, match=f"{field} 'eleven'"):
            trainer(tmp_path, arguments={field: "eleven"})
    with pytest.raises(ValueError, match="clone_chat_template"):
        trainer(tmp_path, arguments={"chat_template_path": "some/model"})


def test_without_a_pad_token_the_end_of_sequence_pads_and_is_still_trained_on(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = None
    all_losses = []
    for processing_class in (tokenizer, chat_tokenizer()):
        made = trainer(tmp_path, processing_class=processing_class, arguments={**HALF, "max_steps": 4})
        made.train()
        all_losses.append(losses(made))
    assert all_losses[0] == all_losses[1]
    neither = chat_tokenizer()
    neither.pad_token = neither.eos_token = None
    with pytest.raises(ValueError, match="pad_token"):
        trainer(tmp_path, processing_class=neither)


@pytest.mark.parametrize("field", ["packing", "padding_free"])
def test_what_does_not_fit_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=True"):
        trainer(tmp_path, arguments={field: True})


def test_an_unknown_argument_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="lmda"):
        config(tmp_path, lmda=1.0)
    with pytest.raises(TypeError, match="ref_model"):
        trainer(tmp_path, ref_model=None)
    with pytest.raises(TypeError, match="GKDConfig"):
        trainer(tmp_path, args=TrlConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_a_processor_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    processor = LlavaProcessor(CLIPImageProcessor(), chat_tokenizer())
    with pytest.raises(ValueError, match=r"LlavaProcessor reads images.*tokenizer"):
        trainer(tmp_path, processing_class=processor)


def test_a_teacher_of_the_other_family_is_refused(tmp_path: Path) -> None:
    for student, teacher in ((llama(0), t5(1)), (t5(0), llama(1))):
        with pytest.raises(ValueError, match=r"encoder-decoder.*decoder-only|decoder-only.*encoder-decoder"):
            trainer(tmp_path, model=student, teacher=teacher)


@pytest.mark.parametrize("model", [llama, t5])
def test_autocast_to_bfloat16_trains_float32_weights(tmp_path: Path, model: Make) -> None:
    all_losses = []
    for bf16 in (False, True):
        made = trainer(
            tmp_path,
            model=model(0),
            teacher=model(1),
            eval_dataset=conversations(2),
            arguments={**HALF, "max_steps": 4, "bf16": bf16},
        )
        batch = made.data_collator(conversations(4))
        with made.compute_loss_context_manager():
            all_losses.append(made.compute_loss(made.model, batch).item())
        made.train()
        assert all(loss > 0 for loss in losses(made)) and made.evaluate()["eval_loss"] > 0
        assert {value.dtype for value in weights(made.model).values()} == {torch.float32}
    assert all_losses[0] != all_losses[1] and all_losses[0] == pytest.approx(all_losses[1], rel=0.1)


def test_arguments_are_copied_and_pickled(tmp_path: Path) -> None:
    arguments = config(tmp_path, beta=0.25, teacher_temperature=0.1, divergence="tv")
    for other in (copy.deepcopy(arguments), pickle.loads(pickle.dumps(arguments))):
        assert isinstance(other, GKDConfig)
        assert other.to_dict() == arguments.to_dict()
    assert arguments.to_dict()["teacher_temperature"] == 0.1


def test_two_trainers_of_one_configuration_do_the_same(tmp_path: Path) -> None:
    arguments = config(tmp_path, **HALF)
    before = arguments.to_dict()
    results = []
    for _ in range(2):
        made = trainer(tmp_path, args=arguments)
        made.train()
        results.append(weights(made.model))
    assert_same(*results)
    # As TRL's: its collators read columns that a model does not name.
    assert arguments.to_dict() == {**before, "remove_unused_columns": False}


# ---- every option ----

OTHER_VALUES: dict[str, Any] = {
    "assistant_only_loss": True,
    "completion_only_loss": False,
    "eval_packing": True,
    "label_smoothing_factor": 0.3,
    "loss_type": "dft",
    "packing": True,
    "pad_to_multiple_of": 8,
    "padding_free": True,
    "torch_compile": True,
    "train_sampling_strategy": "group_by_length",
    "truncation_mode": "keep_end",
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_option_that_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* does not fit GKD: .*; leave it"):
        trainer(tmp_path, arguments={**OFF, name: OTHER_VALUES[name]})


def test_every_field_is_read_refused_or_without_effect() -> None:
    names = {field.name for field in fields(GKDConfig)}
    assert set(REFUSED) | set(WITHOUT_EFFECT) | set(list_readers()) == names
    assert not set(REFUSED) & set(WITHOUT_EFFECT)
    # A field of TRL's configuration that a new version adds has to be looked at first.
    assert {name for name, reader in list_readers().items() if reader == "as TRL"} == {
        "beta", "chat_template_path", "disable_dropout", "eos_token", "lmbda", "max_length", "max_new_tokens",
        "model_init_kwargs", "pad_token", "router_aux_loss_coef", "seq_kd", "teacher_model_init_kwargs",
        "teacher_model_name_or_path", "temperature", "trust_remote_code",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset_kwargs", {"skip_prepare_dataset": True}),
        ("dataset_num_proc", 2),
        ("dataset_text_field", "q"),
        ("length_column_name", "q"),
        ("packing_strategy", "wrapped"),
        ("shuffle_dataset", True),
        ("use_cache", True),
    ],
)
def test_an_option_without_effect_has_none(name: str, value: Any, tmp_path: Path) -> None:
    plain, changed = (trainer(tmp_path, arguments={**OFF, **extra}) for extra in ({}, {name: value}))
    for made in (plain, changed):
        made.train()
    assert losses(plain) == losses(changed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neftune_noise_alpha", 5.0),
        ("weight_decay", 0.5),
        ("max_grad_norm", 0.01),
        ("data_seed", 3),
        ("optim", "sgd"),
    ],
)
def test_an_option_of_transformers_has_an_effect(name: str, value: Any, tmp_path: Path) -> None:
    plain, changed = (trainer(tmp_path, arguments={**OFF, **extra}) for extra in ({}, {name: value}))
    for made in (plain, changed):
        made.train()
    assert losses(plain) != losses(changed)


def test_the_table_of_options_in_the_docs_is_current() -> None:
    document = DOCUMENT.read_text()
    assert document == insert_options(document), "run `python -m gkd_lab.training.config_fields`"
