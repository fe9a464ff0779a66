"""Evaluate expressions, refuse others, and insert results into generated text."""

import random
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gkd_lab.config.artifact_specs import Architecture, Family, TokenizerSpec
from gkd_lab.config.cell import Evaluation
from gkd_lab.encoding.batches import collate_examples, encode_rows
from gkd_lab.evaluation.calculator import MAX_CHARACTERS, Calculator, evaluate_expression
from gkd_lab.evaluation.decoding import generate_predictions
from gkd_lab.models.build import make_model, train_tokenizer
from gkd_lab.models.packing import Pack
from gkd_lab.tasks import Row
from gkd_lab.training.next_token import TokenChooser
from gkd_lab.training.sampling import collect_end_ids, generate_completions

from ..models.tiny import FAMILIES, tiny_examples, tiny_tokenizer


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"),
        ("48+24", "72"),
        ("2-.5", "1.5"),
        ("1.20*4", "4.8"),
        ("20*0.01", "0.2"),
        ("0.1+0.2", "0.3"),
        ("10-20", "-10"),
        ("-5+2", "-3"),
        ("(1+2)*3", "9"),
        ("2*3+4*5", "26"),
        ("8-4-2", "2"),
        ("1,000*3", "3000"),
        (" 3 + 5 ", "8"),
        ("1/3", "0.333333"),
        ("2/3", "0.666667"),
        ("7/8", "0.875"),
        ("560//10", "56"),
        ("-0.0000001", "0"),
        ("100*100", "10000"),
    ],
)
def test_arithmetic_is_exact_and_formatted_as_in_gsm8k(expression: str, value: str) -> None:
    assert evaluate_expression(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        ".",
        "(",
        "1+",
        "1/0",
        "1//0",
        "2**10",
        "9**9**9**9",
        "1(2)",
        "007",
        "5%",
        "$5*2",
        "x+1",
        "1e9",
        "0x10",
        "1_0",
        "1j",
        "1.2.3",
        "[1]*9",
        "__import__('os')",
        "().__class__",
        "lambda:1",
        "'a'*9",
        "1if 1else 2",
        "1\n+1",
        "٣+1",
        "9" * 17,
        "9" * MAX_CHARACTERS + "*9",
        "(" * 10_000,
        "-" * 100_000 + "1",
    ],
)
def test_other_expressions_have_no_value(expression: str) -> None:
    assert evaluate_expression(expression) is None


def test_random_sums_agree_with_fractions() -> None:
    draw = random.Random(0)
    for _ in range(300):
        a, b, c = (draw.randint(1, 999) for _ in range(3))
        assert evaluate_expression(f"{a}+{b}*{c}") == str(a + b * c)
        assert evaluate_expression(f"({a}-{b})*{c}") == str((a - b) * c)
        assert float(evaluate_expression(f"{a}/{b}") or "nan") == pytest.approx(a / b, abs=1e-6)


SOLUTIONS = [
    f"She sold {a}/{b} = <<{a}/{b}={a // b}>>{a // b} clips. #### {a // b}"
    for a in range(20, 99)
    for b in (2, 5)
]
MARKED = [f"a << {a} + {b} = {a + b} >>" for a in range(9) for b in range(9)]


def make_byte_tokenizer(size: int = 320) -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSpec(kind="bpe", vocab_size=size), SOLUTIONS)


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerSpec(kind="word", vocab_size=100), MARKED)


