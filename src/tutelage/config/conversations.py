"""Data whose prompts are answered in conversations with an environment, as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from tutelage.config.bounds import STRICT, require, require_counts


@dataclass(frozen=True)
class ConversationData:
    """What every kind of conversation has; `sampling.max_new_tokens` limits what is generated in
    all its turns together."""

    __pydantic_config__ = STRICT
    max_turns: int = 16
    """Turns of the model, after which a conversation is cut off."""
    max_turn_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of one turn, after which a conversation is cut off; 0 sets no limit but that of all
    turns."""
    max_inserted_tokens: int = 4096
    """Tokens that are inserted between turns in all (answers of tools, the template's own text);
    a conversation that would need more is cut off."""
    tool_timeout_s: float = 10.0
    """Seconds that the calls of a turn may take; then an error is inserted, and every later
    call of the conversation fails."""
    tool_format: Literal["auto", "hermes", "llama3", "json"] = "auto"
    """Format of the tool calls: `<tool_call>` tags (Qwen2.5, Qwen3), Llama 3's JSON with
    parameters, or plain JSON; auto tells by the chat template."""
    enable_thinking: bool | None = None
    """Passed to the chat template (Qwen3 thinks unless False); None leaves it to the template."""

    def __post_init__(self) -> None:
        require_counts("data.", self.__dict__, max_turns=1, max_inserted_tokens=1)
        seconds, hint = self.tool_timeout_s, "10 is usual."
        require(0 < seconds <= 3600, "data.tool_timeout_s", "in (0, 3600]", seconds, hint)


@dataclass(frozen=True)
class LedgerToolsData(ConversationData):
    """The embedded agentic task: look up numbers, add them by tool calls; every call is graded."""

    __pydantic_config__ = STRICT
    kind: Literal["ledger_tools"] = "ledger_tools"
    num_items: int = 3
    """Numbers that a prompt asks for, 2 to 16; the shipped models were trained on 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count, hint = self.num_items, "The shipped models were trained on 3."
        require(2 <= count <= 16, "data.num_items", "from 2 to 16", count, hint)


@dataclass(frozen=True)
class ShoppingData(ConversationData):
    """Carts filled by 15 tools in a generated shop, after DeepPlanning's shopping domain."""

    __pydantic_config__ = STRICT
    kind: Literal["shopping"] = "shopping"
    max_inserted_tokens: int = 16384
    """As for all conversations; details of 20 products are about 5,500 tokens."""
    level: int = 1
    """1: products; 2: products within a budget; 3: products and coupons."""
    num_products: int = 150
    """Products of a shop, at least 60."""
    max_items: int = 5
    """Products that a prompt asks for, from 2 to so many, at most 5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.level <= 3, "data.level", "1, 2 or 3", self.level, "1 is the easiest.")
        count, hint = self.num_products, "150 is usual."
        require(60 <= count <= 5000, "data.num_products", "from 60 to 5000", count, hint)
        most, hint = self.max_items, "Fewer are easier."
        require(2 <= most <= 5, "data.max_items", "from 2 to 5", most, hint)


@dataclass(frozen=True)
class TravelData(ConversationData):
    """Journeys planned by 9 tools in a generated country, after DeepPlanning's travel domain."""

    __pydantic_config__ = STRICT
    kind: Literal["travel"] = "travel"
    max_turns: int = 64
    """As for all conversations."""
    max_inserted_tokens: int = 32768
    """As for all conversations."""
    level: int = 1
    """Days and cities of a journey: 1, 2 or 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.level <= 3, "data.level", "1, 2 or 3", self.level, "1 is the easiest.")
