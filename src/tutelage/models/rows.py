"""Rows of open completions by a model's own forward pass, for any causal architecture.

Architectures differ in what their caches hold (keys and values, recurrent and convolution states)
and in whether padding leaves those states alone. `rows_for` tries the forms below on a few short
prompts, in the order of their speed, and takes the first that gives the hidden states of each
sequence read alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tutelage.errors import ModelError
from tutelage.models.foreign import foreign, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = tuple[int, ...]

_CACHES = ("past_key_values", "cache_params", "state")
"""What architectures call their cache, as an argument and in their output."""
_LENGTHS = (5, 2, 3)
"""Tokens of the prompts that a form is tried on."""
_NUM_STEPS = 4
TRIAL_TOKENS = max(_LENGTHS) + _NUM_STEPS
"""The longest sequence of a trial."""
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROUNDING_LOW_BITS = 0.1


def rounding(model: PreTrainedModel) -> float:
    """Largest relative difference between two ways to hidden states that rounding explains.

    In the Euclidean norm, by the dtype. Reading padding or a neighbour changes a tenth or more.
    """
    is_low = model.__dict__.get("hf_quantizer") is not None
    return _ROUNDING_LOW_BITS if is_low else _ROUNDING[model.dtype]


def backbone(model: PreTrainedModel) -> Any:
    """The part of a causal language model before its head.

    Raises:
        ModelError: there is none.
    """
    base: Any = model.base_model
    if base is not model:
        return base
    # Some classes of transformers name their backbone otherwise than they declare.
    inner = dict(model.named_children()).get("model")
    if inner is None:
        raise ModelError(
            f"{type(model).__name__} has no backbone apart from its head. "
            "Use a causal language model."
        )
    return inner


class PlainRows:
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

    def admit(
        self, places: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in all rows; those of before are gone."""
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

    def advance(self, tokens: Tensor) -> None:
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


