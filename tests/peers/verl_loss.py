"""verl's own aggregation of a registered loss, on a fake micro-batch; prints what it found.

verl imports the module `soft_or_half` (VERL_USE_EXTERNAL_MODULES), which registers the loss.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from verl.trainer.distillation.losses import distillation_loss
from verl.workers.config import DistillationLossConfig

from tutelage.integrations.verl import token_weights

PROMPTS, RESPONSES, WIDTH = [2, 1, 3], [5, 2, 4], 5


def nested(values: torch.Tensor) -> torch.Tensor:
    """One number for each token of prompts and responses, as an engine without padding has them."""
    parts = values.split([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    return torch.nested.as_nested_tensor(list(parts), layout=torch.jagged)


def responses(values: torch.Tensor) -> torch.Tensor:
    """The numbers that predict the tokens of responses, padded `[B, T]`."""
    rows, end = [], 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        end += prompt + response
        row = values[end - response - 1 : end - 1]
        rows.append(torch.cat([row, row.new_zeros(WIDTH - response)]))
    return torch.stack(rows)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(PROMPTS) + sum(RESPONSES)
    losses = torch.rand(total, generator=generator, dtype=torch.float64).requires_grad_()
    entropy, mass = torch.rand(2, total, generator=generator, dtype=torch.float64)
    lengths = torch.tensor(RESPONSES)[:, None]
    mask = (torch.arange(WIDTH) < lengths).long()
    ids = torch.zeros(3, max(PROMPTS), dtype=torch.long)
    before = torch.arange(max(PROMPTS)) >= max(PROMPTS) - torch.tensor(PROMPTS)[:, None]
    data = TensorDict(
        {
            "prompts": ids,
            "responses": torch.zeros(3, WIDTH, dtype=torch.long),
            "attention_mask": torch.cat([before.long(), mask], 1),
            "response_mask": mask,
        },
        batch_size=3,
    )
    count = sum(RESPONSES)
    numbers: Any = {"dp_size": 1, "batch_num_tokens": count, "global_batch_size": 3}
    settings = DistillationLossConfig(
        loss_mode="soft_or_half", topk=4, use_policy_gradient=False, loss_max_clamp=None
    )
    assert settings.loss_settings.use_topk
    outputs = {"distillation_losses": losses, "student_mass": mass, "teacher_mass": mass}
    model_output = {
        name: nested(values) for name, values in (outputs | {"entropy": entropy}).items()
    }
    config = SimpleNamespace(
        loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None
    )

    class Data(dict):  # type: ignore[type-arg]
        """A micro-batch, with the numbers of the global one."""

        def __init__(self) -> None:
            super().__init__(numbers)

        def __getitem__(self, key: str) -> Any:
            return numbers[key] if key in numbers else data[key]

    found, metrics = distillation_loss(
        config, SimpleNamespace(distillation_loss=settings), model_output, Data()
    )
    weights = token_weights(responses(losses), mask, responses(entropy), rule="soft_or", keep=0.5)
    expected = (weights * responses(losses)).sum() / count
    found.backward()
    ours = torch.autograd.grad(expected, losses)[0]
    print(
        json.dumps(
            {
                "gap": abs(float(found.detach()) - float(expected.detach())),
                "gradient_gap": float((losses.grad - ours).abs().max()),
                "kept_share": metrics["distillation/kept_share"],
                "num_kept": int((weights > 0).sum()),
            }
        )
    )


if __name__ == "__main__":
    main()
