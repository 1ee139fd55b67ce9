"""A rank that trains a tiny student in TRL, with its trainer and with ours, and saves what it saw.

`python trl_ranks.py MODELS OUT RULE`; what rank r saw is `OUT/r.safetensors`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tutelage.integrations.trl import TutelageTrainer
from tutelage.models.load import load_tokenizer

PROMPTS = ("What is 1 + 1?", "2 * 3 =", "And 7 - 4?", "Say one number.") * 4
WITH_TOOLS = "soft_or"
"""The rule whose run has a tool's result in every completion."""


def main(models: Path, out: Path, rule: str) -> None:
    transformers.logging.set_verbosity_error()
    ours = train(TutelageTrainer, models, out, rule, {"rule": rule, "keep": 0.5})
    found = {f"ours.{name}": x for name, x in ours.items()}
    if rule == "all":
        theirs = train(DistillationTrainer, models, out, rule, {})
        found |= {f"theirs.{name}": x for name, x in theirs.items()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(found, out / f"{rank}.safetensors")


def train(
    kind: type, models: Path, out: Path, rule: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Losses and tokens of every micro-batch, gradients of every update, and the weights after."""
    seen: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    num_updates = 0

    class Watched(kind):  # type: ignore[misc, valid-type]
        def _generate(self, prompts: Any) -> Any:
            found = super()._generate(prompts)
            if rule != WITH_TOOLS:
                return found
            marks = [[int(i % 5 != 2) for i in range(len(ids))] for ids in found[1]]
            return (*found[:2], marks, *found[3:])

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            i = len(losses)
            seen.update(
                {f"batch{i}.{k}": v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
            )
            loss = super().compute_loss(model, inputs, *rest, **named)
            losses.append(loss.detach().clone())
            return loss

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            nonlocal num_updates
            for name, weight in trainer.accelerator.unwrap_model(model).named_parameters():
                seen[f"gradient{num_updates}.{name}"] = weight.grad.clone()
            num_updates += 1

    settings = DistillationConfig(
        output_dir=str(out),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_completion_length=9,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    pair = [AutoModelForCausalLM.from_pretrained(models / name) for name in ("student", "teacher")]
    tokenizer = load_tokenizer(str(models / "student"))
    tokenizer.padding_side = "left"
    trainer = Watched(
        model=pair[0],
        teacher_model=pair[1],
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=tokenizer,
        callbacks=[Look()],
        **options,
    )
    trainer.train()
    assert num_updates == 2
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    seen |= {f"weight.{name}": x.clone() for name, x in weights.items()}
    seen["losses"] = torch.stack(losses)
    return {name: x.contiguous() for name, x in seen.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
