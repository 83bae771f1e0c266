"""Loads the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tinkerbell_core.errors import BadRequest


# Any: a tokenizer may be code of the model
def load_tokenizer(source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a hub id or a local folder. Raises BadRequest if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadRequest(f"cannot load the tokenizer of {str(source)!r}: {reason}") from error
