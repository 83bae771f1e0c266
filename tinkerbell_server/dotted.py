"""The form of a dotted path, `my.module:function`. Imports nothing."""

from __future__ import annotations

import re

DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def is_dotted(name: str) -> bool:
    """Whether a name has the form `my.module:function`."""
    return DOTTED.fullmatch(name) is not None
