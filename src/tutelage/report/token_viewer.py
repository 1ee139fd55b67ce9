"""The recorded tokens as the page embeds them: data that no browser can take for markup."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from tutelage.report import text
from tutelage.report.conversations import outcome_line, turns_of
from tutelage.report.records import TokenRecord
from tutelage.report.tokens import DEFAULT_CUTS, fixed_cuts

_MAX_TEXT = 40
_MAX_PROMPT = 4000
_LEFT_OUT = {"texts", "inserted", "outcome"}
# With these escapes no text can end the script element or begin another.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def viewer_context(tokens: Sequence[TokenRecord], config: dict[str, Any]) -> dict[str, Any]:
    """What the template needs to show recorded tokens; `tokens` is None where there are none."""
    if not tokens:
        return {"tokens": None, "has_conversations": False}
    has_conversations = any(record.inserted is not None for record in tokens)
    script = template_text("token_viewer.js")
    if has_conversations:
        script += template_text("conversations.js")
    return {
        "tokens": embedded(_data(tokens, config)),
        "has_conversations": has_conversations,
        "script": script,
        "script_hash": csp_hash(script),
        "keep": keep_of(config),
        "gate": _gate(config),
    }


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


def _data(tokens: Sequence[TokenRecord], config: dict[str, Any]) -> dict[str, Any]:
    texts: dict[str, str] = {}
    for record in tokens:
        texts |= record.texts
    cuts = fixed_cuts(config)
    return {
        "texts": {key: text.visible(value, _MAX_TEXT) for key, value in texts.items()},
        "cuts": cuts or DEFAULT_CUTS,
        "is_median": cuts is None,
        "completions": [_completion(record) for record in tokens],
    }


def _completion(record: TokenRecord) -> dict[str, Any]:
    shown = record.model_dump(exclude=_LEFT_OUT)
    return shown | {
        "prompt": text.visible(record.prompt, _MAX_PROMPT),
        "prompt_id": text.visible(record.prompt_id, 80),
        "kind": text.visible(record.kind, 40),
        **_conversation(record),
    }


def _conversation(record: TokenRecord) -> dict[str, Any]:
    if record.inserted is None:
        return {}
    outcome = {} if record.outcome is None else {"outcome": outcome_line(record.outcome)}
    return {"turns": [turn.as_dict() for turn in turns_of(record)], **outcome}


def keep_of(config: dict[str, Any]) -> float:
    """The rules' budget: the run's own, or a fifth where it learns from every token."""
    match config.get("selection"):
        case {"keep": int() | float() as keep}:
            return keep
    return 0.2


def _gate(config: dict[str, Any]) -> str:
    """The gate in words."""
    match config.get("objective"):
        case {"kind": "eopd", "gate": str(kind), "threshold": int() | float() as threshold}:
            return f"that of the run: {text.visible(kind, 40)}, threshold {threshold:g}"
    return "the paper's, a teacher entropy of 0.8 nats or more; the run does not use it"
