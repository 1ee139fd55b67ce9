"""Completions from vLLM inside this process, which is given the student's weights each time."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Rollout
from tutelage.errors import MissingExtraError, ModelError
from tutelage.models.lora import full_weights
from tutelage.models.tokenizers import stop_ids, vocabulary_size
from tutelage.rollout.request import (
    NEUTRAL,
    CompletionRequest,
    RolloutRequest,
    completion_requests,
    to_rollout,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class VLLMSampler:
    """vLLM in this process. Before every batch the student's weights are copied into it.

    Reported log-probabilities are those at temperature 1 before any filter. Seeds are those of
    `generate`, but vLLM turns them into other tokens, and its sums depend on the batch.

    Args:
        model: the student; `sample` uses the weights it has at that time.
        tokenizer: its tokenizer.
        max_model_len: longest prompt and completion together; 0 takes the model's limit.
        gpu_memory_utilization: share of the accelerator's memory vLLM may take while it samples.
        enable_thinking: passed to the chat template when not None.

    Raises:
        MissingExtraError: vLLM is not installed.
        ModelError: vLLM cannot run the model.
    """

    has_own_weights = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int = 0,
        gpu_memory_utilization: float = 0.4,
        enable_thinking: bool | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.enable_thinking = enable_thinking
        self.sleeps = model.device.type == "cuda"
        self.llm = _load(model, max_model_len, gpu_memory_utilization, self.sleeps)

    def sample(self, request: RolloutRequest) -> list[Rollout]:
        """Completions of the prompts, from the student's present weights.

        Raises:
            ModelError: vLLM returned something else than was asked for.
        """
        requests = completion_requests(self.tokenizer, request, self.enable_thinking)
        from vllm import SamplingParams

        stops = stop_ids(self.model, self.tokenizer)
        options = sampling_options(self.model, self.tokenizer, request.sampling)
        num_ids = vocabulary_size(self.tokenizer)
        if num_ids < self.model.get_output_embeddings().weight.shape[0]:
            options["allowed_token_ids"] = list(range(num_ids))
        with self._on_device():
            self._update_weights()
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(one.ids)} for one in requests],
                [
                    SamplingParams(**options, seed=seed_of(one), detokenize=False)
                    for one in requests
                ],
                use_tqdm=False,
            )
        if len(outputs) != len(requests):
            raise ModelError(f"vLLM gave {len(outputs)} completions of {len(requests)}.")
        sampled = [_sampled(output.outputs[0]) for output in outputs]
        if request.progress is not None:
            request.progress(len(sampled))
        return [
            to_rollout(self.tokenizer, one, tokens, logprobs, stops)
            for one, (tokens, logprobs) in zip(requests, sampled, strict=True)
        ]

    def close(self) -> None:
        """Take vLLM down, so that another may start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        del self.llm
        cleanup_dist_env_and_memory()

    def _update_weights(self) -> None:
        """Copy the student's weights into vLLM's model, and forget what the old ones computed."""
        weights = full_weights(self.model)

        def load(target: Any) -> None:
            target.load_weights(weights)

        self.llm.apply_model(load)
        self.llm.reset_prefix_cache()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """On CUDA vLLM holds memory inside only; its weights are copied anew each time."""
        if self.sleeps:
            self.llm.wake_up()
        try:
            yield
        finally:
            if self.sleeps:
                self.llm.sleep(level=2)


def sampling_options(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig
) -> dict[str, Any]:
    """vLLM's options of every completion of a batch, in this process or over HTTP."""
    return {
        **NEUTRAL,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "max_tokens": config.max_new_tokens,
        "stop_token_ids": sorted(stop_ids(model, tokenizer)),
        "ignore_eos": True,  # the ids to stop at are all named
        "logprobs": 0,
    }


def seed_of(request: CompletionRequest) -> int:
    """vLLM's seed of a completion."""
    return request.key % 2**63


def _sampled(completion: Any) -> tuple[list[int], list[float]]:
    tokens = list(completion.token_ids)
    logprobs = [at[token].logprob for at, token in zip(completion.logprobs, tokens, strict=True)]
    return tokens, logprobs


def _load(model: PreTrainedModel, max_model_len: int, memory: float, sleeps: bool) -> Any:
    """vLLM with the student's architecture and weights that mean nothing yet."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm", "engine.kind 'vllm'")
    # In this process, so that weights are handed over in memory.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if model.device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        _keep_weights_replaceable()
    from vllm import LLM

    limit = model.config.get_text_config().max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        try:
            llm = LLM(
                model=folder,
                load_format="dummy",
                dtype=str(model.dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                max_model_len=min(max_model_len or limit, limit),
                gpu_memory_utilization=memory,
                enable_sleep_mode=sleeps,
                enforce_eager=model.device.type == "cpu",
                logprobs_mode="raw_logprobs",
                seed=0,
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f'vLLM cannot run the student: {reason}. Use engine.kind = "transformers".'
            ) from None
    if sleeps:
        llm.sleep(level=2)
    return llm


def _keep_weights_replaceable() -> None:
    """On a CPU let vLLM multiply by the weights it holds, not by a copy packed at load.

    Its oneDNN kernels keep such copies, so weights that are loaded later would change nothing.
    """
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False
