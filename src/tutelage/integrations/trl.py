"""Token selection inside the `DistillationTrainer` of TRL 1.16."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import trl
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from trl.trainer import distillation_trainer as peer
from trl.trainer import utils

from tutelage.core import LazyLogits, TokenStats, counter_uniform, select_tokens, token_stats
from tutelage.core.rules import require_rule

if not trl.__version__.startswith("1.16."):
    raise ImportError(f"tutelage.integrations.trl needs trl>=1.16,<1.17, got {trl.__version__}.")


class TutelageTrainer(peer.DistillationTrainer):  # type: ignore[misc]
    """Learns from the tokens that a rule keeps; `rule` and the rest are of `select_tokens`.

    A training batch is scored once, over all processes; TRL's loss is then over its kept tokens,
    divided by their number. With rule `all`, and in evaluations, it is over all of them.

    Raises:
        ValueError: `select_tokens` refuses the rule, `keep` or another option.
    """

    def __init__(
        self, *args: Any, rule: str = "soft_or", keep: float = 0.5, scope: str = "completion",
        normalization: str = "minmax_p98", **options: Any,
    ) -> None:  # fmt: skip
        if require_rule(rule).leaves_out_stops:
            raise ValueError(f"rule must be one that keeps stop tokens too in TRL, got {rule!r}.")
        self._how, self._extras = (rule, keep, scope, normalization), require_rule(rule).extras
        one, stats = torch.ones(1), torch.ones(6 + len(self._extras), 1)
        select_tokens(TokenStats.unstack(stats, self._extras), one, *self._how, one / 2, one)
        super().__init__(*args, **options)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's batch, of which `tool_mask` leaves only the kept tokens in the loss."""
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training or self._how[0] == "all":
            return batch
        mask, here = batch["completion_mask"], self.accelerator.process_index
        mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask
        count = self.args.gradient_accumulation_steps
        parts = utils.split_tensor_dict(utils.split_pixel_values_by_grid(batch), count)
        stats = torch.cat([self._score(utils.unsplit_pixel_values_by_grid(p)) for p in parts], 1)
        rows = mask.flatten().nonzero().squeeze(1)
        completion = rows // mask.shape[1] + here * len(mask)
        position = (mask.cumsum(1) - 1).flatten()[rows]
        tables = gather_object([torch.stack([*stats, completion, position]).cpu()])
        stats, (completion, position) = (whole := torch.cat(tables, 1))[:-2], whole[-2:].long()
        uniform = counter_uniform((self.args.seed, self.state.global_step), completion, position)
        found = TokenStats.unstack(stats, self._extras)
        chosen = select_tokens(found, completion, *self._how, uniform, position)
        self._metrics["train"]["kept_share"].append(len(chosen.rows) / len(found))
        self._metrics["train"]["nonfinite_tokens"].append(float(chosen.num_nonfinite))
        kept, first = torch.zeros_like(mask), sum(table.shape[1] for table in tables[:here])
        kept.view(-1)[rows] = chosen.mask[first : first + len(rows)].to(kept)
        return {**batch, "tool_mask": kept, "num_items_in_batch": kept.new_tensor(len(chosen.rows))}

    @torch.no_grad()
    def _score(self, part: dict[str, Any]) -> Any:
        """Statistics of a micro-batch `[6 + E, n]`: TRL's loss with its divergence replaced."""

        def work(*given: Any, **named: Any) -> Any:
            rows = given[4].flatten().nonzero().squeeze(1)
            sides = zip(("student", "teacher"), given[:2], given[2:4], strict=True)
            p, q = (_logits(*side, named)[rows] for side in sides)
            stats = token_stats(p, q, part["completion_ids"].flatten()[rows], extras=self._extras)
            return stats.stack(), stats.entropy, len(rows)

        whole, model = self.model_wrapped.eval(), self.accelerator.unwrap_model(self.model_wrapped)
        run = (whole, model, self._compute_loss, model, part, None)
        replaced = patch.object(peer, "_chunked_divergence_loss", work)
        with replaced, self.compute_loss_context_manager():
            table, *_ = self._forward_redirection(*run)
        whole.train()
        return table


def _logits(side: str, hidden: Any, weight: Any, named: dict[str, Any]) -> LazyLogits:
    head = (weight, named[f"{side}_lm_head_bias"])
    weight, bias = (x.full_tensor() if isinstance(x, DTensor) else x for x in head)
    cap, heat = named[f"{side}_final_logit_softcapping"], named["temperature"]
    scale, cap = named[f"{side}_logit_scale"] / heat, None if cap is None else cap / heat
    return LazyLogits(hidden.flatten(0, 1), weight, bias, scale, cap)
