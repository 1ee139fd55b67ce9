"""A page in a browser, with what it said and asked for."""

from __future__ import annotations

from typing import Any

BENIGN = ["a", "b", " c", "\n", "def", "9"]
"""Texts of tokens."""


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, page: Any, lines: list[dict[str, Any]]) -> None:
        self.page, self.lines = page, lines
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.requests.append(request.url))

    def cells(self, place: str) -> list[list[str]]:
        rows = self.page.locator(f"{place} tbody tr").all()
        return [row.locator("th,td").all_inner_texts() for row in rows]

    def line(self, step: int, kind: str = "held-out", prompt: str = "a") -> dict[str, Any]:
        found = [n for n in self.lines if (n["step"], n["kind"]) == (step, kind)]
        return next(n for n in found if n["prompt_id"] == prompt)
