"""The library verifiers really runs here; `make test-peers` makes the environment for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from fake_verifiers import turns_of
from tiny import MEASURED, tiny_config
from tutelage.config.sampling import SamplingConfig
from tutelage.config.verifiers import VerifiersData
from tutelage.data.types import Rollout
from tutelage.errors import ConfigError, RunError
from tutelage.models.load import save_model
from tutelage.models.tiny import tiny_tokenizer
from tutelage.models.tokenizers import decode
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.rollout.verifiers_sampler import VerifiersSampler, VerifiersService
from tutelage.setup.inputs import build_task
from tutelage.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venvs" / "verifiers" / "bin" / "python"
CALCULATOR = Path(__file__).with_name("calculator.py")
DATA: dict[str, Any] = {
    "kind": "verifiers",
    "environment": str(CALCULATOR),
    "python": str(PYTHON),
    "renderer": {"name": "qwen3", "thinking_retention": "all"},
    "num_held_out": 3,
    "max_turn_tokens": 12,
}
SAMPLING = SamplingConfig(max_new_tokens=36, num_samples=2)

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs verifiers: make test-peers"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Bytes, and the marks that the renderer of Qwen3 looks for."""
    found = tiny_tokenizer()
    marks = ("tool_call", "tool_response", "think")
    found.add_tokens([f"<{slash}{mark}>" for mark in marks for slash in ("", "/")])
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a tiny random `student` and `teacher`."""
    folder = tmp_path_factory.mktemp("models")
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.25,
    )
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        save_model(Qwen3ForCausalLM(config).eval(), tokenizer, folder / name)
    return folder


class Scripted:
    """Writes the same turns in every conversation."""

    has_own_weights = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: list[str]) -> None:
        self.turns = [
            tuple(tokenizer.encode(turn + "<|im_end|>", add_special_tokens=False)) for turn in turns
        ]
        self.tokenizer = tokenizer

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        assert request.prompt_ids is not None
        found = []
        for prompt, ids in zip(request.prompts, request.prompt_ids, strict=True):
            number = decode(self.tokenizer, ids).count("assistant\n") - 1
            turn = self.turns[number]
            logprobs = tuple(-0.1 * i for i in range(len(turn)))
            found.append(Rollout(prompt, 0, ids, turn, logprobs=logprobs, text=f"turn {number}"))
        return found

    def close(self) -> None:
        """There is nothing to release."""


def service(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> tuple[Any, VerifiersService]:
    """The environment's task, and what leads its conversations."""
    values = {key: value for key, value in DATA.items() if key != "kind"}
    data = VerifiersData(**{**values, **changes})
    task = build_task(data)
    stops = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    return task, VerifiersService(task.worker, tokenizer, "tiny", stops, data)


