"""Several vLLM servers of one model: who samples what, who is left out, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tiny import tiny_config
from tiny_runs import are_equal, metrics_of, weights_of
from tutelage.config.parse import fingerprint, parse_config, parse_saved_config, to_table
from tutelage.config.sampling import SamplingConfig
from tutelage.data.tasks import LedgerTask
from tutelage.errors import ConfigError, ModelError, RunError
from tutelage.models.load import load_model, load_tokenizer
from tutelage.rollout import replicas
from tutelage.rollout.replica_sampler import ReplicaSampler
from tutelage.rollout.request import RolloutRequest
from tutelage.setup.validate import validate
from tutelage.train.loop import train
from vllm_stub import QUICK, FakeVLLM, engine_of, replicas_of, sampler_of

PROMPTS = LedgerTask(1).prompts(0, 3, 0)
CONFIG = SamplingConfig(max_new_tokens=6, num_samples=2)
REQUEST = RolloutRequest(PROMPTS, CONFIG, (0,))
MODELS: dict[str, Any] = {"student": {"model": "s"}, "teacher": {"model": "t"}}


@pytest.fixture(scope="module")
def student(tiny_models: Path) -> PreTrainedModel:
    return load_model(str(tiny_models / "student"), "float32")


@pytest.fixture
def servers(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeVLLM]]:
    monkeypatch.setattr(replicas, "Limits", lambda: QUICK)
    with replicas_of(tiny_models, 3) as found:
        yield found


def sampler(
    servers: list[FakeVLLM], student: PreTrainedModel, folder: Path, min_replicas: int = 0
) -> ReplicaSampler:
    tokenizer, urls = load_tokenizer(student.name_or_path), [server.url for server in servers]
    return sampler_of(student, tokenizer, urls, folder, min_replicas)


def num_completions(server: FakeVLLM) -> int:
    return sum(path == "/v1/completions" for path, _ in server.asked)


def run(models: Path, out: Path, table: dict[str, Any], **changes: Any) -> list[str]:
    """The lines of a run of four steps."""
    optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
    lines: list[str] = []
    train(tiny_config(models, out, engine=table, optimizer=optimizer, **changes), log=lines.append)
    return lines


# --- drawing --------------------------------------------------------------------------------------


def test_neighbors_share_a_replica_and_all_read_the_weights_once(
    servers: list[FakeVLLM], student: PreTrainedModel, tmp_path: Path
) -> None:
    one = sampler(servers[:1], student, tmp_path).sample(REQUEST)
    servers[0].asked.clear()
    drawn = sampler(servers, student, tmp_path).sample(REQUEST)
    assert drawn == one
    assert [rollout.replica for rollout in drawn] == [0, 0, 1, 1, 2, 2]
    for server in servers:
        paths = [path for path, _ in server.asked]
        assert paths[:3] == ["/v1/models", "/collective_rpc", "/reset_prefix_cache"]
        assert paths[3:] == ["/v1/completions"] * 2


def test_a_draw_of_which_one_replica_dies_is_drawn_again_by_the_others(
    servers: list[FakeVLLM], student: PreTrainedModel, tmp_path: Path
) -> None:
    whole = sampler(servers[:1], student, tmp_path).sample(REQUEST)
    servers[1].num_left = 1
    drawing, lines = sampler(servers, student, tmp_path, 2), []
    drawing.replicas.join(drawing.replicas.group, lines.append)
    drawn = drawing.sample(REQUEST)
    assert drawn == whole
    assert {rollout.replica for rollout in drawn} == {0, 2}
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: replica {servers[1].url} gave no usable reply in 2 tries")
    assert lines[0].endswith("it is left out until the next start, 2 of 3 stay")
    servers[1].num_left = None  # it is back, and stays out
    before = num_completions(servers[1])
    assert drawing.sample(REQUEST) == whole
    assert num_completions(servers[1]) == before
    servers[2].num_left = 0
    with pytest.raises(ModelError, match=r"1 of 3 replicas are left, .*min_replicas is 2;") as bad:
        drawing.sample(REQUEST)
    assert "\n" not in str(bad.value)
    assert servers[2].url in str(bad.value)


def test_a_replica_that_does_not_answer_at_the_start_is_left_out_if_it_may(
    servers: list[FakeVLLM], student: PreTrainedModel, tmp_path: Path
) -> None:
    servers[0].num_left = 0
    with pytest.raises(ModelError, match=f"{servers[0].url} gave no usable reply") as caught:
        sampler(servers, student, tmp_path)
    assert str(caught.value).count(servers[0].url) == 1
    assert str(caught.value).endswith(
        "Nothing was sampled yet; 2 of 3 replicas are left, and engine.min_replicas is 3; start "
        "the server, or correct engine.urls."
    )
    drawing = sampler(servers, student, tmp_path, 1)
    assert {rollout.replica for rollout in drawing.sample(REQUEST)} == {1, 2}


class Elsewhere:
    """A group whose other process says what is given here, in this order."""

    index = 0

    def __init__(self, *said: tuple[dict[int, str], str | None]) -> None:
        self.said = list(said)

    def gathered(self, value: Any) -> list[Any]:
        return [value, self.said.pop(0) if self.said else ({}, None)]


def test_what_fails_another_process_is_drawn_again_here(
    servers: list[FakeVLLM], student: PreTrainedModel, tmp_path: Path
) -> None:
    drawing, lines = sampler(servers, student, tmp_path, 2), []
    whole = drawing.sample(REQUEST)
    quiet: Any = ({}, None)
    start_handover_draw = (quiet, quiet, ({0: "no reply"}, None))
    drawing.replicas.join(Elsewhere(*start_handover_draw), lines.append)
    drawn = drawing.sample(REQUEST)
    assert drawn == whole
    assert {rollout.replica for rollout in drawn} == {1, 2}
    assert len(lines) == 1
    assert f"replica {servers[0].url} gave no reply; it is left out" in lines[0]
    drawing.replicas.join(Elsewhere(quiet, quiet, ({}, "an id too large")), lines.append)
    with pytest.raises(ModelError, match=r"^an id too large$"):
        drawing.sample(REQUEST)


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_with_two_replicas_is_the_run_with_one(
    servers: list[FakeVLLM], tiny_models: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(tiny_models, one, engine_of(servers[:1], one))
    run(tiny_models, two, engine_of(servers[1:], two))
    assert are_equal(weights_of(one / "student"), weights_of(two / "student"))
    gap = "engine_logprob_gap_nats"  # measured on more completions
    assert [m | {gap: 0} for m in metrics_of(one)] == [m | {gap: 0} for m in metrics_of(two)]
    assert all(0 <= m[gap] < 1e-6 for m in metrics_of(two))
    assert {(m["staleness_steps"], m["log_ratio_max_nats"]) for m in metrics_of(two)} == {(0, 0)}


@pytest.mark.parametrize("stale", [0, 1])
def test_the_weights_of_every_replica_are_proven(
    servers: list[FakeVLLM], tiny_models: Path, tmp_path: Path, stale: int
) -> None:
    servers[stale].reads_weights = False
    with pytest.raises(RunError, match="step 2 are not the student's") as caught:
        run(tiny_models, tmp_path, engine_of(servers[:2], tmp_path), micro_batch_size=1)
    assert f"(replica {servers[stale].url})" in str(caught.value)


def test_a_run_goes_on_without_a_replica_that_dies_in_a_step(
    servers: list[FakeVLLM], tiny_models: Path, tmp_path: Path
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(tiny_models, whole, engine_of(servers[:1], whole))
    servers[2].num_left = 6  # of 4 in every step
    lines = run(tiny_models, torn, engine_of(servers[1:], torn, min_replicas=1))
    assert sum("is left out until the next start, 1 of 2 stay" in line for line in lines) == 1
    assert are_equal(weights_of(whole / "student"), weights_of(torn / "student"))


# --- configurations -------------------------------------------------------------------------------


def test_a_url_of_earlier_versions_is_explained_and_still_names_the_same_run() -> None:
    url, folder = "http://127.0.0.1:8000", "f"
    earlier = {**MODELS, "engine": {"kind": "vllm_server", "url": url, "folder": folder}}
    with pytest.raises(ConfigError) as caught:
        parse_config(earlier)
    assert str(caught.value) == (
        'engine.url is now a list of addresses: engine.urls = ["URL"]. Write that instead.'
    )
    now = parse_config(
        {**MODELS, "engine": {"kind": "vllm_server", "urls": [url], "folder": folder}}
    )
    assert to_table(parse_saved_config(earlier)) == to_table(now)
    assert fingerprint(now) == "86477752"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"urls": []}, "engine.urls must be at least one address, got []"),
        ({"urls": "a"}, "engine.urls must be a list, got 'a'"),
        ({"min_replicas": 3}, "engine.min_replicas must be from 0 to 2, the number of"),
        (
            {"transfer": "nccl"},
            "engine.folder must be left out, got f. Weights are not written with",
        ),
        ({"folder": ""}, "engine.folder must be a folder, got ''. Every replica must see it under"),
        ({"max_staleness": 2}, "engine.max_staleness: input should be 0 or 1, got 2"),
        ({"min_replicas": -1}, "engine.min_replicas must be from 0 to 2"),
    ],
)
def test_replicas_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    table = {"kind": "vllm_server", "urls": ["a", "b"], "folder": "f"} | changes
    with pytest.raises(ConfigError) as caught:
        parse_config({**MODELS, "engine": table})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        (["http://h:1", "http://h:1/"], "must be different addresses, got ['http://h:1'] several"),
        (
            ["http://h:80", "http://H"],
            "must be different addresses, got ['http://h'] several times",
        ),
        (["http://h:1/v1/"], "ends in /v1, got 'http://h:1/v1'. Write it as http://h:1."),
        (["h:1"], "is malformed, got 'h:1'. Write it as http://host:8000."),
        (
            ["http://me:hidden@h:1"],
            "holds a user, a password or more than a path. Write it as http:",
        ),
        (["http://h:hidden"], "is malformed. Write it as http://host:8000."),
    ],
)
def test_addresses_that_are_none_of_replicas_are_refused_before_models_are_loaded(
    urls: list[str], said: str, tiny_models: Path, tmp_path: Path
) -> None:
    engine = {"kind": "vllm_server", "urls": urls, "folder": str(tmp_path)}
    config = tiny_config(tiny_models, tmp_path / "run", engine=engine)
    with pytest.raises(ConfigError) as caught:
        validate(config, tmp_path / "run")
    assert "engine.urls" in str(caught.value)
    assert said in str(caught.value)
    assert "hidden" not in str(caught.value)
