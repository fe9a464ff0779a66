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
        """Return each text's `top_k` likeliest (token, log-probability) pairs at all positions but the first.

        texts: token ids.

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
        """Send one scoring request, retrying temporary errors; return the answer's JSON, not yet checked.

        Raises ServerUnavailable, and ServerRejection for another error or no JSON.
        """
        body = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.top_k,
        }
        address = self.server.rstrip("/") + "/completions"

        def send_request() -> httpx.Response:
            """Post once and return the response, even an error's; raise for a temporary error alone."""
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
        """Return the scores of all texts in their order; ServerRejection if the answer has another form.

        lengths: each text's number of tokens.
        """
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            texts = [choice["prompt_logprobs"] for choice in choices]
        except (KeyError, TypeError) as error:
            raise self._build_format_error(f"there is no {error}") from error
        if len(texts) != len(lengths):
            raise self._build_format_error(f"{len(texts)} choices for {len(lengths)} texts")
        return [self._parse_text(text, length) for text, length in zip(texts, lengths, strict=True)]

    def _parse_text(self, entries: Any, length: int) -> list[TokenLogProbs]:
        """Return a text's top tokens at all positions but the first; ServerRejection if some are missing."""
        if not isinstance(entries, list) or len(entries) != length:
            count = len(entries) if isinstance(entries, list) else "no"
            raise self._build_format_error(f"{count} prompt_logprobs for {length} tokens")
        return [self._parse_token(entry) for entry in entries[1:]]

    def _parse_token(self, entry: Mapping[str, Mapping[str, float]]) -> TokenLogProbs:
        """Return a position's `top_k` likeliest (token, log-probability) pairs; ServerRejection if fewer."""
        try:
            tokens = [(int(id_), float(values["logprob"])) for id_, values in entry.items()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._build_format_error(f"a token's entry is {str(entry)[:80]}") from error
        if len(tokens) < self.top_k:
            raise self._build_format_error(
                f"{len(tokens)} tokens of each distribution where {self.top_k} are asked for"
            )
        return sorted(tokens, key=_build_likelihood_sort_key)[: self.top_k]

    def _build_format_error(self, reason: str) -> ServerRejection:
        """Return, without raising it, the error for an answer in another form than vLLM's."""
        return ServerRejection(
            f"the teacher's server {self.server} does not give prompt log-probabilities as vLLM does: "
            f"{reason}"
        )


def retry_until_timeout(
    send_request: Callable[[], httpx.Response], max_wait: float, server_name: str
) -> httpx.Response:
    """Return the response, retrying failures with growing pauses; ServerUnavailable after `max_wait` s.

    A failure is a connection error or a temporary status.
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
    """Return the authorization header with the key from the environment, or an empty dict without a key."""
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _build_likelihood_sort_key(token: tuple[int, float]) -> tuple[float, int]:
    """Return the sort key (-log-probability, id): most likely tokens first, equally likely ones by id."""
    return -token[1], token[0]


def _describe_error(error: Exception) -> str:
    """Return one line: the status and the beginning of the answer, or the text of a connection error."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}, {_summarize_answer(error.response)}"
    return str(error) or "no reason given"


def _summarize_answer(response: httpx.Response) -> str:
    """Return the first 200 characters of an answer's text in one line."""
    return " ".join(response.text.split())[:200]


def _suggest_fix(status: int) -> str:
    """Return advice to append to the message for status 400, 401, 403 or 404; otherwise an empty string."""
    if status in (401, 403):
        return f"; give its key in the environment variable {API_KEY_VARIABLE}"
    if status == 404:
        return "; is the address complete, /v1 included, and the model's name the one that it serves?"
    return "; vLLM names more than 20 tokens only with `--max-logprobs`" if status == 400 else ""
