"""Weight decay shrinks matrices alone, with every optimizer, unless all weights are asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tiny import tiny_config
from tutelage.models.lora import add_lora
from tutelage.models.optimizer import (
    MasterWeights,
    OptimizerKind,
    make_optimizer,
    undecayed_weights,
)
from tutelage.setup.components import build_components
from tutelage.train.optimizer import build_optimizer

KINDS = [kind for kind in get_args(OptimizerKind) if not kind.startswith("paged")]


def undecayed_names(model: nn.Module) -> set[str]:
    spared = {id(weight) for weight in undecayed_weights(model)}
    return {name for name, weight in model.named_parameters() if id(weight) in spared}


def test_norms_and_embeddings_are_spared_and_a_head_of_its_own_is_not(make_qwen3: Any) -> None:
    names = undecayed_names(make_qwen3(40, tie_word_embeddings=False, attention_bias=True))
    every = {name for name, _ in make_qwen3(40, attention_bias=True).named_parameters()}
    expected = {n for n in every if "norm" in n or n.endswith("bias") or "embed_tokens" in n}
    assert names == expected
    assert "lm_head.weight" not in names


def test_a_tied_head_is_an_embedding(make_qwen3: Any) -> None:
    model = make_qwen3(40, tie_word_embeddings=True)
    spared = undecayed_weights(model)
    assert any(weight is model.get_output_embeddings().weight for weight in spared)


def test_other_layers_of_other_families(gpt2: Any) -> None:
    """Positions are embeddings, transposed layers are matrices."""
    decayed = {name for name, _ in gpt2.named_parameters()} - undecayed_names(gpt2)
    assert {name.rpartition(".h.")[2].partition(".")[2] for name in decayed} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }


def test_tables_of_biases_and_norms_of_two_axes_are_spared() -> None:
    class HeadwiseRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.ones(2, 3, 3))
            self.down_proj_bias = nn.Parameter(torch.ones(2, 3))
            self.state = nn.Parameter(torch.ones(2, 3))
            self.state._no_weight_decay = True  # type: ignore[attr-defined]

    model = nn.Sequential(HeadwiseRMSNorm(), Experts())
    assert undecayed_names(model) == {"0.weight", "1.down_proj_bias", "1.state"}


def test_matrices_of_an_adapter_are_decayed(qwen3: Any) -> None:
    add_lora(qwen3, 2, 4.0)
    spared = undecayed_names(qwen3)
    trained = {name for name, weight in qwen3.named_parameters() if weight.requires_grad}
    assert trained
    assert not trained & spared


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_a_gradient_shrinks_matrices_alone(
    tiny_models: Path, tmp_path: Path, kind: str, decay_all: bool
) -> None:
    if kind == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    settings = {
        "kind": kind, "learning_rate": 0.1, "weight_decay": 0.5, "decay_all": decay_all
    }  # fmt: skip
    config = tiny_config(tiny_models, tmp_path, optimizer=settings)
    components = build_components(config)
    model = components.student.model
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    optimizer = build_optimizer(config.optimizer, components.student, components.masters, tmp_path)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for master in components.masters.masters:
        master.grad = torch.zeros_like(master)
    optimizer.step()
    spared = undecayed_names(model)
    assert spared
    for name, weight in model.named_parameters():
        share = 1.0 if name in spared and not decay_all else 1 - 0.1 * 0.5
        assert torch.allclose(weight, before[name] * share, rtol=1e-6), name


def test_without_decay_all_weights_are_one_group_in_their_order(make_qwen3: Any) -> None:
    model = make_qwen3(40)
    masters = MasterWeights(model.parameters()).masters
    make: Callable[[float], Any] = lambda decay: make_optimizer(  # noqa: E731
        "adamw", masters, 1e-3, (0.9, 0.95), decay, undecayed=undecayed_weights(model)
    )
    (group,) = make(0.0).param_groups
    assert all(a is b for a, b in zip(group["params"], masters, strict=True))
    assert [g["weight_decay"] for g in make(0.1).param_groups] == [0.1, 0.0]