def test_a_step_trains_on_exactly_what_the_student_generated(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[Rollout] = []
    conversations: list[Rollout] = []
    one_turn, whole = TransformersSampler.sample, VerifiersSampler.sample

    def log_turns(self: Any, request: RolloutRequest) -> list[Rollout]:
        turns.extend(found := one_turn(self, request))
        return found

    def log_conversations(self: Any, request: RolloutRequest) -> list[Rollout]:
        conversations.extend(found := whole(self, request))
        return found

    monkeypatch.setattr(TransformersSampler, "sample", log_turns)
    monkeypatch.setattr(VerifiersSampler, "sample", log_conversations)
    keys = {"data": DATA, "sampling": {"num_samples": 2, "max_new_tokens": 36}, "num_steps": 1}
    runs = []
    for name in ("run", "again"):
        steps: list[dict[str, Any]] = []
        train(
            tiny_config(models, tmp_path / name, **keys),
            log=lambda _: None,
            on_step=steps.append,
        )
        runs.append([{k: v for k, v in step.items() if k not in MEASURED} for step in steps])
    assert runs[0] == runs[1]
    ((step,), _) = runs
    assert step["turns_mean"] == 3
    first = conversations[: len(conversations) // 2]
    assert len(first) == 8
    assert step["num_rows"] == sum(len(rollout.generated_ids) for rollout in first)
    sampled = {(turn.prompt_ids, turn.completion_ids): turn.logprobs for turn in turns}
    for rollout in first:
        found = [sampled[turn] for turn in turns_of(rollout)]
        assert len(found) == 3
        assert rollout.logprobs == tuple(x for logprobs in found for x in logprobs)


def test_calls_of_tools_are_answered_and_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    call = '<tool_call>\n{{"name": "add", "arguments": {{"a": 4, "b": {}}}}}\n</tool_call>'
    turns = [call.format('"four"'), call.format(4), "It is 8."]
    arguments = {"taskset": {"style": "tool", "num_tasks": 5}}
    task, leading = service(tokenizer, arguments=arguments, max_turn_tokens=0)
    scripted = Scripted(tokenizer, turns)
    sampler = VerifiersSampler(scripted, leading, is_owner=True)
    prompts = sorted([*task.prompts(0, 2, 0), *task.held_out(3)], key=lambda prompt: prompt.id)
    assert [prompt.content for prompt in prompts] == [f"{i} + {i} = ?" for i in range(5)]
    limits = replace(SAMPLING, max_new_tokens=400)
    rollouts = sampler.sample(RolloutRequest(prompts, limits, (0, 1)))
    sampler.close()
    assert len(rollouts) == 10
    for rollout in rollouts:
        found = rollout.conversation
        assert found is not None
        replies = [m["content"] for m in found.messages if m["role"] == "tool"]
        assert replies[0].startswith("error: TypeError")
        assert replies[1] == "8"
        assert (found.num_turns, found.num_tool_calls, found.num_tool_errors) == (3, 2, 1)
        is_right = rollout.prompt.id == "4"
        assert (found.outcome.score, found.outcome.is_success) == (float(is_right), is_right)
        assert found.outcome.details == {
            "num_turns": 3.0,
            "is_right": float(is_right),
            "stop": "agent_completed",
        }
        assert not rollout.is_truncated
        written = [turn for _, turn in turns_of(rollout)]
        assert written == scripted.turns
        assert "<tool_response>\n8\n</tool_response>" in tokenizer.decode(rollout.completion_ids)


def test_limits_of_tokens_cut_a_conversation_off(
    models: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = Qwen3ForCausalLM.from_pretrained(models / "student")
    task, leading = service(tokenizer, max_inserted_tokens=45)
    sampler = VerifiersSampler(TransformersSampler(model, tokenizer), leading, is_owner=True)
    asked = RolloutRequest(task.prompts(0, 2, 0), SAMPLING, (0, 1))
    narrow = sampler.sample(asked)
    short = sampler.sample(replace(asked, sampling=replace(SAMPLING, max_new_tokens=14)))
    sampler.close()
    for rollout in narrow:
        assert [len(turn) for _, turn in turns_of(rollout)] == [12, 12]
        assert rollout.is_truncated
    for rollout in short:
        assert [len(turn) for _, turn in turns_of(rollout)] == [12, 2]
        assert rollout.is_truncated


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"arguments": {"taskset": {"style": "refuse"}}},
            "failed: TaskError: task SumTask scoring",
        ),
        (
            {"arguments": {"taskset": {"style": "refuse"}}, "max_inserted_tokens": 1},
            "failed: TaskError: task SumTask scoring",
        ),
        ({"renderer": None}, "branches: its history was rewritten between turns"),
        (
            {"arguments": {"agent": {"sampling": {"temperature": 0.5}}}},
            "made a request with temperature = 0.5, where the run has 1.0",
        ),
    ],
)
def test_what_cannot_be_trained_on_fails_in_one_line(
    models: Path, tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], part: str
) -> None:
    model = Qwen3ForCausalLM.from_pretrained(models / "student")
    task, leading = service(tokenizer, **changes)
    sampler = VerifiersSampler(TransformersSampler(model, tokenizer), leading, is_owner=True)
    with pytest.raises(RunError) as error:
        sampler.sample(RolloutRequest(task.prompts(0, 2, 0), SAMPLING, (0, 1)))
    sampler.close()
    assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"environment": "no-such-taskset"}, "ModuleNotFoundError: taskset 'no-such-taskset' not"),
        ({"arguments": {"taskset": {"size": 3}}}, "size"),
        ({"arguments": {"judge": {}}}, "judge"),
    ],
)
def test_an_environment_that_cannot_be_loaded_is_one_line(
    changes: dict[str, Any], part: str
) -> None:
    values = {key: value for key, value in DATA.items() if key != "kind"}
    with pytest.raises(ConfigError) as error:
        build_task(VerifiersData(**{**values, **changes}))
    assert part in str(error.value)
    assert "\n" not in str(error.value)
