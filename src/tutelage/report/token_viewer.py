"""The recorded tokens as the page embeds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tutelage.report import text
from tutelage.report.conversations import outcome_line, turns_of
from tutelage.report.embed import embedded
from tutelage.report.records import TokenRecord
from tutelage.report.tokens import DEFAULT_CUTS, fixed_cuts

_MAX_TEXT = 40
_MAX_PROMPT = 4000
_LEFT_OUT = {"texts", "inserted", "outcome"}


def viewer_context(
    tokens: Sequence[TokenRecord], config: dict[str, Any], *more: dict[str, Any]
) -> dict[str, Any]:
    """What the template needs to show recorded tokens; `tokens` is None where there are none.

    Args:
        tokens: completions of one run or of several.
        config: configuration of the run, of the baseline among several.
        more: configurations of the others.
    """
    if not tokens:
        return {"tokens": None, "has_conversations": False}
    has_conversations = any(record.inserted is not None for record in tokens)
    return {
        "tokens": embedded(_data(tokens, config)),
        "has_conversations": has_conversations,
        "keep": keep_of(config),
        "has_gate": any(map(uses_eopd, (config, *more))),
        "gate": _gate(next(filter(uses_eopd, (config, *more)), {})),
    }


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


def uses_eopd(config: dict[str, Any]) -> bool:
    """Whether the run's objective has a gate."""
    match config.get("objective"):
        case {"kind": "eopd"}:
            return True
    return False


def _gate(config: dict[str, Any]) -> str:
    """The gate in words."""
    match config.get("objective"):
        case {"kind": "eopd", "gate": str(kind), "threshold": int() | float() as threshold}:
            return f"{text.visible(kind, 40)}, threshold {threshold:g} nats of teacher entropy"
    return "open at a teacher entropy of 0.8 nats or more"
