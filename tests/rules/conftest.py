"""What tests of rules share."""

from __future__ import annotations

import pytest

from tests.rules.running import has_namespaces


@pytest.fixture(params=[False, True], ids=["guard", "namespaces"])
def namespaces(request: pytest.FixtureRequest) -> bool:
    """Each of the two ways to be confined; that by namespaces where the kernel gives them."""
    if request.param and not has_namespaces():
        pytest.skip("the kernel gives no namespaces here")
    return bool(request.param)
