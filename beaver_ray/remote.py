"""Score models that are a web address: somebody else's service scores the texts.

Which hosts the answers of a run may be sent to is for whoever starts it to say, not for its configuration, which may
come from elsewhere.
"""

from __future__ import annotations

import os
import re

from beaver_ray.errors import UserError

ALLOWED_HOSTS = "BEAVER_RAY_SCORER_HOSTS"
"""Environment variable with the allow-list: HOST or HOST:PORT, with commas between them."""

# Narrow, so that nobody who reads it can see another host in it than the one that is checked here.
_ADDRESS = re.compile(
    r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?(/[^\s\\@?#]*)?", re.IGNORECASE | re.ASCII
)
_PORTS = {"http": 80, "https": 443}


def is_remote(model: str) -> bool:
    """Whether ``model`` is the address of a scoring service, and no folder or name of a hub."""
    return model.startswith(("http://", "https://"))


def check_address(url: str) -> tuple[str, int]:
    """(host, port) of a scoring service. ValueError, which does not repeat it, for what is no address or holds more."""
    found = _ADDRESS.fullmatch(url)
    port = int(found[3] or _PORTS[found[1].lower()]) if found else 0
    if not found or not 0 < port < 65536:
        raise ValueError(
            "a scoring service's address is http(s)://HOST, HOST:PORT or HOST:PORT/PATH, without user name, password, "
            "query (?...) or fragment (#...), which would stand in config.yaml and the logs; put credentials into "
            "~/.netrc of the scorer's node"
        )
    return found[2].lower(), port


def check_allowed(url: str) -> None:
    """UserError where the environment does not name the host that a run would send its texts to."""
    host, port = check_address(url)
    allowed = {entry.strip() for entry in os.environ.get(ALLOWED_HOSTS, "").lower().split(",")}
    if not {host, f"{host}:{port}"} & allowed:
        raise UserError(
            f"{url}: texts may not be sent to {host}, which {ALLOWED_HOSTS} does not name; allow it with "
            f"export {ALLOWED_HOSTS}={host}:{port} (commas between several)"
        )