def merged() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that has tokens of `=` and more text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["=1", "=2", "=3", "2=", "=2>>", "24>>"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def spaced_first() -> PreTrainedTokenizerFast:
    """Make a tokenizer that puts a space before every text, like SentencePiece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator([*SOLUTIONS, "0 1 2 3 4 5 6 7 8 9 + - * / ( ) ."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {"bytes": make_byte_tokenizer, "merged": merged, "spaced first": spaced_first}


def corrected(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Return the text that results when a model writes `text` token by token."""
    calculator = Calculator(tokenizer)
    wanted: list[int] = tokenizer.encode(text, add_special_tokens=False)
    written: list[int] = []
    for token in wanted:
        written += calculator.complete_mark(written, token) if token in calculator.equals_tokens else [token]
    text: str = tokenizer.decode(written, clean_up_tokenization_spaces=False)
    return text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_result_is_inserted_whatever_the_tokens_are(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    assert "<<48/2=24>>" in corrected(tokenizer, "She sold <<48/2=")
    assert "<<30/5=6>>" in corrected(tokenizer, "<<48/2=24>>24, <<30/5=")


def test_a_token_with_a_guess_of_the_result_is_replaced() -> None:
    tokenizer = merged()
    calculator = Calculator(tokenizer)
    for guess in ("=1", "=3", "=2>>"):
        (token,) = tokenizer.encode(guess)
        before = tokenizer.encode("<<8/4")
        assert tokenizer.decode([*before, *calculator.complete_mark(before, token)]) == "<<8/4=2>>"
    (token,) = tokenizer.encode("2=")
    before = tokenizer.encode("<<48/")
    assert tokenizer.decode([*before, *calculator.complete_mark(before, token)]) == "<<48/2=24>>"


def test_results_keep_the_spacing_of_the_expression() -> None:
    tokenizer = make_word_tokenizer()
    assert corrected(tokenizer, "a << 3 + 4 =") == "a << 3 + 4 = 7 >>"


@pytest.mark.parametrize(
    "text",
    [
        "48/2=",
        "<<48/2>>=",
        "<<__import__('os')=",
        "<<9**9**9=",
        "<<1/0=",
        "<<=",
        "<48/2=",
        "<<48/2=25=",
    ],
)
def test_other_equals_signs_are_ignored(text: str) -> None:
    tokenizer = make_byte_tokenizer()
    calculator = Calculator(tokenizer)
    *before, last = tokenizer.encode(text)
    assert calculator.complete_mark(before, last) == [last]


def test_a_result_without_tokens_is_not_inserted() -> None:
    tokenizer = make_word_tokenizer()
    calculator = Calculator(tokenizer)
    *before, last = tokenizer.encode("<< 8 - 9 =".replace("-", "+ 8 + 8 +"))
    assert calculator.complete_mark(before, last) == [last]  # 33 is not in its vocabulary


def test_a_tokenizer_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"<< = >>.*calculator_marks"):
        Calculator(tiny_tokenizer())


def scripted(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> TokenChooser:
    """Choose the tokens of the texts, whatever the model says; an inserted result shifts the others."""
    end = tokenizer.eos_token_id
    ids = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in texts]

    def choose(scores: Tensor, rows: Tensor, position: int) -> Tensor:
        return torch.tensor([(ids[row][position:] or [end])[0] for row in rows.tolist()])

    return choose


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_gets_its_own_result_while_other_rows_end(family: Family) -> None:
    tokenizer = make_byte_tokenizer()
    made = Architecture(layers=1, width=16, heads=2, feed_forward=16)
    models_ = [make_model(family, made, tokenizer, seed=n, max_tokens=64, dropout=0.0) for n in range(2)]
    pack = Pack.build(models_)
    # What stands where the result goes has as many tokens as the result.
    texts = ["a", "b <<48/2=14>>24", "", "<<2*3=0>>", "none", "<<1+1=3>> <<5-3=9>>", "x", "<<(=1>>"]
    prompts = collate_examples(tiny_examples(len(texts)), 0, is_encoder_decoder=family == "encoder-decoder")
    calculator, script = Calculator(tokenizer), scripted(tokenizer, texts * 2)
    assert len(tokenizer.encode("14>>")) == len(tokenizer.encode("24>>"))
    written = generate_completions(
        pack.model,
        prompts.repeat_rows(2),
        max_new_tokens=40,
        end_ids=collect_end_ids(pack.model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        wrap_chooser=lambda _: calculator.assist_choice(script),
    )
    texts = tokenizer.batch_decode(written.completion_ids, skip_special_tokens=True)
    right = ["a", "b <<48/2=24>>24", "", "<<2*3=6>>", "none", "<<1+1=2>> <<5-3=2>>", "x", "<<(=1>>"]
    assert texts == right * 2


def test_an_evaluation_with_a_calculator_has_only_correct_results() -> None:
    tokenizer = make_word_tokenizer()
    made = Architecture(layers=1, width=16, heads=2, feed_forward=16)
    pack = Pack.build_single(make_model("decoder-only", made, tokenizer, seed=0, max_tokens=80, dropout=0.0))
    rows = [Row(f"a {n % 9} +", "a", ("a",)) for n in range(600)]
    examples, _ = encode_rows(
        tokenizer,
        [(row.prompt, row.target) for row in rows],
        is_encoder_decoder=False,
        max_input_tokens=8,
        max_output_tokens=4,
    )
    plain = Evaluation(
        decoding="sample", temperature=2.0, seed=0, split="test", max_output_tokens=60, metrics=("accuracy",)
    )
    results = []
    for evaluation in (plain, plain.model_copy(update={"calculator": True})):
        texts = [
            prediction.text
            for prediction in generate_predictions(pack, tokenizer, rows, examples, evaluation)[0]
        ]
        marks = [match for text in texts for match in re.findall(r"<<([^<>=]*)= (\S+)(?: (\S+)|$)", text)]
        values = [(evaluate_expression(expression), value, end) for expression, value, end in marks]
        # A value that is no word of the tokenizer's is the model's own, as is one without a calculator.
        results.append([mark for mark in values if mark[0] is not None and mark[0] in tokenizer.get_vocab()])
    without, assisted = results
    assert len(without) > 5 and any(right != value for right, value, _ in without)
    assert len(assisted) > 5 and all(right == value for right, value, _ in assisted)
    assert all(end in (">>", "") for *_, end in assisted)
