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
MAX_BYTES = 4_400_000
"""Most bytes of recorded tokens on a page, which leaves the rest of 5 MB for all else on it."""
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
    shown, data = _fitting(tokens, config)
    left_out = _left_out(shown, tokens)
    if not shown:
        return {"tokens": None, "has_conversations": False, "left_out": left_out}
    has_conversations = any(record.inserted is not None for record in shown)
    return {
        "tokens": data,
        "left_out": left_out,
        "has_conversations": has_conversations,
        "keep": keep_of(config),
        "has_gate": any(map(uses_eopd, (config, *more))),
        "gate": _gate(next(filter(uses_eopd, (config, *more)), {})),
    }


def _fitting(
    tokens: Sequence[TokenRecord], config: dict[str, Any]
) -> tuple[Sequence[TokenRecord], str]:
    """The completions that fit into `MAX_BYTES`, and their data: of fewer steps, evenly spaced.

    The first and the last step stay. Where two steps are too large, completions of them are left
    out in the same way.
    """
    while True:
        data = embedded(_data(tokens, config))
        size = len(data.encode("utf-8"))
        if size <= MAX_BYTES or not tokens:
            return tokens, data
        share, steps = MAX_BYTES / size, sorted({record.step for record in tokens})
        if len(steps) > 2:
            few = _spaced(steps, max(2, int(share * len(steps))))
            tokens = [record for record in tokens if record.step in few]
        else:
            tokens = _spaced(tokens, int(share * len(tokens)))


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of more items, evenly spaced, of two and more with the first and the last."""
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def _left_out(shown: Sequence[TokenRecord], tokens: Sequence[TokenRecord]) -> str | None:
    """What the page does not show, in words."""
    if len(shown) == len(tokens):
        return None
    steps, all_steps = ({record.step for record in part} for part in (shown, tokens))
    return (
        f"The page shows {len(shown):,} of {len(tokens):,} recorded completions, of {len(steps):,} "
        f"of {len(all_steps):,} steps, to stay below 5 MB. tokens.jsonl has all of them."
    )


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
