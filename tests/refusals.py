"""How tests say which message a refusal must bear."""

from __future__ import annotations

import re

import pytest


def raises(error: type[BaseException], text: str):
    """text: what the message must hold, with .. for whatever lies between its parts."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, text.split(".."))))
