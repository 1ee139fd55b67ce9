"""Our trainer in TRL 1.16 against TRL's own and against materialised logits, in 1 and 2 processes.

`make test-peers` puts TRL where these tests find it.
"""

from __future__ import annotations

import ast
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import reference
from ranks import run_script
from test_readme import blocks
from tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venvs" / "trl"
SCRIPT = Path(__file__).with_name("trl_ranks.py")
NUM_UPDATES, NUM_MICRO_BATCHES, RATE = 2, 2, 0.05
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not FOLDER.exists(), reason="needs trl: make test-peers"),
]

Seen = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student", 0)
    save_tiny_model(folder / "teacher", 1, hidden_size=48)
    return folder


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return


def run(models: Path, out: Path, rule: str, count: int, name: str) -> list[Seen]:
    """What the trainer of that name saw in every rank."""
    run_script(SCRIPT, [models, out, rule], count)
    found = [load_file(out / f"{rank}.safetensors") for rank in range(count)]
    start = f"{name}."
    return [
        {k.removeprefix(start): v for k, v in rank.items() if k.startswith(start)} for rank in found
    ]


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("count", [1, 2])
def test_rule_all_is_trls_own_trainer(models: Path, tmp_path: Path, count: int) -> None:
    ours = run(models, tmp_path, "all", count, "ours")
    for rank, mine in enumerate(ours):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for key, value in mine.items():
            torch.testing.assert_close(value, found[f"theirs.{key}"], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rule", ["soft_or", "q3"])
def test_half_of_the_tokens_is_the_materialised_computation(
    models: Path, tmp_path: Path, rule: str, count: int
) -> None:
    ranks = run(models, tmp_path, rule, count, "ours")
    student = AutoModelForCausalLM.from_pretrained(models / "student").double()
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher").double()
    for update in range(NUM_UPDATES):
        first = update * NUM_MICRO_BATCHES
        batches = [
            {k.partition(".")[2]: v for k, v in rank.items() if k.startswith(f"batch{i}.")}
            for rank in ranks
            for i in range(first, first + NUM_MICRO_BATCHES)
        ]
        loss, kept = materialised(student, teacher, batches, rule)
        assert (
            torch.cat([batch["tool_mask"].flatten() for batch in batches])
            .nonzero()
            .squeeze(1)
            .tolist()
            == kept
        ), (update, rule)
        losses = [rank["losses"][first : first + NUM_MICRO_BATCHES].sum() for rank in ranks]
        assert math.isclose(float(sum(losses)) / count, float(loss), rel_tol=1e-6)
        student.zero_grad()
        loss.backward()
        for name, weight in student.named_parameters():
            for rank in ranks:
                found = rank[f"gradient{update}.{name}"].double()
                assert float((found - weight.grad).norm() / weight.grad.norm()) < 1e-5, name
        with torch.no_grad():
            for name, weight in student.named_parameters():
                weight -= RATE * ranks[0][f"gradient{update}.{name}"]
    for name, weight in student.named_parameters():
        for rank in ranks:
            torch.testing.assert_close(rank[f"weight.{name}"].double(), weight, rtol=0, atol=1e-6)


def materialised(
    student: Any, teacher: Any, batches: list[Seen], rule: str
) -> tuple[Tensor, list[int]]:
    """The loss by whole logits of single sequences, and the places of the kept tokens."""
    log_p, log_q, group, places = [], [], [], []
    start = 0
    for batch in batches:
        width = batch["completion_ids"].shape[1]
        for i in range(len(batch["completion_ids"])):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i] > 0]
            completion = batch["completion_ids"][i][batch["completion_mask"][i] > 0]
            # in these runs every fifth token from the third on is a tool's
            own = [t for t in range(len(completion)) if t % 5 != 2 or rule != "soft_or"]
            row = torch.cat([prompt, completion])[None]
            at = [len(prompt) - 1 + t for t in own]
            log_p.append(reference.log_softmax(student(row).logits[0, at]))
            with torch.no_grad():
                log_q.append(reference.log_softmax(teacher(row).logits[0, at]))
            group += [start + i * width] * len(own)
            places += [start + i * width + t for t in own]
        start += batch["completion_ids"].numel()
    p, q = torch.cat(log_p), torch.cat(log_q)
    reverse, forward = reference.reverse_kl(p, q), reference.forward_kl(p, q)
    numbers = (reference.entropy(p), reverse, forward)
    score = reference.scores(rule, *(x.tolist() for x in numbers), [])
    kept = reference.kept(score, group, "0.5", [True] * len(score))
    assert 0 < len(kept) < len(score)
    return reverse[kept].sum() / len(kept), [places[i] for i in kept]


@pytest.mark.usefixtures("trl")
def test_what_the_trainer_relies_on_is_as_it_was() -> None:
    import trl
    from trl.trainer import distillation_trainer, utils
    from trl.trainer.distillation_trainer import DistillationTrainer

    assert trl.__version__.startswith("1.16.")
    expected = {
        distillation_trainer._chunked_divergence_loss: (
            "student_hidden_states teacher_hidden_states student_lm_head_weight "
            "teacher_lm_head_weight completion_mask beta num_items_in_batch student_lm_head_bias "
            "teacher_lm_head_bias student_logit_scale teacher_logit_scale "
            "student_final_logit_softcapping teacher_final_logit_softcapping temperature"
        ),
        DistillationTrainer._compute_loss: "self unwrapped_student inputs num_items_in_batch",
        DistillationTrainer._generate_and_score_completions: "self inputs",
        DistillationTrainer.compute_loss: "self model inputs return_outputs num_items_in_batch",
        distillation_trainer._ForwardRedirection.__call__: (
            "self wrapper_module original_module method args kwargs"
        ),
        utils.split_tensor_dict: "tensor_dict num_chunks",
        utils.split_pixel_values_by_grid: "batch",
        utils.unsplit_pixel_values_by_grid: "batch",
    }
    for function, names in expected.items():
        assert " ".join(inspect.signature(function).parameters) == names


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule must be one of"),
        ({"keep": 0.0}, "keep must be in"),
        ({"scope": "prompt"}, "scope must be"),
        ({"normalization": "rank"}, "normalization must be one of"),
    ],
)
def test_unusable_options_are_refused_before_models_are_read(
    options: dict[str, Any], message: str
) -> None:
    from tutelage.integrations.trl import TutelageTrainer

    with pytest.raises(ValueError, match=message):
        TutelageTrainer(model="no-such-model", **options)


@pytest.mark.usefixtures("trl")
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import trl

    from tutelage.integrations import trl as ours

    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"needs trl>=1.16,<1.17, got 1.17.0"):
        importlib.reload(ours)


@pytest.mark.usefixtures("trl")
def test_the_page_s_example_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    (script,) = [b for b in blocks(page) if b.file == "trl_soft_or.py"]
    (tmp_path / "trl_soft_or.py").write_text(script.text, encoding="utf-8")
    paths = os.pathsep.join([str(FOLDER), *sys.path])
    done = subprocess.run(
        [sys.executable, "trl_soft_or.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shares = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert len(shares) == 2
    assert all(0.4 < share <= 0.5 for share in shares)
