"""GRPO on fixed tokens equals TRL 1.16's; `make test-peers` puts TRL where this test finds it.

TRL's defaults `loss_type = "dapo"` and `scale_rewards = "group"` are ours, and `"bnpo"` is the same
where all completions are in one batch. Its `"grpo"` and `"dr_grpo"` differ, and the test sees it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tutelage.core import LazyLogits, composite_objective
from tutelage.core.policy import ClippedPolicy, group_advantages

FOLDER = Path(__file__).resolve().parents[2] / ".venvs" / "trl"
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not FOLDER.exists(), reason="needs trl: make test-peers"),
]

NUM_SAMPLES, VOCAB, WIDTH = 3, 29, 8
LENGTHS = [4, 7, 1, 5, 5, 2, 6, 3, 7]
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.25, 0.5, 0.0]  # the second prompt teaches nothing
CLIPS = (0.2, 0.28)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TRL's module of its trainer."""
    monkeypatch.syspath_prepend(str(FOLDER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl
        from trl.trainer import grpo_trainer

    assert trl.__version__ == "1.16.0"
    return grpo_trainer


class Numbers:
    """The same hidden states, head, tokens and old log-probabilities for both sides, float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        longest, count = max(LENGTHS), len(LENGTHS)
        self.hidden = torch.randn(count, longest, WIDTH, generator=generator).double()
        self.weight = torch.randn(VOCAB, WIDTH, generator=generator).double()
        self.tokens = torch.randint(0, VOCAB, (count, longest), generator=generator)
        self.mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
        moved = 0.4 * torch.randn(count, longest, generator=generator).double()
        self.old = self.log_probs(self.hidden, self.weight)[0] + moved

    def log_probs(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens and entropies, `[B, T]`, materialised."""
        log_p = (hidden @ weight.t()).log_softmax(-1)
        of_tokens = log_p.gather(-1, self.tokens[..., None]).squeeze(-1)
        return of_tokens, -(log_p.exp() * log_p).sum(-1)


def by_trl(peer: Any, numbers: Numbers, scale: str, loss_type: str) -> tuple[float, list[Tensor]]:
    """TRL's loss of one batch in one process, and its gradients."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64).view(-1, NUM_SAMPLES)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (peer.nanstd(rewards, dim=1)[:, None] + 1e-4)
    leaves = [numbers.hidden.clone().requires_grad_(), numbers.weight.clone().requires_grad_()]
    one = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (*numbers.log_probs(*leaves), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        args=args,
        loss_type=loss_type,
        epsilon_low=CLIPS[0],
        epsilon_high=CLIPS[1],
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=max(LENGTHS),
        accelerator=one,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    prompt = torch.ones(len(LENGTHS), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": numbers.tokens,
        "completion_mask": numbers.mask.long(),
        "advantages": advantages.flatten(),
        "old_per_token_logps": numbers.old,
        "num_items_in_batch": numbers.mask.sum(),
    }
    loss = peer.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), [leaf.grad for leaf in leaves if leaf.grad is not None]


def by_us(numbers: Numbers, scale: str) -> tuple[float, list[Tensor]]:
    advantages = group_advantages(torch.tensor(REWARDS), NUM_SAMPLES, scale)
    rows = [x[numbers.mask] for x in (numbers.tokens, numbers.old)]
    row_advantages = advantages[:, None].expand_as(numbers.mask)[numbers.mask]
    term = ClippedPolicy(*rows, row_advantages, *CLIPS)
    leaves = [numbers.hidden.clone().requires_grad_(), numbers.weight.clone().requires_grad_()]
    student = LazyLogits(leaves[0][numbers.mask], leaves[1])
    loss = composite_objective(student, None, [(term, 1.0)]).total / sum(LENGTHS)
    loss.backward()
    assert 0 < int(term.is_clipped.sum()) < sum(LENGTHS)
    return float(loss.detach()), [leaf.grad for leaf in leaves if leaf.grad is not None]


def distance(a: tuple[float, list[Tensor]], b: tuple[float, list[Tensor]]) -> float:
    """The largest relative difference of the losses and the gradients."""
    pairs = zip(a[1], b[1], strict=True)
    gaps = [float((x - y).norm() / y.norm()) for x, y in pairs]
    return max(abs(a[0] - b[0]) / abs(b[0]), *gaps)


@pytest.mark.parametrize(("theirs", "ours"), [("group", "std"), ("none", "none")])
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_value_and_gradient_equal_trls(peer: Any, theirs: str, ours: str, loss_type: str) -> None:
    numbers = Numbers()
    assert distance(by_us(numbers, ours), by_trl(peer, numbers, theirs, loss_type)) < 1e-6


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_other_normalizations_differ(peer: Any, loss_type: str) -> None:
    numbers = Numbers()
    assert distance(by_us(numbers, "std"), by_trl(peer, numbers, "group", loss_type)) > 0.01
