"""The loss for verl on fake micro-batches: verl itself is not needed (tests/peers has it)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tutelage.integrations.verl import RULES, register, token_weights

LENGTHS = (7, 1, 4, 0, 5)
WIDTH = 8


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Divergence, entropy and mask `[B, T]`, one sequence of which has no token."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(LENGTHS), WIDTH)
    return {
        "divergence": torch.rand(shape, generator=generator).double(),
        "entropy": torch.rand(shape, generator=generator).double(),
        "mask": torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None],
    }


def naive(batch: dict[str, Tensor], rule: str, scope: str) -> Tensor:
    """Kept tokens of the reference, each worth m/k."""
    places = [(b, t) for b, length in enumerate(LENGTHS) for t in range(length)]
    delta, h = ([float(batch[n][p]) for p in places] for n in ("divergence", "entropy"))
    score = {
        "first_n": [-float(t) for _, t in places],
    }.get(rule) or reference.scores(rule, h, delta, delta, [])
    group = [b if scope == "completion" else 0 for b, _ in places]
    share = "1" if rule == "all" else "0.5"
    kept = reference.kept(score, group, share, [True] * len(places))
    weights = torch.zeros(batch["mask"].shape, dtype=torch.float64)
    for i in kept:
        count = sum(group[j] == group[i] for j in kept)
        weights[places[i]] = group.count(group[i]) / count
    return weights


@pytest.mark.parametrize("scope", ["completion", "batch"])
@pytest.mark.parametrize("rule", RULES)
def test_weights_are_those_of_the_reference(
    batch: dict[str, Tensor], rule: str, scope: str
) -> None:
    found = token_weights(**batch, rule=rule, keep=0.5, scope=scope)
    torch.testing.assert_close(found, naive(batch, rule, scope))
    plain = token_weights(**batch, rule=rule, keep=0.5, scope=scope, renormalize=False)
    assert torch.equal(plain, (found > 0).double())


def test_a_number_that_is_not_finite_is_never_kept(batch: dict[str, Tensor]) -> None:
    batch["divergence"][0, 2] = torch.nan
    batch["entropy"][2, 1] = torch.inf
    weights = token_weights(**batch, rule="all")
    assert weights[0, 2] == weights[2, 1] == 0
    assert weights[0, 1] == 7 / 6
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "random"}, "rule must be one of .* in verl, got 'random'"),
        ({"rule": "soft_or", "entropy": None}, "calculate_entropy=True"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\]"),
        ({"scope": "prompt"}, "scope must be"),
    ],
)
def test_what_cannot_be_done_is_refused(
    batch: dict[str, Tensor], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_weights(**batch | options)


@dataclass
class Settings:
    names: list[str]
    use_topk: bool = True


@dataclass
class LossConfig:
    loss_mode: str


@dataclass
class DistillationConfig:
    distillation_loss: LossConfig


@dataclass
class Registry:
    """As much of verl's module of losses as is used."""

    losses: dict[str, Callable[..., Any]] = field(default_factory=dict)
    settings: dict[str, Settings] = field(default_factory=dict)

    def add(self, settings: Settings) -> Callable[[Any], Any]:
        def decorator(loss: Any) -> Any:
            for name in settings.names:
                self.losses[name], self.settings[name] = loss, settings
            return loss

        return decorator


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    found = Registry()

    def base(config: Any, distillation_config: Any, model_output: Any, data: Any) -> Any:
        assert distillation_config.distillation_loss.loss_mode == "forward_kl_topk"
        return model_output["distillation_losses"], {"distillation/mass": 1.0}

    found.add(Settings(["forward_kl_topk"]))(base)
    losses: Any = ModuleType("losses")
    losses.get_distillation_loss_fn = found.losses.__getitem__
    losses.get_distillation_loss_settings = found.settings.__getitem__
    losses.register_distillation_loss = found.add
    padding: Any = ModuleType("padding")
    padding.no_padding_2_padding = lambda tensor, data: tensor
    parents = {name: ModuleType(name) for name in ("verl", "verl.trainer", "verl.workers")}
    package: Any = ModuleType("verl.trainer.distillation")
    package.losses = losses
    modules = {
        **parents,
        "verl.trainer.distillation": package,
        "verl.trainer.distillation.losses": losses,
        "verl.workers.utils": ModuleType("verl.workers.utils"),
        "verl.workers.utils.padding": padding,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_the_registered_loss_is_a_mean_over_kept_tokens(
    batch: dict[str, Tensor], registry: Registry
) -> None:
    register("soft_or_half", rule="soft_or", keep=0.5)
    assert registry.settings["soft_or_half"] == Settings(["soft_or_half"])
    losses = batch["divergence"].clone().requires_grad_()
    data = {"response_mask": batch["mask"].long()}
    output = {"distillation_losses": losses, "entropy": batch["entropy"]}
    config = DistillationConfig(LossConfig("soft_or_half"))
    found, metrics = registry.losses["soft_or_half"](
        config=None, distillation_config=config, model_output=output, data=data
    )
    weights = naive(batch, "soft_or", "completion")
    torch.testing.assert_close(found, batch["divergence"] * weights)
    assert metrics == {
        "distillation/mass": 1.0,
        "distillation/kept_share": float((weights > 0).sum() / sum(LENGTHS)),
    }
    found.sum().backward()
    torch.testing.assert_close(losses.grad, weights)


def test_an_option_is_refused_when_the_loss_is_registered(registry: Registry) -> None:
    with pytest.raises(ValueError, match="keep must be in"):
        register("none", keep=0.0)
    assert list(registry.losses) == ["forward_kl_topk"]
