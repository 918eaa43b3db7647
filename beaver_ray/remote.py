"""Score models that are a web address: somebody else's service scores the texts.

Which hosts the answers of a run may be sent to is for whoever starts it to say, not for its configuration, which may
come from elsewhere.
"""

from __future__ import annotations

import os
from urllib.parse import SplitResult, urlsplit

from beaver_ray.errors import UserError

ALLOWED_HOSTS = "BEAVER_RAY_SCORER_HOSTS"
"""Environment variable with the allow-list: HOST or HOST:PORT, with commas between them."""


def is_remote(model: str) -> bool:
    """Whether ``model`` is the address of a scoring service, and no folder or name of a hub."""
    return model.startswith(("http://", "https://"))


def check_address(url: str) -> SplitResult:
    """The parts of a scoring service's address; ValueError where it has no host, or has what may be a secret."""
    parts = urlsplit(url)
    if not parts.hostname or not 0 < (parts.port or 80) < 65536:
        raise ValueError(f"{url} names no host; write http://HOST:PORT/PATH")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"{parts.scheme}://{parts.hostname}: user names, passwords and queries (?...) would be written to "
            "config.yaml and the logs; put credentials into ~/.netrc of the scorer's node"
        )
    return parts


def check_allowed(url: str) -> None:
    """UserError where the environment does not name the host that a run would send its texts to."""
    parts = check_address(url)
    entries = os.environ.get(ALLOWED_HOSTS, "").lower().split(",")
    allowed = {entry.strip() for entry in entries}
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not {parts.hostname, f"{parts.hostname}:{port}"} & allowed:
        raise UserError(
            f"{url}: texts may not be sent to {parts.hostname}, which {ALLOWED_HOSTS} does not name; allow it with "
            f"export {ALLOWED_HOSTS}={parts.hostname}:{port} (commas between several)"
        )
