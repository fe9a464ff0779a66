"""A teacher behind an OpenAI-compatible server that gives prompt log-probabilities, as vLLM does.

One request scores several texts: `POST /completions` with `prompt` the lists of token ids and
`prompt_logprobs` k, a field of vLLM's (vllm/entrypoints/openai); each choice has for every token but the
first {"<id>": {"logprob": ...}}: the k most likely ones, and the one that is there if it is not among them.
vLLM generates one token at least, and allows `--max-logprobs`, 20 unless it is told otherwise.

A server that does not answer is asked again, ever more slowly, until the patience is over.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "GKD_LAB_TEACHER_KEY"
"""Environment variable with the server's key, which is sent and written down nowhere."""
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 30.0
"""Seconds between the first two tries, doubled each time up to the longest."""
TEXTS_PER_REQUEST = 16
RETRIED_STATUS_CODES = (408, 409, 425, 429)
"""Answers that another try may not get, besides those from 500 on."""

TokenLogProbs = list[tuple[int, float]]
"""(token, log-probability) of the k most likely tokens, the most likely first."""


class ServerUnavailable(RuntimeError):
    """A teacher's server did not answer in all the time that it was given."""


class ServerRejection(ValueError):
    """A teacher's server answered that it will not do what it is asked to, or something else than scores."""


@dataclass(frozen=True)
class TeacherServer:
    """A model behind a server.

    server: such as http://127.0.0.1:8000/v1. model: its name there. top_k: tokens named of each distribution.
    patience: seconds of tries before `ServerUnavailable`. timeout: seconds for one answer.
    """

    server: str
    model: str
    top_k: int
    patience: float = 300.0
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not self.server.startswith(("http://", "https://")):
            raise ValueError(
                f"server {self.server!r} is no address: give one such as http://127.0.0.1:8000/v1"
            )
        if self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} names no token: give 1 or more")

    def request_scores(self, texts: Sequence[Sequence[int]]) -> list[list[TokenLogProbs]]:
        """Of each text, for every token but the first, what could stand there.

        Raises:
            ServerDown: after `patience` seconds without an answer.
            ServerRefused: for an answer that another try would not change.
        """
        found: list[list[TokenLogProbs]] = []
        with httpx.Client(timeout=self.timeout, headers=_build_headers()) as client:
            for first in range(0, len(texts), TEXTS_PER_REQUEST):
                some = [list(text) for text in texts[first : first + TEXTS_PER_REQUEST]]
                answer = self._post_request(client, some)
                found += self._parse_answer(answer, [len(text) for text in some])
        return found

    def _post_request(self, client: httpx.Client, texts: list[list[int]]) -> Any:
        body = {
            "model": self.model,
            "prompt": texts,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.top_k,
        }
        address = self.server.rstrip("/") + "/completions"

        def once() -> httpx.Response:
            answer = client.post(address, json=body)
            if answer.status_code >= 500 or answer.status_code in RETRIED_STATUS_CODES:
                answer.raise_for_status()
            return answer

        answer = retry_until_timeout(once, self.patience, f"the teacher's server {self.server}")
        if answer.is_error:
            raise ServerRejection(
                f"the teacher's server {self.server} refuses to score with {self.model} (status "
                f"{answer.status_code}): {_summarize_answer(answer)}{_suggest_fix(answer.status_code)}"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise ServerRejection(
                f"the teacher's server {self.server} answers no JSON: {_summarize_answer(answer)}"
            ) from error

    def _parse_answer(self, answer: Any, lengths: Sequence[int]) -> list[list[TokenLogProbs]]:
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            listed = [choice["prompt_logprobs"] for choice in choices]
        except (KeyError, TypeError) as error:
            raise self._build_format_error(f"there is no {error}") from error
        if len(listed) != len(lengths):
            raise self._build_format_error(f"{len(listed)} choices for {len(lengths)} texts")
        return [self._parse_text(one, length) for one, length in zip(listed, lengths, strict=True)]

    def _parse_text(self, listed: Any, length: int) -> list[TokenLogProbs]:
        if not isinstance(listed, list) or len(listed) != length:
            count = len(listed) if isinstance(listed, list) else "no"
            raise self._build_format_error(f"{count} prompt_logprobs for {length} tokens")
        return [self._parse_token(one) for one in listed[1:]]

    def _parse_token(self, one: Mapping[str, Mapping[str, float]]) -> TokenLogProbs:
        try:
            found = sorted(
                ((int(id_), float(said["logprob"])) for id_, said in one.items()), key=_get_likelihood_order
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._build_format_error(f"a token's entry is {str(one)[:80]}") from error
        if len(found) < self.top_k:
            raise self._build_format_error(
                f"{len(found)} tokens of each distribution where {self.top_k} are asked for"
            )
        return found[: self.top_k]

    def _build_format_error(self, why: str) -> ServerRejection:
        return ServerRejection(
            f"the teacher's server {self.server} does not give prompt log-probabilities as vLLM does: {why}"
        )


def retry_until_timeout(
    send_request: Callable[[], httpx.Response], max_wait: float, server_name: str
) -> httpx.Response:
    """What `once` returns, tried again while the server cannot be reached or fails. Raises ServerDown."""
    start, pause, said = time.monotonic(), min(FIRST_RETRY_SECONDS, max_wait / 8), False
    while True:
        try:
            return send_request()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if time.monotonic() - start + pause > max_wait:
                raise ServerUnavailable(
                    f"{server_name} gave no answer in {max_wait:g} s ({type(error).__name__}: {_describe_error(error)}): "
                    "start it again, and resume from the last checkpoint"
                ) from error
            if not said:
                logger.warning("%s does not answer: waiting for up to %g s", server_name, max_wait)
            said = True
        time.sleep(pause)
        pause = min(2 * pause, MAX_RETRY_SECONDS)


def _build_headers() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _get_likelihood_order(named: tuple[int, float]) -> tuple[float, int]:
    return -named[1], named[0]


def _describe_error(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}, {_summarize_answer(error.response)}"
    return str(error) or "no reason given"


def _summarize_answer(answer: httpx.Response) -> str:
    """The beginning of what the server says, in one line."""
    return " ".join(answer.text.split())[:200]


def _suggest_fix(status: int) -> str:
    if status in (401, 403):
        return f"; give its key in the environment variable {API_KEY_VARIABLE}"
    if status == 404:
        return "; is the address complete, /v1 included, and the model's name the one that it serves?"
    return "; vLLM names more than 20 tokens only with `--max-logprobs`" if status == 400 else ""
