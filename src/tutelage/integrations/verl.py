"""Token selection inside verl: a distillation loss that selects and weighs the tokens of another.

verl gives a loss one number a token of a micro-batch, computed by verl itself from top-k or sampled
log-probabilities, and perhaps the student's entropy. So a divergence cannot be changed here, rules
rank by what there is, and scores are normalized over the micro-batch, not over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tutelage.core import TokenStats, select_tokens

_ENTROPY_RULES = ("entropy", "soft_or", "q3", "bottom")
RULES = ("all", "divergence", "first_n", *_ENTROPY_RULES)
"""Rules that neither draw at random nor need more of the teacher than verl gives."""


def token_weights(
    divergence: Tensor,
    mask: Tensor,
    entropy: Tensor | None = None,
    rule: str = "soft_or",
    keep: float = 0.5,
    scope: str = "completion",
    normalization: str = "minmax_p98",
    renormalize: bool = True,
) -> Tensor:
    """Loss weights of the tokens of a micro-batch, without gradient, `[B, T]`.

    Kept tokens weigh m/k, m being the tokens of their budget's group and k those kept of it, so
    that a mean over all tokens is one over kept tokens; without `renormalize` they weigh 1. Others,
    and tokens with a number that is not finite, weigh 0.

    Args:
        divergence: what verl computed of each token `[B, T]`; it stands for reverse and forward KL.
        mask: the tokens that count `[B, T]`.
        entropy: the student's, nats `[B, T]`, for the rules that rank by it.
        rule: one of `RULES`.
        keep: see `select_tokens`, as `scope` and `normalization`.
        scope: "completion", or "batch" for one budget over the micro-batch.
        normalization: over the tokens of the micro-batch.
        renormalize: whether kept tokens weigh for those left out.

    Raises:
        ValueError: `select_tokens` refuses an option, or the rule needs what is not given.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES} in verl, got {rule!r}.")
    if entropy is None and rule in _ENTROPY_RULES:
        raise ValueError(
            f"rule {rule!r} ranks by entropy, and verl computed none. "
            "Set actor_rollout_ref.actor.calculate_entropy=True."
        )
    is_token = mask.bool()
    rows = is_token.flatten().nonzero().squeeze(1)
    delta = divergence.detach().flatten()[rows].double()
    unknown = torch.zeros_like(delta)
    h = unknown if entropy is None else entropy.detach().flatten()[rows].double()
    stats = TokenStats(h, unknown, delta, delta, unknown, unknown)
    completion = rows // mask.shape[1]
    position = (is_token.long().cumsum(1) - 1).flatten()[rows]
    options = {"keep": keep, "scope": scope, "normalization": normalization}
    kept = select_tokens(stats, completion, rule, **options, position=position).rows  # type: ignore[arg-type]
    group = completion if scope == "completion" else torch.zeros_like(completion)
    weights = torch.zeros(mask.numel(), dtype=torch.float64, device=mask.device)
    if renormalize and len(rows):
        of_group, of_kept = torch.bincount(group).double(), torch.bincount(group[kept])
        weights[rows[kept]] = of_group[group[kept]] / of_kept[group[kept]]
    else:
        weights[rows[kept]] = 1.0
    return weights.view(mask.shape).to(divergence.dtype)


def register(name: str, base: str = "forward_kl_topk", **options: Any) -> None:
    """Register a distillation loss with verl (0.9), for its key `distillation_loss.loss_mode`.

    Call it in a module that `VERL_USE_EXTERNAL_MODULES` names: every worker imports that.

    Args:
        name: of the loss.
        base: the loss of verl whose tokens are selected and weighed, e.g. forward_kl_topk or k3.
        options: of `token_weights`, from `rule` on.

    Raises:
        ValueError: an option is refused, verl has no such base, or has a loss of that name.
    """
    one = torch.ones(1, 1)
    token_weights(one, one, one, **options)
    from verl.trainer.distillation import losses as verl_losses
    from verl.workers.utils.padding import no_padding_2_padding

    compute: Callable[..., Any] = verl_losses.get_distillation_loss_fn(base)
    known = verl_losses.get_distillation_loss_settings(base)
    settings = replace(known, names=[name])

    def loss(
        config: Any, distillation_config: Any, model_output: Any, data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # the base is told its own name, by which verl chooses its estimator and what it refuses
        told = replace(distillation_config.distillation_loss, loss_mode=base)
        losses, metrics = compute(
            config=config,
            distillation_config=_Told(told),
            model_output=model_output,
            data=data,
        )
        mask = data["response_mask"]
        mask = mask.to_padded_tensor(0) if mask.is_nested else mask
        entropy = model_output.get("entropy")
        if entropy is not None:
            entropy = no_padding_2_padding(entropy, data)
        weights = token_weights(losses, mask, entropy, **options)
        share = (weights > 0).sum() / mask.bool().sum()
        return losses.where(weights > 0, 0.0) * weights, {
            **metrics,
            "distillation/kept_share": share.item(),
        }

    verl_losses.register_distillation_loss(settings)(loss)


class _Told:
    """As much of verl's configuration as its losses read."""

    def __init__(self, distillation_loss: Any) -> None:
        self.distillation_loss = distillation_loss
