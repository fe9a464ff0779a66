"""Teacher behind an OpenAI-compatible server that returns prompt log-probabilities, as vLLM does.

One request scores several texts: `POST /completions` with `prompt` the lists of token ids and
`prompt_logprobs` k, a field of vLLM's (vllm/entrypoints/openai); each choice has for every token but the
first {"<id>": {"logprob": ...}}: the k most likely tokens, and the actual one if it is not among them. vLLM
generates one token at least, and allows `--max-logprobs`, 20 by default. A request that fails is retried with
growing pauses.
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
"""Environment variable with the server's key, which is never written to a file or a log."""
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 30.0
"""Pause between the first two tries, doubled after each up to the maximum."""
TEXTS_PER_REQUEST = 16
RETRIED_STATUS_CODES = (408, 409, 425, 429)
"""Temporary errors, besides all status codes from 500 on."""

TokenLogProbs = list[tuple[int, float]]
"""(token, log-probability) of the k most likely tokens, the most likely first."""


class ServerUnavailable(RuntimeError):
    """A teacher's server did not answer within the maximum wait."""


class ServerRejection(ValueError):
    """A teacher's server rejected the request, or answered something else than scores."""


@dataclass(frozen=True)
class TeacherServer:
    """A model behind a server.

    server: Its address, such as http://127.0.0.1:8000/v1.
    model: The model's name there.
    top_k: Tokens named of each distribution.
    patience: Seconds of retries before `ServerUnavailable`.
    timeout: Seconds for one answer.
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
        """Return the most likely tokens at every position but the first of each text (token ids).

        Raises:
            ServerUnavailable: after `patience` seconds without an answer.
            ServerRejection: for an answer that another try would not change.
        """
        scores: list[list[TokenLogProbs]] = []
        with httpx.Client(timeout=self.timeout, headers=_build_headers()) as client:
            for first in range(0, len(texts), TEXTS_PER_REQUEST):
                prompts = [list(text) for text in texts[first : first + TEXTS_PER_REQUEST]]
                answer = self._post_request(client, prompts)
                scores += self._parse_answer(answer, [len(prompt) for prompt in prompts])
        return scores

    def _post_request(self, client: httpx.Client, prompts: list[list[int]]) -> Any:
        """Send one scoring request, with retries, and return the answer's JSON."""
        body = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.top_k,
        }
        address = self.server.rstrip("/") + "/completions"

        def send_request() -> httpx.Response:
            """Post once; raise for a temporary error."""
            response = client.post(address, json=body)
            if response.status_code >= 500 or response.status_code in RETRIED_STATUS_CODES:
                response.raise_for_status()
            return response

        response = retry_until_timeout(send_request, self.patience, f"the teacher's server {self.server}")
        if response.is_error:
            raise ServerRejection(
                f"the teacher's server {self.server} refuses to score with {self.model} (status "
                f"{response.status_code}): {_summarize_answer(response)}{_suggest_fix(response.status_code)}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise ServerRejection(
                f"the teacher's server {self.server} answers no JSON: {_summarize_answer(response)}"
            ) from error

    def _parse_answer(self, answer: Any, lengths: Sequence[int]) -> list[list[TokenLogProbs]]:
        """Return the scores of all texts, which have these numbers of tokens."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            texts = [choice["prompt_logprobs"] for choice in choices]
        except (KeyError, TypeError) as error:
            raise self._build_format_error(f"there is no {error}") from error
        if len(texts) != len(lengths):
            raise self._build_format_error(f"{len(texts)} choices for {len(lengths)} texts")
        return [self._parse_text(text, length) for text, length in zip(texts, lengths, strict=True)]

    def _parse_text(self, entries: Any, length: int) -> list[TokenLogProbs]:
        """Return the scores of one text's tokens but the first."""
        if not isinstance(entries, list) or len(entries) != length:
            count = len(entries) if isinstance(entries, list) else "no"
            raise self._build_format_error(f"{count} prompt_logprobs for {length} tokens")
        return [self._parse_token(entry) for entry in entries[1:]]

    def _parse_token(self, entry: Mapping[str, Mapping[str, float]]) -> TokenLogProbs:
        """Return the `top_k` most likely tokens of one position."""
        try:
            tokens = [(int(id_), float(values["logprob"])) for id_, values in entry.items()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._build_format_error(f"a token's entry is {str(entry)[:80]}") from error
        if len(tokens) < self.top_k:
            raise self._build_format_error(
                f"{len(tokens)} tokens of each distribution where {self.top_k} are asked for"
            )
        return sorted(tokens, key=_get_likelihood_order)[: self.top_k]

    def _build_format_error(self, reason: str) -> ServerRejection:
        """Build the error for an answer in another form than vLLM's."""
        return ServerRejection(
            f"the teacher's server {self.server} does not give prompt log-probabilities as vLLM does: "
            f"{reason}"
        )


def retry_until_timeout(
    send_request: Callable[[], httpx.Response], max_wait: float, server_name: str
) -> httpx.Response:
    """Return the response, retrying for `max_wait` seconds while the server cannot be reached or fails.

    Raises ServerUnavailable.
    """
    start, pause, has_warned = time.monotonic(), min(FIRST_RETRY_SECONDS, max_wait / 8), False
    while True:
        try:
            return send_request()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if time.monotonic() - start + pause > max_wait:
                raise ServerUnavailable(
                    f"{server_name} gave no answer in {max_wait:g} s ({type(error).__name__}: "
                    f"{_describe_error(error)}): start it again, and resume from the last checkpoint"
                ) from error
            if not has_warned:
                logger.warning("%s does not answer: waiting for up to %g s", server_name, max_wait)
            has_warned = True
        time.sleep(pause)
        pause = min(2 * pause, MAX_RETRY_SECONDS)


def _build_headers() -> dict[str, str]:
    """Return the authorization header, if the environment has a key."""
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _get_likelihood_order(token: tuple[int, float]) -> tuple[float, int]:
    """Return the sort key that puts likely tokens first and equally likely ones in the order of their ids."""
    return -token[1], token[0]


def _describe_error(error: Exception) -> str:
    """Return the reason of a failed request in one line."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}, {_summarize_answer(error.response)}"
    return str(error) or "no reason given"


def _summarize_answer(response: httpx.Response) -> str:
    """Return the beginning of an answer's text in one line."""
    return " ".join(response.text.split())[:200]


def _suggest_fix(status: int) -> str:
    """Return what to do about a status code, if it is known."""
    if status in (401, 403):
        return f"; give its key in the environment variable {API_KEY_VARIABLE}"
    if status == 404:
        return "; is the address complete, /v1 included, and the model's name the one that it serves?"
    return "; vLLM names more than 20 tokens only with `--max-logprobs`" if status == 400 else ""
