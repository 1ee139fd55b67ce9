"""Prompts to token ids and back, and the proof that two models speak the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.data.types import Message, Prompt
from tutelage.errors import ConfigError, DataError, ModelError
from tutelage.grading.answer import THOUGHT_TOKENS
from tutelage.models.chat.template import refuse_lost_turns, render_chat, template_of
from tutelage.models.chat.tool_format import CALL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class no_panic:
    """A panic of the Rust tokenizer library, as of a pattern without end, is a ModelError."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        # no subclass of Exception, and no class that could be imported
        if kind is not None and kind.__name__ == "PanicException":
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ModelError(
                f"the tokenizer {self._tokenizer!r} cannot encode a text: {reason}. Its patterns "
                "are invalid or take too long; use another tokenizer.json."
            ) from None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, enable_thinking: bool | None = None
) -> list[int]:
    """Token ids of a prompt, ready for the model to continue.

    Plain text gets the special tokens that the tokenizer puts before it, once, and none of those
    that it puts behind: what is to be continued has not ended. Chat messages go through the chat
    template with a generation prompt; the template writes its own special tokens, so none are
    added. Text that would itself become a control token (a forged end of turn, say) is refused.

    Args:
        tokenizer: Tokenizer of the model that will continue the prompt.
        prompt: Text or chat messages.
        enable_thinking: Passed to the chat template when not None; templates without such a
            switch ignore it.

    Returns:
        Token ids, at least one.

    Raises:
        DataError: The text contains a control token, or the prompt gives no tokens.
        ModelError: Chat messages for a tokenizer without a chat template.
    """
    if isinstance(prompt.content, str):
        with no_panic(tokenizer.name_or_path):
            encoded = tokenizer(
                prompt.content, return_special_tokens_mask=True, split_special_tokens=False
            )
        ids, is_added = list(encoded.input_ids), encoded.special_tokens_mask
        own = [i for i, added in zip(ids, is_added, strict=True) if not added]
        _refuse_control_tokens(tokenizer, own, prompt.content, prompt.id)
        end = max((place for place, added in enumerate(is_added, 1) if not added), default=0)
        ids = ids[:end] if own else [i for i in ids if i == tokenizer.bos_token_id]
    else:
        tools = [json.dumps(prompt.tools, ensure_ascii=False)] if prompt.tools else []
        for text in [*(t for message in prompt.content for t in message.values()), *tools]:
            own = encode_completion(tokenizer, text)
            _refuse_control_tokens(tokenizer, own, text, prompt.id)
        ids = _encode_chat(tokenizer, prompt, prompt.content, enable_thinking)
    if not ids:
        raise DataError(f"prompt {prompt.id!r} has no tokens, got empty text. Remove it.")
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, with its spaces as they were written and without special tokens.

    Special tokens that mark a thought or a call of a tool stay: without them a thought would read
    like an answer, and a call would not be found.
    """
    kept = list(ids)
    marks = set(tokenizer.convert_tokens_to_ids([*THOUGHT_TOKENS, *CALL_TOKENS])) - {
        tokenizer.unk_token_id
    }
    has_marks = not marks.isdisjoint(kept)
    if has_marks:
        dropped = control_ids(tokenizer) - marks
        kept = [i for i in kept if i not in dropped]
    return str(
        tokenizer.decode(
            kept, skip_special_tokens=not has_marks, clean_up_tokenization_spaces=False
        )
    )


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a completion's text, nothing added; an end-of-sequence text stays one token."""
    with no_panic(tokenizer.name_or_path):
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a completion: those of the generation config and of the tokenizer.

    Raises:
        ModelError: The generation config declares something that is no id.
    """
    config = model.generation_config
    declared = None if config is None else config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    found = [i for i in (*ids, tokenizer.eos_token_id) if i is not None]
    for i in found:
        if type(i) is not int or i < 0:
            raise ModelError(
                f"eos_token_id must be an id or a list of ids, got {i!r}. Correct the model's "
                "generation_config.json."
            )
    return frozenset(found)


def pad_id(tokenizer: PreTrainedTokenizerBase, num_ids: int | None = None) -> int:
    """An id to write into padding: the tokenizer's own, else its end-of-sequence id, else 0.

    One that was added beyond the `num_ids` ids that a model has is passed over.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and (num_ids is None or candidate < num_ids):
            return int(candidate)
    return 0


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids up to and including the tokenizer's largest: what a model may say."""
    ids: dict[str, int] = tokenizer.get_vocab()
    return 1 + max(ids.values())


