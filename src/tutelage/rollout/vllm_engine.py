"""Completions from vLLM inside this process, which is given the student's weights each time."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tutelage.config.sampling import SamplingConfig
from tutelage.data.types import Rollout
from tutelage.errors import MissingExtraError, ModelError
from tutelage.models.forward import Ids
from tutelage.models.lora import full_weights
from tutelage.models.tokenizers import stop_ids, vocabulary_size
from tutelage.rollout.conversation import Conversations, completion_of, conversations_of
from tutelage.rollout.request import (
    NEUTRAL,
    CompletionRequest,
    OpenRollout,
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
        stops = stop_ids(self.model, self.tokenizer)
        thinks = self.enable_thinking
        conversations = conversations_of(request, self.tokenizer, stops, thinks)
        requests = completion_requests(self.tokenizer, request, thinks, conversations)
        if conversations is not None:
            most = self.llm.llm_engine.model_config.max_model_len
            refuse_long_conversations(requests, conversations, most)
        options = sampling_options(self.model, self.tokenizer, request.sampling)
        num_ids = vocabulary_size(self.tokenizer)
        if num_ids < self.model.get_output_embeddings().weight.shape[0]:
            options["allowed_token_ids"] = list(range(num_ids))
        done: dict[int, Rollout] = {}
        with self._on_device():
            self._update_weights()
            for row in self._finished(requests, options, conversations):
                if conversations is not None:
                    rollout = conversations.rollout(row)
                else:
                    one, tokens = row.request, row.tokens
                    rollout = to_rollout(self.tokenizer, one, tokens, row.logprobs, stops)
                done[row.request.index] = rollout
                if request.progress is not None:
                    request.progress(1)
        return [done[index] for index in range(len(requests))]

    def _finished(
        self,
        requests: Sequence[CompletionRequest],
        options: dict[str, Any],
        conversations: Conversations | None,
    ) -> Iterator[OpenRollout]:
        """Completions as they end; a conversation goes on as soon as it is answered."""
        engine = self.llm.llm_engine
        asked = [OpenRollout(request) for request in requests]
        waited: dict[str, OpenRollout] = {}
        try:
            while asked or waited:
                waited |= self._ask(asked, options, conversations)
                outputs = [output for output in engine.step() if output.finished]
                ended = [waited.pop(output.request_id) for output in outputs]
                for row, output in zip(ended, outputs, strict=True):
                    tokens, logprobs = _sampled(output.outputs[0])
                    row.tokens += tokens
                    row.logprobs += logprobs
                answers: list[Ids | None] = [None] * len(ended)
                if conversations is not None and ended:
                    answers = conversations.answer(ended)
                asked = []
                for row, ids in zip(ended, answers, strict=True):
                    if ids is None:
                        yield row
                    else:
                        row.insert(ids)
                        asked.append(row)
                if waited and not engine.has_unfinished_requests():
                    raise ModelError(f"vLLM lost {len(waited)} of {len(requests)} completions.")
        finally:
            if waited:  # an error ends the batch
                engine.abort_request(list(waited))

    def _ask(
        self,
        rows: Sequence[OpenRollout],
        options: dict[str, Any],
        conversations: Conversations | None,
    ) -> dict[str, OpenRollout]:
        """Ask for the next turn of each row, behind all of its ids; the rows by request."""
        from vllm import SamplingParams

        prompts, params = [], []
        for row in rows:
            prompts.append({"prompt_token_ids": [*row.request.ids, *completion_of(row)[0]]})
            limit = {} if conversations is None else {"max_tokens": conversations.num_left(row)}
            params.append(SamplingParams(**options | limit, seed=seed_of(row), detokenize=False))
        if not rows:
            return {}
        names = self.llm.enqueue(prompts, params, use_tqdm=False)
        # Inside, vLLM calls a request by its number and a random word; outside by its number.
        return {name.partition("-")[0]: row for name, row in zip(names, rows, strict=True)}

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


def seed_of(row: OpenRollout) -> int:
    """vLLM's seed of a completion, or of the present turn of a conversation."""
    key, turn = row.request.key, len(row.inserted)
    if turn:
        digest = hashlib.blake2b(repr((key, turn)).encode(), digest_size=8)
        key = int.from_bytes(digest.digest(), "little")
    return key % 2**63


def refuse_long_conversations(
    requests: Sequence[CompletionRequest], conversations: Conversations, most: int
) -> None:
    """Conversations that may outgrow what vLLM holds, which would end them without a word.

    Raises:
        ModelError: the longest may.
    """
    inserted = conversations.limits.max_inserted_tokens
    longest = max((len(request.ids) for request in requests), default=0)
    length = longest + conversations.max_new_tokens + inserted
    if length > most:
        raise ModelError(
            f"vLLM reads {most} tokens, but a conversation may have {length}: {longest} of its "
            f"prompt, {conversations.max_new_tokens} generated and {inserted} inserted ones. Lower "
            "data.max_inserted_tokens or sampling.max_new_tokens, or raise vLLM's max_model_len."
        )


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
