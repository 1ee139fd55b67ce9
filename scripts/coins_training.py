"""The tokenizer of the embedded coins models, and the examples that they are trained on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from ledger_training import NOT_A_TARGET, Schedule, Shape
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from tutelage.data.tasks.coins import (
    PIECE,
    CoinsTask,
    completion,
    parse_purchase,
    solve,
    vocabulary,
)
from tutelage.data.tasks.draws import pick
from tutelage.data.types import Prompt

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
MAX_LENGTH = 256


@dataclass(frozen=True)
class Recipe:
    """Everything that determines one model."""

    name: str
    summary: str
    schedule: Schedule
    is_student: bool = False
    careless_share: float = 0.0
    """Share of its examples that `pay_carelessly` writes."""
    shape: Shape = field(default_factory=Shape)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each piece of the task; puts <bos> first and maps other pieces to <unk>."""
    ids = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """From a step to token ids [B, T] and targets [B, T], in which only the completion counts."""
    size, seed = recipe.schedule.batch_size, recipe.schedule.seed

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{seed}/{step}")
        texts = []
        for prompt in CoinsTask().prompts(step, size, seed):
            share = recipe.careless_share
            # No draw where none is careless: it would change the other models.
            write = pay_carelessly if share and rng.random() < share else solve
            texts.append((str(prompt.content), write(prompt, rng)))
        pairs = [_encoded(tokenizer, *pair) for pair in texts]
        ids = pad_sequence(
            [ids for ids, _ in pairs], batch_first=True, padding_value=float(tokenizer.pad_token_id)
        )
        targets = [targets for _, targets in pairs]
        return ids, pad_sequence(targets, batch_first=True, padding_value=float(NOT_A_TARGET))

    return batch


def pay_carelessly(prompt: Prompt, rng: random.Random) -> str:
    """A completion whose coins are drawn without regard to what they leave, in `solve`'s form.

    Every coin is drawn evenly from those that do not exceed the rest. A rest that is less than
    every coin is added to the last one; the completion is then wrong, unless the purse has a coin
    of that value.
    """
    purchase = parse_purchase(prompt)
    assert purchase is not None
    rest, paid = purchase.amount, list[int]()
    while coins := [coin for coin in sorted(purchase.coins) if coin <= rest]:
        paid.append(pick(coins, rng))
        rest -= paid[-1]
    paid[-1] += rest
    return completion(paid, purchase.amount, rng)


def _encoded(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> tuple[Tensor, Tensor]:
    asked = tokenizer(prompt)["input_ids"]
    said = tokenizer(f"{completion}{EOS}", add_special_tokens=False)["input_ids"]
    ids = torch.tensor(asked + said)
    return ids, torch.cat([torch.full((len(asked),), NOT_A_TARGET), torch.tensor(said)])
