"""The mutants of conversations, in the form of `mutant_list`."""

from __future__ import annotations

from .mutant_list_core import Group

_SAMPLED = ["rollout/test_conversations.py"]

AGENT_MUTANTS: dict[str, Group] = {
    "data/batch.py": (
        ["invariance/test_masked_rollouts.py"],
        [
            ("masks = [r.is_generated or (True,)", "masks = [(True,)"),
            (
                "if any(r.is_generated for r in rollouts)",
                "if all(r.is_generated for r in rollouts)",
            ),
            ("[torch.arange(sum(mask)) for mask", "[torch.zeros(sum(mask)).long() for mask"),
        ],
    ),
    "data/types.py": (
        ["invariance/test_masked_rollouts.py"],
        [
            (
                "for token, is_generated in pairs if is_generated)",
                "for token, is_generated in pairs)",
            )
        ],
    ),
    "rollout/conversation.py": (
        _SAMPLED,
        [
            ("limit - (len(row.tokens) - row.turn_start)", "limit - len(row.tokens)"),
            ("if tokens[-1] not in self.stops:", "if False:"),
            ("dialogue.num_turns >= self.limits.max_turns", "False"),
            ("or num_inserted > self.limits.max_inserted_tokens", ""),
            ("[False] * len(inserted)", "[True] * len(inserted)"),
            (
                "tokens = row.tokens[row.turn_start :]\n        text",
                "tokens = row.tokens\n        text",
            ),
        ],
    ),
    "rollout/dialogue.py": (
        _SAMPLED,
        [
            ("if reply.is_timeout:", "if False:"),
            ("turn is not None and not dialogue.lost", "turn is not None"),
            ("self.num_errors += reply.num_errors", "pass"),
            ("map(_written, reply.messages)", "reply.messages"),
        ],
    ),
    "rollout/cuda/extend.py": (
        ["rollout/test_captured_conversations.py"],
        [
            ("every.minimum(end - 1)", "every.expand(len(following), -1)"),
            ("seen &= columns", "seen |= columns"),
        ],
    ),
    "rollout/request.py": (
        _SAMPLED,
        [
            ("self.turn_start = len(self.tokens)", "pass"),
            ("len(self.tokens) + between", "len(self.tokens)"),
        ],
    ),
    "rollout/generate.py": (
        _SAMPLED,
        [
            ("torch.where(pending[step] >= 0, pending[step], token)", "token"),
            ("or row is None or step <= len(row.pending)", "or row is None"),
            ("len(row.pending) + self.conversations.num_left", "self.conversations.num_left"),
            ("not isinstance(self.slots, FastSlots) or 8 *", "8 *"),
            ("first = [len(row.tokens) - len(row.pending) if", "first = [len(row.tokens) if"),
        ],
    ),
    "models/llama_cpu/decode.py": (
        _SAMPLED,
        [
            (
                "is_hidden = self.columns[:width] > positions",
                "is_hidden = self.columns[:width] >= positions",
            ),
            ("turn = self.turn[positions]", "turn = self.turn[query]"),
            (
                "[len(new) for _, _, new in following], device=device).cumsum(0) - 1",
                "[len(new) for _, _, new in following], device=device).cumsum(0) - 2",
            ),
            (
                "self.position = self.position.index_copy(0, slot, ends)",
                "self.position = self.position.index_copy(0, slot, ends - 1)",
            ),
            ("mask[place] = bias", "pass"),
        ],
    ),
}
