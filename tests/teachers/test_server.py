"""A teacher behind a server: what is asked and read, and a server that is slow, down, or no such server."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gkd_lab.encoding.batches import collate_examples
from gkd_lab.losses.step_loss import MicroBatch
from gkd_lab.models.forward import compute_completion_logits
from gkd_lab.teachers.cached_teachers import ServerTeacher, build_top_k_scores
from gkd_lab.teachers.server import (
    API_KEY_VARIABLE,
    TEXTS_PER_REQUEST,
    ServerRejection,
    ServerUnavailable,
    TeacherServer,
)
from gkd_lab.teachers.top_k_distributions import TopKTeacherLogits, select_top_k

from ..models.tiny import PAD, tiny_examples, tiny_model, tiny_tokenizer
from .teacher_server import Served, serving


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(Served(tiny_model("decoder-only", 3, width=32, dtype=torch.float32))) as server:
        yield server


def endpoint(served: Served, **changes: Any) -> TeacherServer:
    return TeacherServer(
        **{"server": served.address, "model": "large", "top_k": 4, "patience": 0.3, **changes}
    )


def test_a_token_is_named_with_the_most_likely_first(served: Served) -> None:
    text = [3, 7, 5]
    (tokens,) = endpoint(served).request_scores([text])
    logits = served.model(torch.tensor([text])).logits[0].detach()
    exact = select_top_k(logits[:2], 4, torch.float32)
    assert exact.ids is not None
    assert [[id_ for id_, _ in token] for token in tokens] == exact.ids.tolist()
    scores = build_top_k_scores(tokens, 4)
    torch.testing.assert_close(scores.log_probs, exact.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.tail_log_prob, exact.tail_log_prob, rtol=1e-3, atol=1e-3)


def test_a_server_s_logits_are_the_live_teacher_s(served: Served) -> None:
    rows = tiny_examples(2 * TEXTS_PER_REQUEST + 2)
    batch = collate_examples(rows, PAD, is_encoder_decoder=False)
    step = MicroBatch(batch, batch, (0, 1), (False, False), (0, 0))
    guide = ServerTeacher(endpoint(served), tiny_tokenizer()).compute_logits(step)
    with torch.no_grad():
        logits = compute_completion_logits(served.model, batch)
    exact = TopKTeacherLogits.create(
        select_top_k(logits, 4, torch.float32).apply(lambda t: t.view(2, -1, *t.shape[2:])), logits.shape[-1]
    )
    assert guide.shape == exact.shape
    real = batch.completion_mask.bool().view(2, -1)
    for block in (0, 1):
        at = real[block].nonzero()[:, 0]
        read = [
            teacher_logits.create_reader(14, torch.float32, len(at))(block, at).exp()
            for teacher_logits in (guide, exact)
        ]
        torch.testing.assert_close(*read, rtol=1e-3, atol=1e-5)
    assert [len(body["prompt"]) for body in served.asked] == [16, 16, 2]


def test_the_key_comes_from_the_environment(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.key = "of-this-test-alone"
    with pytest.raises(ServerRejection, match=f"status 401.*{API_KEY_VARIABLE}"):
        endpoint(served).request_scores([[3, 4]])
    monkeypatch.setenv(API_KEY_VARIABLE, served.key)
    assert len(endpoint(served).request_scores([[3, 4]])[0]) == 1
    assert served.key not in repr(endpoint(served))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_to_a_busy_server_is_retried(served: Served, status: int) -> None:
    served.down, served.status = 2, status
    assert len(endpoint(served, patience=1).request_scores([[3, 4, 5]])[0]) == 2
    assert len(served.asked) == 3


def test_an_unavailable_server_fails_after_the_patience(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.down = 1000
    start = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"0.3 s .*status 503.*checkpoint"):
        endpoint(served).request_scores([[3, 4]])
    assert time.monotonic() - start < 5
    assert 2 <= len(served.asked) < 10
    messages = [r.getMessage() for r in caplog.records if r.name == "gkd_lab.teachers.server"]
    assert len(messages) == 1 and served.address in messages[0] and "0.3 s" in messages[0]


def test_an_address_without_a_server_is_unavailable() -> None:
    with serving(Served(None)) as gone:
        pass
    with pytest.raises(ServerUnavailable, match=r"ConnectError.*Connection refused"):
        endpoint(gone).request_scores([[3, 4]])


def test_a_server_that_takes_too_long_is_unavailable(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "choice", lambda *_: time.sleep(0.5))
    with pytest.raises(ServerUnavailable, match="ReadTimeout"):
        endpoint(served, timeout=0.05).request_scores([[3, 4]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 21}, r"status 400\): .*20.*`--max-logprobs`"),
        ({"model": "lrage"}, r"lrage \(status 404\)"),
    ],
)
def test_what_another_try_would_not_change_is_told_at_once(
    served: Served, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServerRejection, match=message):
        endpoint(served, patience=60, **changes).request_scores([[3, 4]])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("<html>", "answers no JSON: <html>"),
        ([], "as vLLM does"),
        ({"choices": [{"index": 0, "text": "x"}]}, "there is no 'prompt_logprobs'"),
        ({"choices": []}, "0 choices for 1"),
        ({"choices": [{"index": 0, "prompt_logprobs": None}]}, "no prompt_logprobs for 2"),
        ({"choices": [{"index": 0, "prompt_logprobs": [None]}]}, "1 prompt_logprobs for 2"),
        ({"choices": [{"index": 0, "prompt_logprobs": [None, {"a": 1}]}]}, "entry is {'a': 1}"),
        (
            {"choices": [{"index": 0, "prompt_logprobs": [None, {"3": {"logprob": -1.0}}]}]},
            "1 tokens .*where 4",
        ),
    ],
)
def test_an_answer_in_another_format_is_refused_with_the_reason(
    served: Served, answer: Any, message: str
) -> None:
    served.answer = answer
    with pytest.raises(ServerRejection, match=message):
        endpoint(served).request_scores([[3, 4]])


@pytest.mark.parametrize(("field", "value"), [("server", "127.0.0.1:8000"), ("top_k", 0)])
def test_an_endpoint_that_cannot_be_is_refused(field: str, value: Any) -> None:
    stated: dict[str, Any] = {"server": "http://a/v1", "model": "large", "top_k": 4, field: value}
    with pytest.raises(ValueError, match=f"{field} {value!r}"):
        TeacherServer(**stated)


def test_an_encoder_decoder_student_is_refused_with_advice(served: Served) -> None:
    student = tiny_model("encoder-decoder", 7)
    with pytest.raises(ValueError, match=r"encoder-decoder.*`CachedTeacher`"):
        ServerTeacher(endpoint(served), tiny_tokenizer()).check_compatibility(
            student, [], seq_kd=False, eval_on_policy=False
        )
