"""What goes wrong in TRL 1.16's trainer, one test an entry: its number is in the test's name.

The entries that need two ranks are in test_ranks.py (2, 10, 11) and tests/models/test_sharding.py (20).
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from gkd_lab import GKDConfig, GKDTrainer
from gkd_lab.encoding.batches import collate_examples
from gkd_lab.losses.divergence import generalized_jsd
from gkd_lab.models.forward import Sequences, compute_completion_logits

from .scripts import (
    chat,
    chat_tokenizer,
    config,
    conversations,
    llama,
    logged,
    losses,
    saved,
    t5,
    trainer,
    weights,
)

ON = {"lmbda": 1.0}
OFF = {"lmbda": 0.0}


def one_step(folder: Path, *args: Any, **options: Any) -> GKDTrainer:
    arguments = {"max_steps": 1, **options.pop("arguments", {})}
    made = trainer(folder, *args, arguments=arguments, **options)
    made.train()
    return made


def fixed_batch(made: GKDTrainer, rows: int = 4) -> Sequences:
    data: Any = made.train_dataset
    batch = made.data_collator([data[n] for n in range(rows)])
    return Sequences(**{name: batch[name] for name in Sequences.__dataclass_fields__ if name in batch})


def by_hand(made: GKDTrainer, batch: Sequences, **temperatures: float) -> tuple[Tensor, Tensor]:
    """Dense JSD(1/2) of each completion token, and the mask."""
    with torch.no_grad():
        student, teacher = (compute_completion_logits(m, batch) for m in (made.model, made.teacher_model))
    mask = batch.completion_mask.bool()
    values = torch.zeros(mask.shape, dtype=torch.float32)
    values[mask] = generalized_jsd(student[mask], teacher[mask], 0.5, **temperatures)
    return values, mask


class Written:
    """Records the trainer's micro-batches and their completions."""

    def __init__(self, made: GKDTrainer) -> None:
        self.batches: list[Any] = []
        original = made.get_batch_samples

        def get_batch_samples(*args: Any) -> Any:
            samples, items = original(*args)
            self.batches += [sample["batch"] for sample in samples]
            return samples, items

        made.get_batch_samples = get_batch_samples  # type: ignore[method-assign]

    @property
    def completions(self) -> list[list[list[int]]]:
        return [
            [ids[mask.bool()].tolist() for ids, mask in zip(s.completion_ids, s.completion_mask, strict=True)]
            for s in (batch.student for batch in self.batches)
        ]


def test_pitfall_01_the_loss_on_policy_does_not_depend_on_the_length_of_the_reference(tmp_path: Path) -> None:
    results = []
    for words in (1, 4, 16):
        rows = [{"messages": chat("one plus two ?", " ".join(["three"] * words))}] * 2
        results.append(losses(one_step(tmp_path, rows, arguments=ON))[0])
    assert results[0] > 1e-3
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


def test_pitfall_03_temperatures_of_teacher_and_student_act_in_the_loss(tmp_path: Path) -> None:
    plain = trainer(tmp_path, arguments=OFF)
    sharp = trainer(
        tmp_path,
        arguments={**OFF, "teacher_temperature": 0.1, "student_temperature": 2.0, "temperature": 0.3},
    )
    batch = fixed_batch(plain)
    for made, temperatures in (
        (plain, {}),
        (sharp, {"teacher_temperature": 0.1, "student_temperature": 2.0}),
    ):
        values, mask = by_hand(made, batch, **temperatures)
        loss = made.compute_loss(made.model, vars(batch))
        assert loss.item() == pytest.approx((values.sum() / mask.sum()).item(), rel=1e-5)


def test_pitfall_04_a_sequence_counts_as_one_whatever_its_length(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments={**OFF, "loss_normalization": "sequence"})
    batch = fixed_batch(made)
    values, mask = by_hand(made, batch)
    of_sequences = values.sum(1) / mask.sum(1)
    assert len(set(mask.sum(1).tolist())) > 1
    assert made.compute_loss(made.model, vars(batch)).item() == pytest.approx(
        of_sequences.mean().item(), rel=1e-5
    )
    tokens = trainer(tmp_path, arguments=OFF)
    by_token = tokens.compute_loss(tokens.model, vars(batch)).item()
    assert by_token == pytest.approx((values.sum() / mask.sum()).item(), rel=1e-5)