class AlignedRows:
    """A cache for each length of prompt, so that nothing is padded."""

    refills = False
    hidden: Tensor
    note = "reads prompts of each length by themselves, for padding would change what it computes"

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.model = model
        self.pad = pad

    def admit(
        self, places: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in all rows; those of before are gone."""
        self.groups: list[tuple[PlainRows, Tensor]] = []
        """Rows of one length, and their places among all."""
        for length in sorted({len(ids) for ids in prompts}):
            found = [i for i, ids in enumerate(prompts) if len(ids) == length]
            rows = PlainRows(self.model, self.pad)
            rows.admit(range(len(found)), [prompts[i] for i in found])
            self.groups.append((rows, torch.tensor(found, device=self.model.device)))
        self._join()

    def advance(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        for rows, places in self.groups:
            rows.advance(tokens[places])
        self._join()

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        groups = []
        for rows, places in self.groups:
            new, old = (index[:, None] == places).nonzero(as_tuple=True)
            if len(new):
                rows.keep(old)
                groups.append((rows, new))
        self.groups = groups
        self._join()

    def _join(self) -> None:
        places = torch.cat([places for _, places in self.groups])
        self.hidden = torch.cat([rows.hidden for rows, _ in self.groups])[places.argsort()]


class RereadRows:
    """No cache: for every token the whole sequences are read again, padded on the right."""

    refills = False
    hidden: Tensor
    note = "has no cache that rows can be taken from: every token is a pass over all tokens before"

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        self.model = model
        self.pad = pad
        self.base = backbone(model)

    def admit(
        self, places: Sequence[int], prompts: Sequence[Ids], following: Sequence[Ids] = ()
    ) -> None:
        """Start the prompts in all rows; those of before are gone."""
        self.rows = list(prompts)
        self._read()

    def advance(self, tokens: Tensor) -> None:
        """Feed one token to every row."""
        pairs = zip(self.rows, tokens.tolist(), strict=True)
        self.rows = [(*ids, token) for ids, token in pairs]
        self._read()

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these."""
        self.rows = [self.rows[i] for i in index.tolist()]
        self.hidden = self.hidden[index]

    def _read(self) -> None:
        device = self.model.device
        width = max(map(len, self.rows))
        padded = [list(ids) + [self.pad] * (width - len(ids)) for ids in self.rows]
        states = run(self.base, input_ids=torch.tensor(padded, device=device), use_cache=False)
        last = torch.tensor([len(ids) - 1 for ids in self.rows], device=device)
        rows = torch.arange(len(last), device=device)
        self.hidden = states.last_hidden_state[rows, last]


OwnRows = PlainRows | AlignedRows | RereadRows
_FORMS: tuple[type[OwnRows], ...] = (PlainRows, AlignedRows, RereadRows)
_KNOWN: WeakKeyDictionary[PreTrainedModel, type[OwnRows]] = WeakKeyDictionary()


def rows_for(model: PreTrainedModel, pad: int) -> OwnRows:
    """Rows in the fastest form that gives what the model gives for each sequence alone.

    Raises:
        ModelError: there is no such form; transformers' own reason is in it.
    """
    form = _KNOWN.get(model)
    if form is not None:
        return form(model, pad)
    sequences = [trial_ids(model, length + _NUM_STEPS, i) for i, length in enumerate(_LENGTHS)]
    trial = _Trial(sequences, [read_alone(model, ids) for ids in sequences])
    if not all(bool(states.isfinite().all()) for states in trial.states):
        return PlainRows(model, pad)  # which says that the model gives no numbers
    form = _KNOWN[model] = _first_exact(model, pad, trial)
    return form(model, pad)


@torch.no_grad()
def read_alone(model: PreTrainedModel, ids: Ids) -> Tensor:
    """Hidden states of one sequence by a plain forward pass `[T, D]`."""
    row = torch.tensor([ids], device=model.device)
    states: Tensor = run(backbone(model), input_ids=row, use_cache=False).last_hidden_state[0]
    return states


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ of the row where that is largest; nan where one is no number."""
    wide, expected = ours.double(), theirs.double()
    gaps = (wide - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(gaps.max())


def trial_ids(model: PreTrainedModel, length: int, number: int = 0) -> Ids:
    """Different ids among the first of a vocabulary, where no placeholder of an image lies."""
    embeddings: Any = model.get_input_embeddings()
    size = min(embeddings.num_embeddings, 64)
    return tuple((5 + 11 * number + 7 * i) % size for i in range(length))


class _Trial(NamedTuple):
    """Prompts with their continuations, and hidden states of each as a whole `[T, D]`."""

    sequences: list[Ids]
    states: list[Tensor]


def _first_exact(model: PreTrainedModel, pad: int, trial: _Trial) -> type[OwnRows]:
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
        f"{type(model).__name__} cannot be decoded in batches: read with others it does not give "
        f"what it gives alone ({reason.rstrip('.')}). Use another architecture."
    )


@torch.no_grad()
def _gap(rows: OwnRows, trial: _Trial) -> float:
    """Largest difference of rows that share a prompt, end early and are followed by others."""
    device = rows.model.device
    gaps = []
    for order in ([0, 1, 0, 2], [2, 1], [0]):
        rows.admit(range(len(order)), [trial.sequences[i][: _LENGTHS[i]] for i in order])
        for step in range(_NUM_STEPS + 1):
            ends = [_LENGTHS[i] + step for i in order]
            expected = [trial.states[i][end - 1] for i, end in zip(order, ends, strict=True)]
            gaps.append(relative_gap(rows.hidden, torch.stack(expected)))
            if step == _NUM_STEPS:
                break
            tokens = [trial.sequences[i][end] for i, end in zip(order, ends, strict=True)]
            rows.advance(torch.tensor(tokens, device=device))
            if step == 1 and len(order) > 1:
                order = order[1:]
                rows.keep(torch.arange(1, len(order) + 1, device=device))
    return max(gaps) if not any(map(math.isnan, gaps)) else float("nan")
