"""The hub's side of a push: is there a token, may it write there; errors in the words of a user."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (  # HTTPError is httpx's or httpx2's, whichever this version uses
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from gkd_lab.config.errors import ConfigError

LOGIN_ADVICE = "log in with `hf auth login`, or set the variable HF_TOKEN to a token that may write"


def check_login(token: str | None = None) -> str:
    """Return the user's name on the hub. ConfigError without a token, or with one that the hub refuses."""
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("nothing can be pushed while HF_HUB_OFFLINE is set: unset it")
    if not (token or get_token()):
        raise ConfigError(f"there is no token for {constants.ENDPOINT}: {LOGIN_ADVICE}")
    with explain_hub_errors("the login"):
        return str(HfApi(token=token).whoami()["name"])


@contextmanager
def explain_hub_errors(what: str) -> Iterator[None]:
    """Re-raise the hub's errors inside the block: what a user can change as ConfigError, others as OSError.

    what: Names the request in the message.
    """
    try:
        yield
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(f"{what}: {LOGIN_ADVICE}") from error
    except HFValidationError as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split())}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or f"status {status}"
        if status in (401, 403):
            raise ConfigError(
                f"{what} is refused by {constants.ENDPOINT}: {reason}; {LOGIN_ADVICE} there"
            ) from error
        raise OSError(f"{what} failed at {constants.ENDPOINT}: {reason}") from error
    except HTTPError as error:
        raise OSError(f"{what}: {constants.ENDPOINT} cannot be reached: {error}") from error
