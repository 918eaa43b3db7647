"""The machine."""

import beaver_ray  # noqa: F401  (before DeepSpeed, which it silences)
