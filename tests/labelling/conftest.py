from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beaver_ray.data.pairs import pair_id
from beaver_ray.json_files import write_rows
from beaver_ray.labelling.export import Export, export_pairs
from tests.labelling.support import GOOD, pair


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Export]:
    """Exports six pairs and two gold questions to ``tmp_path/out``."""
    pairs = [pair(number) for number in range(6)]
    pairs[0] |= {"prompt": ["a <b>\n</script>", "no", 'why, "x"?']}
    pairs[0]["id"] = pair_id(pairs[0])
    write_rows(tmp_path / "pairs.jsonl", pairs)
    safe = {name: bool(bit) if name.startswith("is") else bit for name, bit in GOOD.items()}
    write_rows(tmp_path / "gold.jsonl", [pair(number, **safe) for number in (100, 101)])

    def export(**more: Any) -> Export:
        given: dict[str, Any] = {"gold": tmp_path / "gold.jsonl", "count": None, "seed": 3} | more
        return export_pairs(tmp_path / "pairs.jsonl", tmp_path / "out", **given)

    return export
