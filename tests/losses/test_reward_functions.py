"""What gives rewards: ours against the metrics that they are, a tiny model's entailment, users' functions."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from gkd_lab.losses.entailment import ROWS_AT_ONCE, load_entailment_reward
from gkd_lab.losses.reward_functions import (
    compute_rewards,
    create_rouge_reward,
    exact_match,
    load_reward_function,
)
from gkd_lab.metrics import score
from gkd_lab.tasks.arithmetic import is_correct

CPU = torch.device("cpu")
SOLUTIONS = ["3 5 8 #### 8", "3 5 9 #### 9", "#### 1,024", "#### 1024", "no answer", "#### 8 #### 9", ""]


def test_the_exact_match_reward_follows_the_rule_of_arithmetic() -> None:
    for text, reference in itertools.product(SOLUTIONS, SOLUTIONS[:4]):
        assert exact_match(["p"], [text], [reference]) == [float(is_correct(text, reference))]


def test_of_a_reference_without_an_answer_the_whole_text_counts() -> None:
    texts, references = ["a b", " a b", "a  b", "#### 1"], ["a b"] * 4
    found = exact_match(["p"] * 4, texts, references)
    assert found == [1, 1, 0, 0]
    assert [100 * value for value in found] == score(
        "exact_match", texts, [[r] for r in references]
    ).per_example


@pytest.mark.parametrize("kind", ["rouge2", "rougeL"])
def test_rouge_is_rouge_score_s_f_measure(kind: str) -> None:
    texts = ["the cat sat on a mat", "a mat", "", "the cat sat on the mat"]
    references = ["the cat sat on the mat"] * len(texts)
    scorer = rouge_scorer.RougeScorer([kind], use_stemmer=False)
    known = [scorer.score(r, t)[kind].fmeasure for t, r in zip(texts, references, strict=True)]
    assert create_rouge_reward(kind)(["p"] * len(texts), texts, references) == pytest.approx(known, abs=1e-12)
    assert known[-1] == 1 and 0 < known[0] < 1


# ---- entailment ----

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["a", "b", "c", "d", "e", "f", "g", "h"]]


def judge(folder: Path, labels: dict[int, str] | None = None, longest: int = 64) -> Path:
    """A random BERT of one layer that tells three labels apart, and its tokenizer."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=longest,
        id2label=labels or {0: "NEUTRAL", 1: "CONTRADICTION", 2: "ENTAILMENT"},
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    load_entailment_reward.cache_clear()
    return judge(tmp_path / "judge")


def test_entailment_is_the_probability_of_the_model_s_own_label(folder: Path) -> None:
    premises, texts = ["a b c", "d e f g", "a"], ["a b", "h", ""]
    found = load_reward_function("entailment", str(folder), None, CPU)(premises, texts, [""] * 3)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    for premise, text, value in zip(premises, texts, found, strict=True):
        ids = [2, *map(WORDS.index, premise.split()), 3, *map(WORDS.index, text.split()), 3]
        kinds = [0] * (len(premise.split()) + 2) + [1] * (len(text.split()) + 1)
        logits = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits[0]
        assert value == pytest.approx(logits.softmax(-1)[2].item(), rel=1e-5)
    assert max(found) - min(found) > 0.01


def test_entailment_s_premise_is_the_prompt(folder: Path) -> None:
    rule = load_entailment_reward(str(folder), None, CPU)
    (one,), (other,) = rule(["a b"], ["c d"], [""]), rule(["c d"], ["a b"], [""])
    assert abs(one - other) > 1e-3


def test_pairs_longer_than_the_model_reads_are_cut(tmp_path: Path) -> None:
    load_entailment_reward.cache_clear()
    rule = load_entailment_reward(str(judge(tmp_path / "short", longest=12)), None, CPU)
    (value,) = rule(["a " * 50], ["b " * 50], [""])
    assert 0 <= value <= 1


def test_rewards_in_batches_equal_rewards_one_by_one(folder: Path) -> None:
    rule = load_entailment_reward(str(folder), None, CPU)
    premises = ["a b c d e f g h"[: 1 + 2 * (n % 8)] for n in range(ROWS_AT_ONCE + 3)]
    together = rule(premises, ["a"] * len(premises), [""] * len(premises))
    assert together == pytest.approx([rule([p], ["a"], [""])[0] for p in premises], rel=1e-4)


