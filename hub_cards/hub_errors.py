"""What the Hub or the network answers, said in one sentence that tells what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


# The base of HfHubHTTPError is the HTTP library's, which differs between releases; what it raises for a lost
# connection is among its subclasses or among OSErrors. A large file that failed several times is a RuntimeError.
_FAILURES: tuple[type[Exception], ...] = (OSError, RuntimeError, *HfHubHTTPError.__bases__)


class HubFailure(ValueError):
    """The Hub refused or could not be reached; the message says why, what stands there now, and what to do."""


def check_reachable(option: str, name: str, needs_login: bool = True) -> None:
    """Refuse what cannot succeed, before any work is done.

    Args:
        option: What the user wrote before the name, for the message.
        name: Hub id, `user/name`.
        needs_login: Whether it cannot be done without a token.

    Raises:
        ValueError: It is no id, the network is switched off, or there is no token.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or len(name) > 96:
        raise ValueError(f"`{option} {name}` is no id of a repository. Pass `user/name`.")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"`{option} {name}` needs the network, but HF_HUB_OFFLINE is set. Unset it, or push later.")
    if needs_login and get_token() is None:
        raise ValueError(f"`{option} {name}` needs a login. Run `hf auth login`, or set HF_TOKEN.")


@contextmanager
def tell_hub_failures(name: str, what: str, state: str = "") -> Iterator[None]:
    """Turn what the client raises into a `HubFailure`.

    Args:
        name: Hub id that is worked on.
        what: What is being done, as in "was not pushed".
        state: What can be said of the repository after a failure.

    Raises:
        HubFailure: The block failed for a reason on the Hub's side or on the way to it.
    """
    try:
        yield
    except _FAILURES as error:
        if isinstance(error, FileNotFoundError) and not isinstance(error, HfHubHTTPError):
            raise
        raise HubFailure(" ".join(filter(None, [f"{name} {what}: {_reason(error)}", state]))) from error


def _reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and this token may not see it. Check name and token."
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision. Check the name of the branch, tag or commit."
    if status == 401:
        return "the token is not valid. Run `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "this token may not write there. Use a write token of its owner, or pass --create-pr."
    if status in (409, 412):
        return "somebody else has committed to it meanwhile. Look at what changed, then run the same command again."
    if status is not None:
        return f"the Hub answered {status}. Run the same command again later."
    cause = error.__cause__ or error
    said = (str(cause).strip() or type(cause).__name__).split("\n")[0]
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    return f"the connection to {endpoint} failed ({said[:200]}). Run the same command again."
