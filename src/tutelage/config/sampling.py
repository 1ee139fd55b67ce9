"""How completions are sampled, and which engine samples them, as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tutelage.config.bounds import STRICT, require, require_counts, require_least


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are sampled. Training is exact only at the defaults of the three filters."""

    __pydantic_config__ = STRICT
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens holding this probability, in (0, 1]; 1 keeps all."""
    top_k: int = 0
    """Number of likeliest tokens that may be sampled; 0 keeps all."""
    max_new_tokens: int = 256
    """Length in tokens at which a completion is cut off."""
    num_samples: int = 1
    """Completions per prompt."""

    def __post_init__(self) -> None:
        require_filters("sampling.", self.temperature, self.top_p)
        require_least("sampling.", self.__dict__, top_k=0)
        require_counts("sampling.", self.__dict__, max_new_tokens=1, num_samples=1)


def require_filters(table: str, temperature: float, top_p: float) -> None:
    """A temperature and a nucleus that can be sampled with."""
    is_warm = 0.0 <= temperature < float("inf")
    hint = "Use 1.0 for the model's own distribution or 0 for greedy."
    require(is_warm, f"{table}temperature", "at least 0", temperature, hint)
    hint = "Use 1.0 to keep every token."
    require(0.0 < top_p <= 1.0, f"{table}top_p", "in (0, 1]", top_p, hint)


@dataclass(frozen=True)
class TransformersEngine:
    """The student samples with its own forward passes."""

    __pydantic_config__ = STRICT
    kind: Literal["transformers"] = "transformers"


@dataclass(frozen=True)
class VLLMEngine:
    """vLLM in this process, given the student's weights before every step; extra `vllm`."""

    __pydantic_config__ = STRICT
    kind: Literal["vllm"]
    max_model_len: int = 0
    """Longest prompt and completion together in tokens; 0 takes the model's limit."""
    gpu_memory_utilization: float = 0.4
    """Share of the accelerator's memory vLLM may hold while it samples."""
    max_logprob_gap: float | None = None
    """Mean gap in nats between its log-probabilities and the trainer's at which the run stops;
    None takes 0.001 for float32 and 0.05 for half precision."""

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        require(0 < share < 1, "engine.gpu_memory_utilization", "in (0, 1)", share, "0.4 is usual.")
        _require_length(self.max_model_len)
        _require_gap(self.max_logprob_gap)


@dataclass(frozen=True)
class VLLMServer:
    """vLLM servers in development mode, which load the student's weights before every step."""

    __pydantic_config__ = STRICT
    kind: Literal["vllm_server"]
    urls: tuple[str, ...]
    """Addresses of servers of the same model, the replicas, without a path, such as
    http://127.0.0.1:8000; a key comes from TUTELAGE_API_KEY."""
    folder: str = ""
    """Folder for the weights of transfer folder, under the same name on every replica's host."""
    transfer: Literal["folder", "nccl"] = "folder"
    """How weights reach the replicas: by a file in the folder, or nccl, from this run's CUDA device
    into theirs, for vLLM 0.32: better without a folder in memory that all hosts share."""
    min_replicas: int = 0
    """Replicas without which the run ends; with more, one that gives no usable reply is left out
    until the next start. 0: all of them."""
    max_staleness: Literal[0, 1] = 0
    """1 samples the completions of a step by the weights that the step before begins with, during
    its update; 0 samples every step by the weights it begins with."""
    num_concurrent: int = 64
    """Completions that a process asks of one replica at the same time."""
    max_logprob_gap: float | None = None
    """As for the engine vllm, for each replica."""

    def __post_init__(self) -> None:
        count, urls, least = self.num_concurrent, self.urls, self.min_replicas
        require(count >= 1, "engine.num_concurrent", "at least 1", count, "64 is usual.")
        require(bool(urls), "engine.urls", "at least one address", list(urls), "Add one.")
        if self.transfer == "folder":
            hint = "Every replica must see it under the same name."
            require(bool(self.folder), "engine.folder", "a folder", repr(self.folder), hint)
        else:
            hint = "Weights are not written with engine.transfer = 'nccl'."
            require(not self.folder, "engine.folder", "left out", self.folder, hint)
        what = f"from 0 to {len(urls)}, the number of engine.urls"
        require(0 <= least <= len(urls), "engine.min_replicas", what, least, "0 is all of them.")
        _require_gap(self.max_logprob_gap)


def _require_length(length: int) -> None:
    require(length >= 0, "engine.max_model_len", "at least 0", length, "0 is the model's limit.")


def _require_gap(gap: float | None) -> None:
    is_good = gap is None or gap > 0
    require(is_good, "engine.max_logprob_gap", "above 0", gap, "Leave it out for the default.")


EngineConfig: TypeAlias = Annotated[
    TransformersEngine | VLLMEngine | VLLMServer, Field(discriminator="kind")
]
