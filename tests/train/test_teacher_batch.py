"""What the teacher reads where its prompts are others: the same rows, in the same micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tiny import tiny_config
from tutelage.core import LazyLogits
from tutelage.data.types import Prompt, Rollout
from tutelage.errors import RunError
from tutelage.train.distributed import Ranks
from tutelage.train.micro_batch import MicroBatch, pack_rollouts

ROLLOUTS = [
    Rollout(Prompt("a", "a"), 0, (3, 4), (5, 6, 7)),
    Rollout(Prompt("b", "b"), 0, (3,), (8,)),
    Rollout(Prompt("c", "c"), 0, (9, 3, 4), (5, 6, 2), is_generated=(True, False, True)),
    Rollout(Prompt("d", "d"), 0, (4, 4), (2, 2)),
]
HINT = (11, 12, 13, 14)
READ = [replace(r, prompt_ids=(*r.prompt_ids, *HINT[: i + 1])) for i, r in enumerate(ROLLOUTS)]


def packed(folder: Path, read: list[Rollout], how: str, limit: int = 12) -> list[MicroBatch]:
    config = tiny_config(folder, folder / "run", micro_batches=how, micro_batch_tokens=limit)
    ranks, cpu = Ranks(Accelerator(cpu=True)), torch.device("cpu")
    return pack_rollouts(config, ROLLOUTS, range(4), 0, ranks, cpu, read)


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_rows_of_both_are_the_same_tokens_and_each_is_predicted_behind_its_own_prompt(
    tmp_path: Path, how: str
) -> None:
    found = packed(tmp_path, READ, how)
    assert len(found) > 1
    assert sorted(name for m in found for name in m.batch.names) == [0, 1, 2, 3]
    for micro_batch in found:
        ours, theirs = micro_batch.batch, micro_batch.read_by_teacher
        assert theirs is micro_batch.teacher_batch
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.completion, theirs.completion)
        before = theirs.input_ids.flatten()[theirs.row_index]
        first = theirs.position == 0
        last_of_prompt = [READ[i].prompt_ids[-1] for i in theirs.completion[first].tolist()]
        assert before[first].tolist() == last_of_prompt
        assert int(theirs.attention_mask.sum()) <= 12 or theirs.num_sequences == 1


def test_halves_cut_both_at_the_same_completion(tmp_path: Path) -> None:
    micro_batch = next(m for m in packed(tmp_path, READ, "padded", 0) if m.batch.num_sequences > 1)
    hidden = torch.arange(float(micro_batch.batch.num_rows))[:, None]
    micro_batch.teacher_logits = LazyLogits(hidden, torch.ones(4, 1))
    config = tiny_config(tmp_path, tmp_path / "run")
    micro_batch.train_on_all(config.objective)
    for half in micro_batch.halves(config.objective):
        assert half.teacher_batch is not None
        assert torch.equal(half.batch.tokens, half.teacher_batch.tokens)
        assert torch.equal(half.batch.completion, half.teacher_batch.completion)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"completion_ids": (5, 6, 8)}, "tokens"),
        ({"completion_ids": (5, 6)}, "rows that differ"),
        ({"is_generated": (True, True, False)}, "rows that differ"),
    ],
)
def test_other_rows_are_refused_in_one_line(
    tmp_path: Path, change: dict[str, tuple[int, ...]], what: str
) -> None:
    read = [replace(READ[0], **change), *READ[1:]]  # type: ignore[arg-type]
    with pytest.raises(RunError, match=what) as caught:
        packed(tmp_path, read, "padded")
    assert "\n" not in str(caught.value)


def test_without_other_prompts_the_teacher_reads_the_batch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "run")
    ranks, cpu = Ranks(Accelerator(cpu=True)), torch.device("cpu")
    for micro_batch in pack_rollouts(config, ROLLOUTS, range(4), 0, ranks, cpu):
        assert micro_batch.read_by_teacher is micro_batch.batch
