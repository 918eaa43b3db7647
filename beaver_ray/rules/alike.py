"""Characters that are written in several ways, in one."""

from __future__ import annotations

import unicodedata

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4", "'"))


def alike(text: str) -> str:
    """Apostrophes as on a keyboard, letters and signs of one width, each with its accents in one character."""
    return unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