def test_pitfall_05_nothing_of_the_models_own_generation_config_reaches_the_samples(tmp_path: Path) -> None:
    texts = []
    for spoilt in (False, True):
        student = llama(0)
        if spoilt:
            student.generation_config.repetition_penalty = 5.0
            student.generation_config.no_repeat_ngram_size = 1
            student.generation_config.min_new_tokens = 6
            student.generation_config.top_k = 1
        made = trainer(tmp_path, model=student, arguments=ON)
        seen = Written(made)
        made.train()
        texts.append(seen.completions)
    assert texts[0] == texts[1]


def test_pitfall_06_seq_kd_trains_on_the_teachers_text_and_asks_for_it_once(tmp_path: Path) -> None:
    rows = conversations(4)
    made = trainer(
        tmp_path, rows, arguments={**OFF, "seq_kd": True, "max_steps": 6, "per_device_train_batch_size": 2}
    )
    row_counts: list[int] = []
    generate = made.teacher_model.generate

    def counted(*args: Any, **options: Any) -> Any:
        row_counts.append(len(options["input_ids"]))
        return generate(*args, **options)

    made.teacher_model.generate = counted
    seen = Written(made)
    made.train()
    assert sum(row_counts) == 4  # three epochs
    text: dict[Any, Any] = {}
    for batch, completions in zip(seen.batches, seen.completions, strict=True):
        for prompt, mask, completion in zip(
            batch.student.prompt_ids, batch.student.prompt_mask, completions, strict=True
        ):
            assert text.setdefault(tuple(prompt[mask.bool()].tolist()), completion) == completion
    references = {tuple(made.encode_row(row).completion_ids) for row in rows}
    assert not references & {tuple(completion) for completion in text.values()}


def test_pitfall_06_resumed_seq_kd_gets_the_same_text(tmp_path: Path) -> None:
    arguments = {**OFF, "seq_kd": True}
    first, second = (trainer(tmp_path, arguments=arguments) for _ in range(2))
    batch = fixed_batch(first)
    whole = first.teacher_completions.replace_completions(batch)
    halves = [
        second.teacher_completions.replace_completions(batch.map_tensors(lambda t, n=n: t[n : n + 1]))
        for n in (3, 2, 1, 0)
    ]
    for n, half in zip((3, 2, 1, 0), halves, strict=True):
        ids = whole.completion_ids[n][whole.completion_mask[n].bool()]
        assert ids.tolist() == half.completion_ids[0][half.completion_mask[0].bool()].tolist()


def test_pitfall_07_rescaled_betas_have_gradients_of_one_size(tmp_path: Path) -> None:
    """Near the teacher all betas agree; raw JSD(beta) vanishes towards both ends."""
    norms: dict[tuple[float, bool], float] = {}
    for beta in (0.0, 0.001, 0.5, 0.999, 1.0):
        for rescale in (False, True):
            student, teacher = llama(0), llama(0)
            with torch.no_grad():
                teacher.lm_head.weight.add_(0.01 * torch.randn(teacher.lm_head.weight.shape))
            made = one_step(
                tmp_path,
                model=student,
                teacher=teacher,
                arguments={**OFF, "beta": beta, "rescale_divergence": rescale},
            )
            norms[beta, rescale] = logged(made, "grad_norm")[0]
    rescaled = [norms[beta, True] for beta in (0.0, 0.001, 0.5, 0.999, 1.0)]
    assert max(rescaled) < 2 * min(rescaled)
    assert norms[0.001, False] < 0.01 * norms[0.0, False]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pitfall_08_sampling_reads_one_token_at_a_time_from_its_cache(
    tmp_path: Path, checkpointing: bool
) -> None:
    made = trainer(tmp_path, arguments={**ON, "gradient_checkpointing": checkpointing})
    widths: list[int] = []

    def note(module: Any, args: Any, options: Any) -> None:
        if options.get("use_cache"):
            widths.append(options["input_ids"].shape[1])

    made.model.register_forward_pre_hook(note, with_kwargs=True)
    made.train()
    assert len(widths) > 2 and widths.count(1) >= len(widths) - 2
    assert made.model.is_gradient_checkpointing == checkpointing


def test_pitfall_09_the_output_head_never_makes_all_logits(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments=OFF)
    made.model.train()
    called: list[str] = []
    for name, model in (("student", made.model), ("teacher", made.teacher_model)):
        model.lm_head.register_forward_hook(lambda *_, name=name: called.append(name))
        model(torch.tensor([[3]]))
    assert called == ["student", "teacher"]
    made.compute_loss(made.model, vars(fixed_batch(made))).backward()
    assert called == ["student", "teacher"]
    assert made.model.lm_head.weight.grad.abs().max() > 0


class DrawsFromTheSharedStream(TrainerCallback):
    def on_substep_end(self, *args: Any, **options: Any) -> None:
        random.random()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        random.random()


