"""Data, style and script as a page embeds them: no browser can take text for markup."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

# With these escapes no text can end the script element or begin another.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def embedded(data: Any) -> str:
    """JSON to stand inside a script element of a type that no browser executes."""
    plain = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return plain.translate(_ESCAPES)


def csp_hash(content: str) -> str:
    """The source expression that allows exactly this style or script element."""
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def template_text(name: str) -> str:
    """A file of the templates as it is."""
    return (files("tutelage.report") / "templates" / name).read_text("utf-8")
