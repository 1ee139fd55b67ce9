"""What the report's token viewer shows: every token of a few completions, as compact JSON lines.

A snapshot is one line a completion, with a column for each number. Lines go to the log
`tokens.jsonl`, so that torn lines and continued runs are dealt with as in every other log.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tutelage.config.method import EOPDObjective
from tutelage.config.schema import Config
from tutelage.config.selection import AllTokens, FirstTokens
from tutelage.core.weighting import entropy_gate
from tutelage.data.types import Rollout
from tutelage.models.tokenizers import decode
from tutelage.rollout.request import RolloutRequest
from tutelage.setup.components import Components, agent_of
from tutelage.setup.numerics import plain_arithmetic
from tutelage.setup.objective import gate_of
from tutelage.setup.phases import PhaseCallback, no_log, no_phases
from tutelage.setup.shares import ALONE, Shares
from tutelage.train.score_request import ScoreRequest, rollouts_of
from tutelage.train.token_scores import (
    UNKNOWN_ID,
    Scores,
    loaded_components,
    refuse_unscored,
    score_rollouts,
)

NUM_TOP = 5
"""Likeliest tokens kept of student and teacher."""
PANEL_RULES = ("soft_or", "q3", "entropy", "divergence", "random")
"""Rules whose ranks are always kept; the run's own joins them."""
_PANEL_SEED = 777
"""The panel draws the same numbers in every snapshot, so that only the weights differ."""
_DIGITS = 4
_MAX_PAGE_TOKENS = 1024
"""Tokens of a completion that a page without a run shows."""


