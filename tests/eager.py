"""Random models, and writers whose step runs on the CPU: eagerly, in torch or interpreted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Prompt, Rollout
from tutelage.models.tokenizers import stop_ids
from tutelage.rollout.conversation import Conversations
from tutelage.rollout.cuda import kv_slots
from tutelage.rollout.cuda.cuda_graph import EagerGraph
from tutelage.rollout.cuda.generate import GraphGenerator
from tutelage.rollout.cuda.operators import Operators, TorchOperators
from tutelage.rollout.request import Agent, RolloutRequest, completion_requests

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each letter, and six more."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<bos>", "<eos>", "<a>", "<b>", "<c>", *LETTERS]
    core = Tokenizer(models.WordLevel({x: i for i, x in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def make_model(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random model of 2 layers and width 32 whose head has more rows than there are ids."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "vocab_size": 40,
    }
    config = CONFIG_MAPPING[family](
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
        **(sizes | options),
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # norms and biases of their own, so that a forgotten one is seen
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = [2, 5, 9, 11]
    return model


def cpu_device(operators: Operators | None = None) -> kv_slots.Device:
    """What a step runs with where nothing can be captured."""
    return kv_slots.Device(operators or TorchOperators(), EagerGraph, 4)


def generate_captured(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    batch_size: int,
    operators: Operators | None = None,
    agent: Agent | None = None,
) -> tuple[list[Rollout], GraphGenerator]:
    """What `generate` does on a GPU."""
    conversations = None
    if agent is not None:
        stops = stop_ids(model, tokenizer)
        conversations = Conversations(agent, tokenizer, stops, config.max_new_tokens)
    device = cpu_device(operators)
    generator = GraphGenerator(model, tokenizer, config, batch_size, True, device, conversations)
    asked = RolloutRequest(prompts, config, (1,))
    requests = completion_requests(tokenizer, asked, conversations=conversations)
    with torch.no_grad():
        assert generator.open_slots(requests)
        done = {row.request.index: row for rows in generator.generate(requests) for row in rows}
    order = [done[index] for index in range(len(requests))]
    rollouts = [replace(generator.rollout(r), hidden=torch.cat(r.hidden)) for r in order]
    return rollouts, generator
