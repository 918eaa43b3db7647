"""A generator that cannot read weights on the policy's device, in a module of its own: vLLM is slow to import."""

from __future__ import annotations

from actors.roles.generator import VllmGenerator
from beaver_ray.weights import PublishedWeights
from tests.actors.light_roles import Blind


class OverConfidentGenerator(Blind, VllmGenerator):
    """On a node without NIXL, which it does not find out in time."""

    def read(self, weights: PublishedWeights, timeout_s: float) -> None:
        """Says that all is well."""