def snapshot(
    config: Config,
    components: Components,
    rollouts: Sequence[Rollout],
    step: int,
    shares: Shares = ALONE,
    places: Sequence[int] | None = None,
) -> list[str]:
    """JSON lines of the panel's completions, drawn now, and of some of the step's rollouts.

    Args:
        config: the run; its `recording` says how much.
        components: the models after `step`; the student has all weights.
        rollouts: what the step learned from, as many in each process; of these every n-th is taken.
        step: updates done.
        shares: the processes that sample and score together.
        places: the indices of `rollouts` among those of all processes; None counts from 0.

    Returns:
        One line a completion in the main process, none in the others, and none if there is nothing
        to record.
    """
    start, settings = time.perf_counter(), config.recording
    total = len(rollouts) * shares.count
    every = max(1, total // max(1, settings.num_rollouts))
    taken = range(0, total, every)[: settings.num_rollouts]
    of = dict(zip(range(total) if places is None else places, rollouts, strict=False))
    trained = {i: of[i] for i in taken if i in of}
    lines: list[dict[str, Any]] = []
    for kind, chosen in (("held-out", _panel(config, components, shares)), ("training", trained)):
        chosen = {i: rollout for i, rollout in chosen.items() if rollout.generated_ids}
        if any(shares.max([len(chosen)])):
            scores = score_rollouts(config, components, chosen, request_of(config), shares)
            lines += token_lines(config, components, scores, step, kind)
    seconds = round(time.perf_counter() - start, 4)
    return [_dump({**line, "seconds": seconds}) for line in lines]


@plain_arithmetic()
def score_for_page(
    config: Config,
    request: ScoreRequest,
    on_phase: PhaseCallback = no_phases,
    log: Callable[[str], None] = no_log,
    shares: Shares = ALONE,
) -> tuple[Scores, list[dict[str, Any]]]:
    """`score`, and its completions as the lines that a page is made of.

    Args:
        config: names student, teacher, data and sampling.
        request: which completions and rules; without rules those of a recording.
        on_phase: told what is being done.
        log: receives a line for what was left out of the prompts' records.
        shares: the processes that sample and score the completions together.

    Returns:
        Everything in the main process, and nothing in the others.

    Raises:
        TutelageError: models, data or request cannot be used.
    """
    refuse_unscored(config, request)
    request = replace(request, rules=request.rules or PANEL_RULES, num_top=NUM_TOP)
    config = replace(config, recording=replace(config.recording, max_new_tokens=_MAX_PAGE_TOKENS))
    with (
        loaded_components(config, on_phase, log, shares) as components,
        components.whole() as whole,
    ):
        rollouts = rollouts_of(config, whole, request, on_phase, log, shares)
        scores = score_rollouts(config, whole, rollouts, request, shares, on_phase)
    kind = "sampled" if request.completions is None else "given"
    return scores, list(token_lines(config, components, scores, 0, kind))


def request_of(config: Config) -> ScoreRequest:
    """The rules to rank tokens by, at the run's own budget or a fifth."""
    selection = config.selection
    names, keep = [*PANEL_RULES], 0.2
    if not isinstance(selection, AllTokens | FirstTokens):
        names, keep = [*names, selection.rule], selection.keep
    return ScoreRequest(rules=tuple(dict.fromkeys(names)), keep=keep, num_top=NUM_TOP)


def token_lines(
    config: Config, components: Components, scores: Scores, step: int, kind: str
) -> Iterator[dict[str, Any]]:
    """One record a completion; columns have one entry a token.

    Budgets and ranks are those of whole completions; what is kept of a long one is its start.

    Args:
        config: the run.
        components: for the tokenizer.
        scores: statistics, selections and likeliest tokens.
        step: updates done.
        kind: "held-out", "training" or "given".
    """
    if not scores.rollouts:  # in a process that is not the main one
        return
    gate = _gate(config, scores)
    texts: dict[int, str] = {}
    start = 0
    for rollout in scores.rollouts:
        generated = rollout.generated_ids
        size = len(generated)
        shown = slice(start, start + min(size, config.recording.max_new_tokens))
        whole, start = slice(start, start + size), start + size
        yield {
            "step": step,
            "kind": kind,
            "prompt_id": rollout.prompt.id,
            "sample": rollout.sample,
            "prompt": decode(components.tokenizer, _context(rollout)),
            "num_tokens": size,
            "token": list(generated[: config.recording.max_new_tokens]),
            **_between(components, rollout, shown.stop - shown.start),
            "entropy": _rounded(scores.stats.entropy[shown]),
            "reverse_kl": _rounded(scores.stats.reverse_kl[shown]),
            "forward_kl": _rounded(scores.stats.forward_kl[shown]),
            "teacher_entropy": _rounded(scores.stats.teacher_entropy[shown]),
            "log_p": _rounded(scores.stats.log_p[shown]),
            "log_q": _rounded(scores.stats.log_q[shown]),
            "gate": _rounded(gate[shown]),
            **_ranks(scores, whole, shown),
            **_candidates(components, scores, rollout, shown, texts),
        }


def _context(rollout: Rollout) -> Sequence[int]:
    """Ids before the first generated one: the prompt, and what a teacher sampled behind it."""
    if rollout.conversation is not None or not rollout.is_generated:
        return rollout.prompt_ids
    first = rollout.is_generated.index(True)
    return rollout.prompt_ids + rollout.completion_ids[:first]


def _between(components: Components, rollout: Rollout, num_shown: int) -> dict[str, Any]:
    """Of a conversation, the text between its turns, and its outcome.

    `inserted` holds, for each piece of text, how many generated tokens are before it. Of a
    completion that is cut off after `num_shown` tokens, what follows the cut is left out.
    """
    if rollout.conversation is None:
        return {}
    last = num_shown if num_shown == len(rollout.generated_ids) else num_shown - 1
    mask = rollout.is_generated or (True,) * len(rollout.completion_ids)
    pieces: list[tuple[int, list[int]]] = []
    num_generated, was_generated = 0, True
    for token, is_generated in zip(rollout.completion_ids, mask, strict=True):
        if is_generated:
            num_generated += 1
        else:
            if was_generated:
                pieces.append((num_generated, []))
            pieces[-1][1].append(token)
        was_generated = is_generated
    outcome = rollout.conversation.outcome
    return {
        "inserted": [
            [place, components.tokenizer.decode(ids)] for place, ids in pieces if place <= last
        ],
        "outcome": {
            "score": outcome.score,
            "is_success": outcome.is_success,
            "num_turns": rollout.conversation.num_turns,
            "num_tool_errors": rollout.conversation.num_tool_errors,
            "details": outcome.details,
        },
    }


def _panel(config: Config, components: Components, shares: Shares) -> dict[int, Rollout]:
    settings = config.recording
    if not settings.num_prompts:
        return {}
    agent = agent_of(config, components.task)
    longest = config.sampling.max_new_tokens
    if agent is None:  # the outcome of a conversation needs all of it
        longest = min(settings.max_new_tokens, longest)
    once = replace(config.sampling, num_samples=1, max_new_tokens=longest)
    prompts = components.task.held_out(settings.num_prompts)
    mine, seed = shares.mine(len(prompts)), (config.seed, _PANEL_SEED)
    request = RolloutRequest([prompts[i] for i in mine], once, seed, agent=agent)
    rollouts = shares.apart(partial(components.sampler.sample, request))
    components.forget_draws()
    return dict(zip(mine, rollouts, strict=True))


def _gate(config: Config, scores: Scores) -> Tensor:
    """EOPD's gate, the paper's where the run has another objective."""
    if isinstance(config.objective, EOPDObjective):
        return gate_of(config.objective, scores.stats)
    return entropy_gate(scores.stats.teacher_entropy)


def _ranks(scores: Scores, whole: slice, shown: slice) -> dict[str, Any]:
    """Each rule's order within the completion, 1 first, and the positions it keeps."""
    ranks, kept = {}, {}
    count = shown.stop - shown.start
    for rule, selection in scores.selections.items():
        score = selection.importance[whole]
        order = torch.where(torch.isfinite(score), score, -torch.inf).argsort(
            descending=True, stable=True
        )
        rank = torch.empty_like(order)
        rank[order] = torch.arange(1, len(order) + 1)
        ranks[rule] = rank[:count].tolist()
        kept[rule] = selection.mask[shown].nonzero().squeeze(1).tolist()
    return {"rank": ranks, "kept": kept}


def _candidates(
    components: Components, scores: Scores, rollout: Rollout, shown: slice, texts: dict[int, str]
) -> dict[str, Any]:
    """The likeliest tokens of both sides, and the text of every id that the line names.

    `texts` remembers what was decoded for other lines.
    """
    if scores.top is None:
        raise ValueError("token_lines needs scores with num_top above 0.")
    top = scores.top
    ids = {
        "student_top": top.student_ids[shown].tolist(),
        "teacher_top": [_told(row, row) for row in top.teacher_ids[shown].tolist()],
    }
    shares = zip(_rounded(top.teacher[shown]), top.teacher_ids[shown].tolist(), strict=True)
    named = {i for rows in ids.values() for row in rows for i in row}
    named |= set(rollout.generated_ids[: shown.stop - shown.start])
    texts |= {i: components.tokenizer.decode([i]) for i in named - texts.keys()}
    return {
        **ids,
        "student_share": _rounded(top.student[shown]),
        "teacher_share": [_told(row, row_ids) for row, row_ids in shares],
        "texts": {str(i): texts[i] for i in sorted(named)},
    }


def _told(row: list[Any], ids: list[int]) -> list[Any]:
    """The entries of a row whose ids the teacher tells."""
    return [value for value, token in zip(row, ids, strict=True) if token != UNKNOWN_ID]


def _rounded(values: Tensor) -> list[Any]:
    """Four significant digits; None for what is not finite, which JSON does not know.

    Args:
        values: `[N]`, or `[N, k]` for lists of k.
    """
    flat = [
        float(f"{x:.{_DIGITS}g}") if math.isfinite(x) else None for x in values.flatten().tolist()
    ]
    if values.ndim == 1:
        return flat
    size = values.shape[1]
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n"