def test_a_model_is_loaded_once_and_frozen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = BertForSequenceClassification.requires_grad_
    monkeypatch.setattr(
        BertForSequenceClassification,
        "requires_grad_",
        lambda model, on: made.append((model, on)) or original(model, on),
    )
    for _ in range(2):
        load_reward_function("entailment", str(folder), None, CPU)
    ((model, on),) = made
    assert not on and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_the_label_is_refused(tmp_path: Path) -> None:
    labels = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    place = judge(tmp_path / "unnamed", labels)
    with pytest.raises(ValueError, match=r"'entailment'; .*LABEL_0, LABEL_1, LABEL_2"):
        load_entailment_reward(str(place), None, CPU)


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'entailment': .*/none' "):
        load_entailment_reward(str(tmp_path / "none"), None, CPU)


# ---- a user's function ----

MODULE = """
offset = 3
def brevity(prompts, texts, references):
    return [-float(len(text)) for text in texts]
class Scale:
    @staticmethod
    def double(prompts, texts, references):
        return [2.0] * len(texts)
def divides(prompts, texts, references):
    return [1 / 0]
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package in the current folder, new for each test."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "rewards.py").write_text(MODULE)
    (folder / "broken.py").write_text("import no_such_thing_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    return name


def test_a_function_is_found_by_its_import_path(package: str) -> None:
    rule = load_reward_function(f"{package}.rewards:brevity", None, None, CPU)
    assert rule(["p", "p"], ["ab", ""], ["", ""]) == [-2, 0]
    assert load_reward_function(f"{package}.rewards:Scale.double", None, None, CPU)(["p"], ["t"], ["r"]) == [
        2
    ]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("none:brevity", r"module 'mine_\w+.none' .*in /"),
        ("rewards:brevty", "'brevty'; .*'brevity'"),
        ("rewards:Scale.tripple", "'tripple'; .*double"),
        ("rewards:offset", "is a int"),
        (
            "broken:f",
            "broken raised .*'no_such_thing_at_all'",
        ),
    ],
)
def test_a_function_that_cannot_be_had_is_told(place: str, message: str, package: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward_function(f"{package}.{place}", None, None, CPU)


@pytest.mark.parametrize("name", ["brevity", "my package:f", "a:b:c", ":f", "a.b:", "os.system('x'):y"])
def test_what_is_no_import_path_imports_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="exact_match, rouge2, rougeL, entailment"):
        load_reward_function(name, None, None, CPU)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "gave 1 .*2 texts"),
        ([1.0, 2.0, 3.0], "gave 3 .*2 texts"),
        (None, "gave None, .*2 numbers"),
        (1.5, r"gave 1\.5, .*2 numbers"),
        ("ab", "gave 'ab', .*2 numbers"),
        ([1.0, float("nan")], "gave nan .*row 1.*'second'"),
        ([float("inf"), 1.0], "gave inf .*row 0"),
        ([1.0, "high"], "gave 'high' .*row 1"),
        ([None, 1.0], "gave None .*row 0"),
    ],
)
def test_values_that_are_no_rewards_are_told(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^reward 'm:f' {message}"):
        compute_rewards("m:f", lambda *_: given, ["p", "p"], ["first", "second"], ["", ""])


@pytest.mark.parametrize("given", [(1, 0), np.array([1.0, 0.0]), torch.tensor([1.0, 0.0]), [True, False]])
def test_any_sequence_of_numbers_will_do(given: Any) -> None:
    assert compute_rewards("m:f", lambda *_: given, ["p", "p"], ["a", "b"], ["", ""]) == [1, 0]


def test_what_a_function_raises_is_told_with_its_place(package: str) -> None:
    name = f"{package}.rewards:divides"
    message = rf"reward '{name}' raised ZeroDivisionError: division by zero \(rewards.py, line 10\)"
    with pytest.raises(ValueError, match=message):
        compute_rewards(name, load_reward_function(name, None, None, CPU), ["p"], ["t"], ["r"])


def test_what_compares_needs_something_to_compare_with() -> None:
    for name in ("exact_match", "rouge2", "rougeL"):
        rule = load_reward_function(name, None, None, CPU)
        with pytest.raises(ValueError, match=f"'{name}' .* 1 of 2 rows"):
            compute_rewards(name, rule, ["p", "q"], ["a", "b"], ["r", ""])


def test_a_function_that_leaves_the_program_has_failed() -> None:
    def leaves(*_: Any) -> Any:
        raise SystemExit(0)

    with pytest.raises(ValueError, match=r"'m:f' .*SystemExit: 0 \(test_reward"):
        compute_rewards("m:f", leaves, ["p"], ["t"], ["r"])