def test_pitfall_10_each_step_draws_one_coin_from_its_own_stream(tmp_path: Path) -> None:
    coins = []
    for callbacks in ([], [DrawsFromTheSharedStream()]):
        made = trainer(
            tmp_path,
            conversations(8),
            callbacks=callbacks,
            arguments={"lmbda": 0.5, "max_steps": 12, "gradient_accumulation_steps": 4, "max_new_tokens": 2},
        )
        seen = Written(made)
        made.train()
        drawn = [batch.on_policy[0] for batch in seen.batches]
        assert all(len(set(drawn[n : n + 4])) == 1 for n in range(0, 48, 4))
        assert logged(made, "on_policy") == [float(drawn[n]) for n in range(0, 48, 4)]
        coins.append(drawn[::4])
    assert coins[0] == coins[1] and len(set(coins[0])) == 2


@pytest.mark.parametrize("make", [llama, t5])
def test_pitfall_12_dropout_is_off_while_sampling_and_on_while_training(tmp_path: Path, make: Any) -> None:
    made = trainer(
        tmp_path,
        model=make(0, dropout=0.1),
        teacher=make(1),
        arguments={**ON, "disable_dropout": False, "gradient_checkpointing": False},
    )
    modes: dict[bool, set[bool]] = {True: set(), False: set()}

    def note(module: Any, args: Any, options: Any) -> None:
        modes[bool(options.get("use_cache"))].add(module.training)

    made.model.register_forward_pre_hook(note, with_kwargs=True)
    forward = made.model.forward

    def trained(*args: Any, **options: Any) -> Any:
        if not options.get("use_cache"):
            modes[False].add(made.model.training)
        return forward(*args, **options)

    made.model.forward = trained
    made.train()
    assert modes == {True: {False}, False: {True}}


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_pitfall_13_bfloat16_logits_give_no_negative_divergence(beta: float) -> None:
    torch.manual_seed(0)
    student = (torch.randn(1, 64, 500) * 3).bfloat16()
    teacher = (student.float() + 0.01 * torch.randn(1, 64, 500)).bfloat16()
    for n in range(64):
        assert GKDTrainer.generalized_jsd_loss(student[:, n : n + 1], teacher[:, n : n + 1], beta=beta) >= 0


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_pitfall_14_infinite_logits_give_finite_losses_and_gradients(beta: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    student[..., 0] = teacher[..., 0] = -torch.inf
    teacher[0, :, 1] = -torch.inf
    student[1, :, 2] = -torch.inf
    student.requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_pitfall_15_absolute_positions_do_not_shift_with_the_padding(tmp_path: Path) -> None:
    def gpt2(seed: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        made = GPT2LMHeadModel(
            GPT2Config(vocab_size=28, n_embd=16, n_layer=2, n_head=4, n_positions=64, eos_token_id=1)
        )
        with torch.no_grad():
            made.transformer.wpe.weight.mul_(50)
        return made

    made = trainer(tmp_path, model=gpt2(0), teacher=gpt2(1), arguments=OFF)
    rows: Any = made.train_dataset
    examples = [made.encode_row(row) for row in rows[:3]]
    alone = [
        made.compute_loss(made.model, vars(collate_examples([e], 0, is_encoder_decoder=False))).item()
        for e in examples
    ]
    lengths = [len(e.completion_ids) for e in examples]
    assert len({len(e.prompt_ids) for e in examples}) == 3
    together = made.compute_loss(
        made.model, vars(collate_examples(examples, 0, is_encoder_decoder=False))
    ).item()
    expected = sum(a * n for a, n in zip(alone, lengths, strict=True)) / sum(lengths)
    assert together == pytest.approx(expected, rel=1e-5)


def test_pitfall_16_the_prompt_that_the_student_answers_does_not_depend_on_the_reference(
    tmp_path: Path,
) -> None:
    prompts = []
    for words in (1, 4, 8, 40):
        rows = [{"prompt": "one two three four five six seven eight", "completion": " nine" * words}] * 2
        made = trainer(tmp_path, rows, arguments={**ON, "max_length": 10, "max_new_tokens": 4})
        seen = Written(made)
        made.train()
        prompts.append(seen.batches[0].student.prompt_ids.tolist())
    assert all(prompt == prompts[0] for prompt in prompts)
    assert len(prompts[0][0]) == 6  # max_length - max_new_tokens, its last ones


@pytest.mark.parametrize(
    "row", [{"prompt": "one plus two ?"}, {"messages": chat("one plus two ?")}, {"prompt": chat("one ?")}]
)
def test_pitfall_17_rows_with_a_prompt_alone_train_on_policy_and_are_refused_off_policy(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    made = one_step(tmp_path, [row] * 2, arguments=ON)
    assert losses(made)[0] > 0
    assert all(value.isfinite().all() for value in weights(made.model).values())
    with pytest.raises(ValueError, match=r"2 of 2 rows .*lmbda=1"):
        one_step(tmp_path, [row] * 2, arguments=OFF)
    assert losses(one_step(tmp_path, [row] * 2, arguments={**OFF, "seq_kd": True}))[0] > 0


def test_pitfall_18_encoder_decoders_are_taken_as_objects_and_by_name(tmp_path: Path) -> None:
    rows = [{"prompt": "one plus two ?", "completion": "three"}] * 2
    names = [saved(t5(n), tmp_path / str(n), chat_tokenizer()) for n in (0, 1)]
    by_name = one_step(tmp_path, rows, model=names[0], teacher=names[1], processing_class=None)
    as_objects = one_step(tmp_path, rows, model=t5(0), teacher=t5(1))
    assert losses(by_name) == losses(as_objects) and losses(by_name)[0] > 0
    with pytest.raises(ValueError, match="encoder-decoder"):
        trainer(tmp_path, rows, model=t5(0), teacher=llama(1))


def test_pitfall_19_padded_vocabularies_are_accepted_once_the_tokenizers_are_equal(tmp_path: Path) -> None:
    wide_models = [llama(1, vocabulary=40) for _ in range(2)]
    with torch.no_grad():
        for wide in wide_models:
            wide.lm_head.weight[28:] = 100  # rows of padding must neither be compared nor written
    for student, teacher in ((llama(0), wide_models[0]), (wide_models[1], llama(0))):
        made = trainer(
            tmp_path,
            model=student,
            teacher=teacher,
            teacher_processing_class=chat_tokenizer(),
            arguments={"lmbda": 0.5, "max_steps": 4},
        )
        seen = Written(made)
        made.train()
        assert all(token < 28 for batch in seen.completions for row in batch for token in row)
        assert all(0 < loss < 1 for loss in losses(made))
    with pytest.raises(ValueError, match="teacher_processing_class"):
        trainer(tmp_path, teacher=llama(1, vocabulary=40))


def test_pitfall_19_equal_sizes_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    teacher = saved(llama(1), tmp_path / "teacher", chat_tokenizer("eleven"))
    with pytest.raises(ValueError, match="tokenizer"):
        trainer(tmp_path, teacher=teacher)


def test_pitfall_21_teacher_kwargs_need_no_dtype_and_stay_as_they_are(tmp_path: Path) -> None:
    name = saved(llama(1), tmp_path / "teacher", chat_tokenizer())
    for kwargs in ({}, {"dtype": "bfloat16"}, {"attn_implementation": "eager"}):
        arguments = config(tmp_path, teacher_model_init_kwargs=kwargs)
        for _ in range(2):  # a sweep in one process
            made = trainer(tmp_path, teacher=name, args=arguments)
            expected = torch.bfloat16 if "dtype" in kwargs else torch.float32
            assert made.teacher_model.dtype == expected
        assert arguments.teacher_model_init_kwargs == kwargs


def test_pitfall_22_arguments_and_teacher_may_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = GKDTrainer(
        model=llama(0),
        teacher_model=llama(1),
        train_dataset=conversations(),
        processing_class=chat_tokenizer(),
    )
    assert made.args.lmbda == 0.5
    with pytest.warns(UserWarning, match="copy"):
        copied = GKDTrainer(
            model=llama(0),
            args=config(tmp_path),
            train_dataset=conversations(),
            processing_class=chat_tokenizer(),
        )
    batch = vars(fixed_batch(copied))
    assert copied.compute_loss(copied.model, batch).item() == pytest.approx(0, abs=1e-6)
    assert not any(p.requires_grad for p in copied.teacher_model.parameters())
    name = saved(llama(1), tmp_path / "teacher", chat_tokenizer())
    named = GKDTrainer(
        model=llama(0),
        args=config(tmp_path, teacher_model_name_or_path=name),
        train_dataset=conversations(),
        processing_class=chat_tokenizer(),
    )
    explicit = trainer(tmp_path, teacher=llama(1))
    assert (
        named.compute_loss(named.model, batch).item() == explicit.compute_loss(explicit.model, batch).item()
    )


def test_pitfall_23_the_tokenizers_end_stops_the_student_as_the_models_does(tmp_path: Path) -> None:
    student = llama(0)
    tokenizer = chat_tokenizer()
    other = tokenizer.convert_tokens_to_ids("three")
    student.generation_config.eos_token_id = [other]
    made = trainer(tmp_path, model=student, arguments={**ON, "max_steps": 8, "max_new_tokens": 24})
    assert set(made.generation_config.eos_token_id) == {other, tokenizer.eos_token_id}
    seen = Written(made)
    made.train()
    rows = [row for batch in seen.completions for row in batch]
    ends = {row[-1] for row in rows if len(row) < 24}
    assert ends == {other, tokenizer.eos_token_id}
    assert all(not set(row[:-1]) & ends for row in rows)


def test_pitfall_24_logs_have_on_policy_share_lengths_and_entropy(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments={**ON, "max_steps": 4})
    seen = Written(made)
    made.train()
    for batch, rows, row in zip(
        seen.batches, seen.completions, [r for r in made.state.log_history if "loss" in r], strict=True
    ):
        assert row["on_policy"] == 1
        assert row["completion_length"] == pytest.approx(sum(map(len, rows)) / len(rows))
        end = made.processing_class.eos_token_id
        assert row["truncated"] == pytest.approx(sum(r[-1] != end for r in rows) / len(rows))
        assert 0 < row["entropy"] < torch.tensor(28.0).log()
        assert row["grad_norm"] > 0
        assert batch.on_policy == (True,)


def test_pitfall_24_the_entropy_is_that_of_the_student(tmp_path: Path) -> None:
    made = trainer(tmp_path, arguments={**OFF, "max_steps": 1, "per_device_train_batch_size": 8})
    batch = fixed_batch(made, 8)
    with torch.no_grad():
        log_q = compute_completion_logits(made.model, batch).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)[batch.completion_mask.bool()].mean().item()
    made.train()
    assert logged(made, "entropy")[0] == pytest.approx(entropy, rel=1e-5)


def test_pitfall_24_evaluation_can_look_at_the_students_own_text(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=conversations(5), arguments={"eval_on_policy": True})
    metrics = made.evaluate()
    assert metrics["eval_loss"] > 0 and metrics["eval_on_policy_loss"] > 0
    assert metrics["eval_on_policy_completion_length"] >= 1
    assert 0 <= metrics["eval_on_policy_truncated"] <= 1
    again = made.evaluate()
    assert again["eval_on_policy_loss"] == metrics["eval_on_policy_loss"]
    assert "eval_on_policy_loss" not in trainer(tmp_path, eval_dataset=conversations(5)).evaluate()


def test_pitfall_25_the_balancing_loss_of_a_mixture_of_experts_is_kept(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixtral(seed: int, **options: Any) -> MixtralForCausalLM:
        torch.manual_seed(seed)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=28,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                num_local_experts=4,
                pad_token_id=0,
                **options,
            )
        )

    made = {}
    for with_router_loss in (False, True):
        model = mixtral(0, output_router_logits=with_router_loss, router_aux_loss_coef=0.5)
        made[with_router_loss] = trainer(tmp_path, model=model, teacher=mixtral(1), arguments=OFF)
    batch = fixed_batch(made[False])
    losses = {
        with_router_loss: t.compute_loss(t.model, vars(batch)).item() for with_router_loss, t in made.items()
    }
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1)
    router_loss = made[True].model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert losses[True] - losses[False] == pytest.approx(0.5 * router_loss.item(), rel=1e-3)


