"""A Ray jobs server, looked at before anything is sent to it.

Whoever reaches one that asks for no token can run programs on the cluster (CVE-2023-48022).
"""

import http.client
import os
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from engine.config import UserError
from engine.progress import say
from engine.storage.access import literal_address

__all__ = ["jobs_address", "require_authentication"]

_TIMEOUT_S = 30.0


def jobs_address(told: str) -> str:
    """The url that a cluster takes jobs at: as told; else RAY_API_SERVER_ADDRESS; else that of a
    cluster on this machine. Raises UserError for what is no such url, and says what would be."""
    address = told or os.environ.get("RAY_API_SERVER_ADDRESS", "") or "http://127.0.0.1:8265"
    scheme, mark, rest = address.partition("://")
    host = (rest if mark else address).partition("/")[0].rpartition("@")[2].partition(":")[0]
    likely = f"http://{host or 'HOST'}:8265"
    if not mark:
        raise UserError(f"address: {address} has no scheme; jobs are taken at a url like {likely}")
    if scheme == "ray":
        raise UserError(
            f"address: {address} is where Ray Client connects; jobs go to the dashboard, {likely}"
        )
    try:
        parts = urlsplit(address)
        named = scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port, or an IPv6 address, that is none
        named = False
    if not named:
        raise UserError(f"address: {address} is not a url like http://HOST:8265")
    if "@" in parts.netloc:
        raise UserError(
            f"address: leave user and password out of it ({likely}): Ray wants a token, as "
            "RAY_AUTH_TOKEN with RAY_AUTH_MODE=token"
        )
    return address.rstrip("/")


def require_authentication(address: str, unless_allowed: bool) -> None:
    """Asks for the list of jobs without a token.

    Raises UserError where there is no answer, and where there is the list, unless that is allowed.
    Says so where the token of RAY_AUTH_MODE=token is going to be sent unencrypted.
    """
    parts = urlsplit(jobs_address(address))
    if _is_open(address):
        if not unless_allowed:
            raise UserError(
                f"address: the Ray cluster at {address} asks for no token, so whoever reaches it "
                "can run programs there. Start its head and nodes with RAY_AUTH_MODE=token, or "
                "accept that by --allow-unauthenticated"
            )
        say(f"warning: the Ray cluster at {address} asks for no token: anybody can run jobs there")
    if parts.scheme == "http" and _sends_token() and not _is_loopback(parts.hostname or ""):
        say(
            f"warning: the cluster's token, and the job, go to {parts.hostname} unencrypted; "
            "https, or a tunnel to a loopback address (ssh -L), hides them"
        )


def _is_open(address: str) -> bool:
    url = f"{address.rstrip('/')}/api/jobs/"
    opener = urllib.request.build_opener(_Unmoved)
    try:
        with opener.open(url, timeout=_TIMEOUT_S):
            return True
    except urllib.error.HTTPError as answer:
        answer.close()
        if answer.code in (401, 403) or 300 <= answer.code < 400:  # a proxy's page to sign in
            return False
        why = f"it answers {answer.code} {answer.reason}"
    except (OSError, http.client.HTTPException) as error:
        why = str(getattr(error, "reason", error))
    raise UserError(
        f"address: no Ray cluster takes jobs at {address}: {why}. It is the dashboard's address, "
        "mostly of port 8265"
    )


class _Unmoved(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the answer is to be that of the address itself."""

    def redirect_request(self, *_: object) -> None:
        return None


def _sends_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _is_loopback(host: str) -> bool:
    address = literal_address(host) or host
    return address in ("localhost", "::1") or address.startswith("127.")