def refuse_different_vocabularies(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Tokenizers that give one id two meanings; no weights are needed to see that.

    Raises:
        ModelError: A token has different ids, or is a control token for one side only.
    """
    if student is teacher:
        return
    _refuse_different_tokens(student.get_vocab(), teacher.get_vocab())
    _refuse_different_control(student, teacher)


def shared_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_rows: int,
    teacher_rows: int,
) -> int:
    """Number of token ids on which student and teacher can be compared, V.

    Output heads are often padded to a round number of rows, differently for each model. Rows that
    no token uses are cut. So are tokens that were added to the tokenizer beyond the student's head
    (placeholders of images, say): the student cannot draw them, and `refuse_ids_beyond` refuses
    prompts that hold them. All other ids both heads must have.

    Args:
        student_tokenizer: The student's tokenizer.
        teacher_tokenizer: The teacher's tokenizer.
        student_rows: Rows of the student's output head.
        teacher_rows: Rows of the teacher's output head.

    Returns:
        V, at most the smaller of both heads.

    Raises:
        ModelError: An id means different things to both, or lies beyond a head.
    """
    refuse_different_vocabularies(student_tokenizer, teacher_tokenizer)
    size = vocabulary_size(student_tokenizer)
    added = student_tokenizer.added_tokens_decoder.keys()
    if any(i not in added for i in range(student_rows, size)):
        raise _short_head("student", student_rows, size)
    size = min(size, student_rows)
    if teacher_rows < size:
        raise _short_head("teacher", teacher_rows, size)
    return size


def _short_head(owner: str, rows: int, size: int) -> ModelError:
    return ModelError(
        f"the {owner}'s output head has {rows} rows but the tokenizer has ids up to {size - 1}. "
        "Use the tokenizer that belongs to the model."
    )


def refuse_ids_beyond(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], num_ids: int, prompt_id: str
) -> None:
    """A prompt with tokens that a model has no embedding for.

    Raises:
        DataError: it holds an id of `num_ids` or above.
    """
    if max(ids) >= num_ids:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise DataError(
            f"prompt {prompt_id!r} has the token {token!r} (id {max(ids)}), but the model has ids "
            f"up to {num_ids - 1} only. Remove it from the prompt or its template."
        )


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that steer a model: end of turn, padding and so on."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files into a folder.

    Raises:
        OSError: They cannot be written.
    """
    with _FailedWrites():
        tokenizer.save_pretrained(folder)


class _FailedWrites:
    """Names a failed write what it is: the Rust library raises a bare `Exception` for it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is Exception:  # this very class; others are no failed writes
            raise OSError(str(error))


def _refuse_control_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, prompt_id: str
) -> None:
    # Encoding is the only sure detector: a tokenizer may normalise text before it looks for them.
    found = control_ids(tokenizer).intersection(ids)
    if tokenizer.unk_token is not None and tokenizer.unk_token not in text:
        found -= {tokenizer.unk_token_id}  # a character that the tokenizer does not know
    if found:
        token = tokenizer.convert_ids_to_tokens(min(found))
        raise DataError(
            f"prompt {prompt_id!r} contains the control token {token!r}, got it inside the text. "
            "Remove it; to give several turns use chat messages."
        )


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    messages: tuple[Message, ...],
    enable_thinking: bool | None,
) -> list[int]:
    template = template_of(tokenizer, prompt.tools, prompt.id)
    variables: dict[str, Any] = {}
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    rendered = render_chat(tokenizer, template, messages, variables, prompt.id)
    refuse_lost_turns(tokenizer, template, messages, variables, prompt.id, rendered)
    if prompt.tools:
        plain, tools = rendered, {"tools": list(prompt.tools)}
        rendered = render_chat(tokenizer, template, messages, variables | tools, prompt.id)
        if rendered == plain:
            raise ModelError(
                f"prompt {prompt.id!r} has tools, which the chat template of "
                f"{tokenizer.name_or_path!r} leaves out. Use a model with tools, or remove "
                "them from the data."
            )
    return encode_completion(tokenizer, rendered)


def refuse_thinking(
    thinking: bool | None,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuses a choice of `enable_thinking` that nothing reads.

    Args:
        thinking: the choice; None chooses nothing.
        prompts: what is rendered.
        tokenizer: the model's; None for a server, whose template is not known.

    Raises:
        ConfigError: no prompt is a chat, or the chat template has no such switch.
    """
    if thinking is None:
        return
    option = "--thinking" if thinking else "--no-thinking"
    if all(isinstance(prompt.content, str) for prompt in prompts):
        raise ConfigError(
            f"{option} is a switch of chat templates, but no prompt is rendered with one. Leave it "
            "out, or add --chat."
        )
    if tokenizer is not None and "enable_thinking" not in str(tokenizer.chat_template):
        raise ConfigError(
            f"{option} has no effect: the chat template of {tokenizer.name_or_path!r} does not "
            "read enable_thinking. Leave it out."
        )


def _refuse_different_tokens(student: Mapping[str, int], teacher: Mapping[str, int]) -> None:
    differing = [t for t in student.keys() | teacher.keys() if student.get(t) != teacher.get(t)]
    if not differing:
        return
    largest = max(len(student), len(teacher))
    first = min(differing, key=lambda t: (min(student.get(t, largest), teacher.get(t, largest)), t))
    raise ModelError(
        f"student and teacher have different vocabularies: {len(differing)} tokens differ, first "
        f"{first!r}, which is id {student.get(first)} for the student and {teacher.get(first)} for "
        "the teacher. Choose models that share a tokenizer."
    )


def eos_remap(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, policy: str = "map"
) -> tuple[int, int] | None:
    """The end-of-sequence ids of student and teacher if they differ and are to trade places.

    A base student ends a text with one id and a chat teacher with another; unmapped, the teacher
    punishes stopping and completions run into their limit.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer, with the same vocabulary.
        policy: "map" to let the ids trade places for the teacher, "refuse" to stop, "class" where
            they count as one and need no exchange.

    Raises:
        ModelError: they differ and the policy is "refuse", or one alone has none.
    """
    ids = (student.eos_token_id, teacher.eos_token_id)
    if ids[0] == ids[1] or policy == "class":
        return None
    if None in ids:
        without, other = ("student", teacher) if ids[0] is None else ("teacher", student)
        raise ModelError(
            f"the {without}'s tokenizer names no end-of-sequence token, so nothing could stand for "
            f"the other one's {other.eos_token!r} (id {other.eos_token_id}). Set eos_token in the "
            f'{without}\'s tokenizer_config.json, to "{other.eos_token}" if it ends its texts so.'
        )
    if policy == "refuse":
        raise ModelError(
            f"student and teacher end a completion differently: {student.eos_token!r} (id "
            f"{ids[0]}) and {teacher.eos_token!r} (id {ids[1]}). Set teacher.stop_token = 'map'."
        )
    return int(ids[0]), int(ids[1])


def refuse_remap_beyond(swap: tuple[int, int] | None, vocab_size: int) -> None:
    """End-of-sequence ids that are to trade places, one of which a model has no row for.

    Raises:
        ModelError: one is `vocab_size` or above.
    """
    if swap is not None and max(swap) >= vocab_size:
        owner = "student" if swap[0] >= vocab_size else "teacher"
        raise ModelError(
            f"the {owner}'s tokenizer ends texts with id {max(swap)}, but the models have ids up "
            f"to {vocab_size - 1} only. Set another eos_token in its tokenizer_config.json."
        )


def _refuse_different_control(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    differing = control_ids(student) ^ control_ids(teacher)
    if differing:
        token_id = min(differing)
        owner = "student" if token_id in control_ids(student) else "teacher"
        raise ModelError(
            f"token {student.convert_ids_to_tokens(token_id)!r} (id {token_id}) is a control token "
            f"for the {owner} only. Choose models that share a tokenizer."
        )