def test_pitfall_25_a_mixture_of_experts_samples_with_its_router_logits_on(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 28, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4}
    students = [
        MixtralForCausalLM(MixtralConfig(**shape, **heads, output_router_logits=on)) for on in (True, False)
    ]
    students[1].load_state_dict(students[0].state_dict())
    texts = []
    for student in students:
        made = trainer(tmp_path, model=student, arguments={**ON, "max_steps": 1})
        seen = Written(made)
        made.train()
        texts.append(seen.completions)
    assert texts[0] == texts[1]


def test_pitfall_25_images_are_refused(tmp_path: Path) -> None:
    rows = [{"messages": chat("one ?", "two"), "images": ["one.png"]}] * 2
    with pytest.raises(ValueError, match="image"):
        one_step(tmp_path, rows)


def test_our_fields_default_to_what_trl_does() -> None:
    ours, theirs = GKDConfig(output_dir="x", use_cpu=True), None
    from trl.experimental.gkd import GKDConfig as TrlConfig

    theirs = TrlConfig(output_dir="x", use_cpu=True)
    unequal = [
        name
        for name, value in json.loads(theirs.to_json_string()).items()
        if json.loads(ours.to_json_string())[name] != value and name not in ("logging_dir", "run_name")
    ]
    assert unequal == []
