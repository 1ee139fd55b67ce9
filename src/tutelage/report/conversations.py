"""Recorded conversations as turns: what was generated, and the text inserted behind each turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.report import text
from tutelage.report.records import OutcomeRecord, TokenRecord
from tutelage.report.tokens import cuts_of, quadrant, rows_of, snapshots

_MAX_SHOWN = 4
_MAX_OPEN_CHARS = 400
"""Inserted text up to this length is shown at once; longer text opens when asked for."""
_MAX_CHARS = 4000
_MAX_DETAILS = 24


@dataclass(frozen=True)
class TurnRecord:
    """A turn of the student and what was inserted behind it; either can be empty."""

    number: int
    """From 1; 0 where nothing was generated in front of the inserted text."""
    start: int
    """Index of its first token."""
    stop: int
    """Index behind its last token."""
    inserted: str
    """The text of tools and of the chat template, which is never trained on."""

    def as_dict(self) -> dict[str, Any]:
        """The turn as the page shows it: visible text with a summary of its length."""
        return {
            "number": self.number,
            "start": self.start,
            "stop": self.stop,
            "inserted": text.visible(self.inserted, _MAX_CHARS),
            "summary": f"Inserted, not trained on: {len(self.inserted):,} characters",
            "is_open": len(self.inserted) <= _MAX_OPEN_CHARS,
        }


@dataclass(frozen=True)
class TurnView:
    """A turn with its tokens as text."""

    turn: dict[str, Any]
    tokens: tuple[tuple[str, str], ...]
    """(text, CSS class of its quadrant)."""


@dataclass(frozen=True)
class ConversationView:
    """A recorded conversation on a page."""

    title: str
    prompt: str
    outcome: str
    is_success: bool
    turns: tuple[TurnView, ...]
    num_hidden: int
    """Generated tokens that were not recorded."""


def turns_of(record: TokenRecord) -> list[TurnRecord]:
    """The turns of a recorded conversation, as far as its tokens were recorded.

    Args:
        record: a recorded completion.

    Returns:
        Turns in their order. What was inserted behind the last recorded token is left out where
        more tokens followed; a single answer has no turns.
    """
    if record.inserted is None:
        return []
    end = len(record.token)
    last = end if record.num_tokens == end else end - 1
    turns, start, number = [], 0, 0
    for place, inserted in record.inserted:
        if place > last:
            break
        number += place > start
        turns.append(TurnRecord(number if place > start else 0, start, place, inserted))
        start = place
    return [*turns, TurnRecord(number + 1, start, end, "")] if start < end else turns


def outcome_line(outcome: OutcomeRecord) -> str:
    """Success, score, turns, errors of tools and other measures, as far as they are known."""
    details = text.visible_rows(outcome.details)[:_MAX_DETAILS]
    return " · ".join([*_measures(outcome), *(f"{name} {value}" for name, value in details)])


def conversation_views(
    tokens: Sequence[TokenRecord], config: dict[str, Any]
) -> list[ConversationView]:
    """The first conversations of the last snapshot that has any, held-out ones before others.

    Args:
        tokens: recorded completions of a run.
        config: the run's configuration, for the cuts of the quadrants.
    """
    found = [record for record in tokens if record.inserted is not None]
    last = max((record.step for record in found), default=0)
    by_snapshot = {kind: records for (step, kind), records in snapshots(found).items()
                   if step == last}  # fmt: skip
    views = [
        view
        for kind in sorted(by_snapshot, key=lambda kind: kind != "held-out")
        for view in _views(by_snapshot[kind], config)
    ]
    return views[:_MAX_SHOWN]


def _measures(outcome: OutcomeRecord) -> Iterator[str]:
    if outcome.is_success is not None:
        yield "success" if outcome.is_success else "no success"
    if outcome.score is not None:
        yield f"score {text.number(outcome.score)}"
    if outcome.num_turns is not None:
        yield _counted(outcome.num_turns, "turn")
    if outcome.num_tool_errors is not None:
        yield _counted(outcome.num_tool_errors, "tool error")


def _counted(count: int, what: str) -> str:
    return f"{text.number(count)} {what}{'' if count == 1 else 's'}"


def _views(records: Sequence[TokenRecord], config: dict[str, Any]) -> Iterator[ConversationView]:
    rows = rows_of(records)
    cuts = cuts_of(rows, config) if rows else (0.0, 0.0)
    classes = {(id(row.record), row.index): f"q{quadrant(row, cuts)}" for row in rows}
    for record in records[:_MAX_SHOWN]:
        outcome = record.outcome or OutcomeRecord()
        name = f"{record.kind} · {record.prompt_id} · sample {record.sample} · step {record.step}"
        yield ConversationView(
            text.visible(name, 160),
            text.visible(record.prompt, _MAX_CHARS),
            outcome_line(outcome),
            outcome.is_success is True,
            tuple(
                TurnView(
                    turn.as_dict(),
                    tuple(
                        (_text(record, index), classes.get((id(record), index), ""))
                        for index in range(turn.start, turn.stop)
                    ),
                )
                for turn in turns_of(record)
            ),
            record.num_tokens - len(record.token),
        )


def _text(record: TokenRecord, index: int) -> str:
    token = str(record.token[index])
    return text.visible(record.texts.get(token, f"⟨id {token}⟩"), 40)
