"""KV slots of open completions by a model's own forward pass, for any causal architecture.

Architectures differ in what their caches hold (keys and values, recurrent and convolution states)
and in whether padding leaves those states alone. `slots_for` tries the forms below on a few short
prompts, in the order of their speed, and takes the first that gives the hidden states of each
sequence computed alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tutelage.errors import ModelError
from tutelage.models.forward import (
    Ids,
    backbone,
    foreign,
    read_alone,
    relative_gap,
    rounding,
    run,
    trial_ids,
)
from tutelage.models.llama_cpu.decode import TRIAL_TOKENS as DECODE_TRIAL
from tutelage.models.llama_cpu.decode import FastSlots
from tutelage.models.llama_cpu.layers import is_fast_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CACHES = ("past_key_values", "cache_params", "state")
"""What architectures call their cache, as an argument and in their output."""
_LENGTHS = (5, 2, 3)
"""Tokens of the prompts that a form is tried on."""
_NUM_STEPS = 4
TRIAL_TOKENS = max(_LENGTHS) + _NUM_STEPS
"""The longest sequence of a trial."""


class PlainSlots:
    """One cache for all rows; a batch is padded on the left and starts as a whole."""

    refills = False
    hidden: Tensor
    note = ""
    """What a user should know of this form."""

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.model = model
        self.pad = pad
        self.base = backbone(model)
        parameters = inspect.signature(self.base.forward).parameters
        self.cache_name = next((name for name in _CACHES if name in parameters), _CACHES[0])

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in all slots; their former rows are gone."""
        self.cache: Any = None  # the model makes one of the kind that it needs
        distinct = list(dict.fromkeys(prompts))
        width = max(len(ids) for ids in distinct)
        padded = [[self.pad] * (width - len(ids)) + list(ids) for ids in distinct]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in distinct]
        device = self.model.device
        self.mask = torch.tensor(mask, device=device)
        self.is_padded = min(len(ids) for ids in distinct) < width
        self.position = self.mask.sum(1)
        position = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.hidden = self._forward(torch.tensor(padded, device=device), position)
        if len(distinct) < len(prompts):
            row = {ids: i for i, ids in enumerate(distinct)}
            self.keep(torch.tensor([row[ids] for ids in prompts], device=device))

    def decode_step(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.hidden = self._forward(tokens[:, None], self.position[:, None])
        self.position = self.position + 1

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        # What beam search needs of a cache, and every kind of layer has.
        self.cache.reorder_cache(index)
        self.mask, self.position = self.mask[index], self.position[index]
        self.hidden = self.hidden[index]

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        # Positions also where nothing is padded: hybrids may not know how many tokens there were.
        masks = {"position_ids": position}
        if self.is_padded:
            masks["attention_mask"] = self.mask
        cache = {} if self.cache is None else {self.cache_name: self.cache}
        output = run(self.base, input_ids=ids, use_cache=True, **masks, **cache)
        self.cache = output[self.cache_name]
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden


class AlignedSlots:
    """One cache for each length of prompt, so that nothing is padded."""

    refills = False
    hidden: Tensor
    note = (
        "prefills prompts of each length by themselves, for padding would change what it computes"
    )

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.model = model
        self.pad = pad

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in all slots; their former rows are gone."""
        self.groups: list[tuple[PlainSlots, Tensor]] = []
        """Slots of one length, and their indices among all."""
        for length in sorted({len(ids) for ids in prompts}):
            found = [i for i, ids in enumerate(prompts) if len(ids) == length]
            aligned = PlainSlots(self.model, self.pad)
            aligned.prefill(range(len(found)), [prompts[i] for i in found])
            self.groups.append((aligned, torch.tensor(found, device=self.model.device)))
        self._join()

    def decode_step(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        for slots, index in self.groups:
            slots.decode_step(tokens[index])
        self._join()

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        groups = []
        for slots, mine in self.groups:
            new, old = (index[:, None] == mine).nonzero(as_tuple=True)
            if len(new):
                slots.keep(old)
                groups.append((slots, new))
        self.groups = groups
        self._join()

    def _join(self) -> None:
        index = torch.cat([index for _, index in self.groups])
        self.hidden = torch.cat([slots.hidden for slots, _ in self.groups])[index.argsort()]


class RecomputedSlots:
    """No cache: every token is a forward pass over the whole sequences, padded on the right."""

    refills = False
    hidden: Tensor
    note = "has no cache that rows can be taken from: every token is a pass over all tokens before"

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.model = model
        self.pad = pad
        self.base = backbone(model)

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in all slots; their former rows are gone."""
        self.rows = list(prompts)
        self._forward()

    def decode_step(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        pairs = zip(self.rows, tokens.tolist(), strict=True)
        self.rows = [(*ids, token) for ids, token in pairs]
        self._forward()

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        self.rows = [self.rows[i] for i in index.tolist()]
        self.hidden = self.hidden[index]

    def _forward(self) -> None:
        device = self.model.device
        width = max(map(len, self.rows))
        padded = [list(ids) + [self.pad] * (width - len(ids)) for ids in self.rows]
        states = run(self.base, input_ids=torch.tensor(padded, device=device), use_cache=False)
        last = torch.tensor([len(ids) - 1 for ids in self.rows], device=device)
        rows = torch.arange(len(last), device=device)
        self.hidden = states.last_hidden_state[rows, last]


ModelSlots = PlainSlots | AlignedSlots | RecomputedSlots
_FORMS: tuple[type[ModelSlots], ...] = (PlainSlots, AlignedSlots, RecomputedSlots)
_KNOWN: WeakKeyDictionary[PreTrainedModel, type[ModelSlots]] = WeakKeyDictionary()


def slots_for(model: PreTrainedModel, pad: int) -> ModelSlots:
    """Slots in the fastest form that gives what the model gives for each sequence alone.

    Raises:
        ModelError: there is no such form; transformers' own reason is in it.
    """
    form = _KNOWN.get(model)
    if form is not None:
        return form(model, pad)
    sequences = [trial_ids(model, length + _NUM_STEPS, i) for i, length in enumerate(_LENGTHS)]
    trial = _Trial(sequences, [read_alone(model, ids) for ids in sequences])
    if not all(bool(states.isfinite().all()) for states in trial.states):
        return PlainSlots(model, pad)  # which says that the model gives no numbers
    form = _KNOWN[model] = _first_exact(model, pad, trial)
    return form(model, pad)


class _Trial(NamedTuple):
    """Prompts with their continuations, and hidden states of each as a whole `[T, D]`."""

    sequences: list[Ids]
    states: list[Tensor]


def _first_exact(model: PreTrainedModel, pad: int, trial: _Trial) -> type[ModelSlots]:
    reason = ""
    for form in _FORMS:
        try:
            with foreign("keeps a cache that rows cannot be taken from", model):
                gap = _gap(form(model, pad), trial)
        except ModelError as error:
            reason = str(error)
            continue
        if gap <= rounding(model):
            return form
        reason = f"hidden states differ by {gap:.2g} of their size"
    raise ModelError(
        f"{type(model).__name__} cannot be decoded in batches: beside others a sequence has "
        f"other hidden states than alone ({reason.rstrip('.')}). Use another architecture."
    )


@torch.no_grad()
def _gap(slots: ModelSlots, trial: _Trial) -> float:
    """Largest difference of rows that share a prompt, end early and are followed by others."""
    device = slots.model.device
    gaps = []
    for order in ([0, 1, 0, 2], [2, 1], [0]):
        slots.prefill(range(len(order)), [trial.sequences[i][: _LENGTHS[i]] for i in order])
        for step in range(_NUM_STEPS + 1):
            ends = [_LENGTHS[i] + step for i in order]
            expected = [trial.states[i][end - 1] for i, end in zip(order, ends, strict=True)]
            gaps.append(relative_gap(slots.hidden, torch.stack(expected)))
            if step == _NUM_STEPS:
                break
            tokens = [trial.sequences[i][end] for i, end in zip(order, ends, strict=True)]
            slots.decode_step(torch.tensor(tokens, device=device))
            if step == 1 and len(order) > 1:
                order = order[1:]
                slots.keep(torch.arange(1, len(order) + 1, device=device))
    return max(gaps) if not any(map(math.isnan, gaps)) else float("nan")


class Slots(Protocol):
    """Completions that are decoded together, one slot each."""

    refills: bool
    """Whether `prefill` can fill free slots while other rows are open."""

    @property
    def hidden(self) -> Tensor:
        """Hidden states after the final norm that predict the next tokens `[B, D]`."""

    def prefill(
        self, slots: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in these slots; equal prompts share one prefill.

        Args:
            slots: Slots to fill.
            prompts: One for each of them.
            following: Prompts to be started next, which may be prefilled with them.
        """

    def decode_step(self, tokens: Tensor) -> None:
        """Feed one token to every row."""

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""


def open_slots(
    model: PreTrainedModel,
    prompt: Ids,
    pad: int,
    num_slots: int,
    max_length: int,
    is_fast: bool = True,
) -> Slots:
    """Slots without prompts, in the fastest form that computes what the model computes.

    Args:
        model: Causal language model.
        prompt: Ids to try the fast form on.
        pad: Padding id.
        num_slots: Number of slots.
        max_length: Most tokens of a prompt with its completion.
        is_fast: False forces the model's own forward pass.
    """
    if (
        is_fast
        and is_fast_family(model)
        and FastSlots(model, pad, 2, DECODE_TRIAL).matches_model(prompt)
    ):
        return FastSlots(model, pad, num_slots, max_length)
    return slots_for(model, pad)
