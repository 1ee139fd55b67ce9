"""Models and prompt files for random configurations: pairs that are usable, and others."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tiny import save_tiny_model
from tutelage.models.tiny import Architecture
from tutelage.models.tiny import save_tiny_model as save_tiny_family

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "phi": {},
    "mixtral": {},
    "qwen3_moe": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
    "lfm2": {},
}
EMBEDDED = "package:tutelage/assets/ledger-"


@dataclass(frozen=True)
class Models:
    """Pairs of models by the vocabulary they share, and prompt files that suit each."""

    pairs: dict[str, list[tuple[str, str]]]
    """By family."""
    broken: dict[str, list[tuple[str, str]]]
    """Pairs of which one cannot be used."""
    files: dict[str, list[str]]
    """Prompt files by vocabulary, ledger or bytes."""
    broken_files: list[str]

    def draw(self, rng: random.Random, is_broken: bool) -> tuple[str, tuple[str, str]]:
        source = self.broken if is_broken else self.pairs
        where = rng.choice(list(source))
        return where, rng.choice(source[where])

    def data(
        self, rng: random.Random, where: str, is_broken: bool
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """A table of data, and further keys that it may have."""
        is_ledger = where.startswith("ledger")
        if rng.random() < (0.5 if is_ledger else 0.2):
            return {"kind": "ledger"}, ("num_items",)
        files = self.broken_files if is_broken else self.files["ledger" if is_ledger else "bytes"]
        table: dict[str, Any] = {"kind": "file", "path": rng.choice(files), "num_held_out": 2}
        table["chat"] = not is_ledger and rng.random() < 0.7
        keys = ("split", "subset", "prompt_column", "answer_column", "suffix", "enable_thinking",
                "max_prompt_tokens", "grader", "num_held_out")  # fmt: skip
        return table, keys


def saved_models(folder: Path) -> Models:
    """Write models and prompt files."""
    place = folder / "models"
    ledger = place / "ledger"
    for name, seed, tied in (("student", 1, False), ("teacher", 2, False), ("tied", 3, True)):
        save_tiny_model(ledger / name, seed, tied)
    pairs: dict[str, list[tuple[str, str]]] = {
        "ledger": [
            (str(ledger / "student"), str(ledger / "teacher")),
            (str(ledger / "tied"), str(ledger / "teacher")),
            (str(ledger / "student"), str(ledger / "student")),
            (str(ledger / "student"), f"{EMBEDDED}teacher"),
            (f"{EMBEDDED}small", f"{EMBEDDED}teacher"),
            (f"{EMBEDDED}collapsed", f"{EMBEDDED}teacher"),
        ]
    }
    for name, options in FAMILIES.items():
        found = Architecture(AutoConfig.for_model(name, **options), "a trial", is_base=False)
        for seed, (who, rows) in enumerate([("student", 267), ("teacher", 395)]):
            save_tiny_family(found, rows, seed, place / name / who)
        pairs[name] = [(str(place / name / "student"), str(place / name / "teacher"))]
    pairs["llama"].append((str(place / "llama" / "student"), str(place / "qwen3" / "teacher")))
    return Models(
        pairs, _broken(place), {"ledger": _ledger_files(place), "bytes": _files(place)},
        _broken_files(place),
    )  # fmt: skip


def _broken(place: Path) -> dict[str, list[tuple[str, str]]]:
    good = str(place / "qwen3" / "student")

    def changed(name: str, file: str, change: Any) -> str:
        folder = place / "broken" / name
        shutil.copytree(good, folder)
        change(folder / file)
        return str(folder)

    def edit(**values: Any) -> Any:
        def apply(path: Path) -> None:
            table = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(table | values))

        return apply

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def adapter_only(path: Path) -> None:
        path.write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
        (path.parent / "config.json").unlink()
        (path.parent / "model.safetensors").unlink()

    bad = {
        "missing": str(place / "nowhere"),
        "no tokenizer": changed("no-tokenizer", "tokenizer.json", Path.unlink),
        "no weights": changed("no-weights", "model.safetensors", Path.unlink),
        "cut weights": changed("cut-weights", "model.safetensors", cut),
        "cut tokenizer": changed("cut-tokenizer", "tokenizer.json", cut),
        "cut config": changed("cut-config", "config.json", cut),
        "wrong width": changed("wrong-width", "config.json", edit(hidden_size=96)),
        "no such type": changed("no-such-type", "config.json", edit(model_type="no_such")),
        "adapter only": changed("adapter-only", "adapter_config.json", adapter_only),
        "unsavable": changed(
            "unsavable", "generation_config.json", edit(do_sample=False, temperature=0.6)
        ),
        "odd eos": changed("odd-eos", "generation_config.json", edit(eos_token_id="end")),
        "quantised": changed(
            "quantised", "config.json",
            edit(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ),
    }  # fmt: skip
    teacher = str(place / "qwen3" / "teacher")
    found = {name: [(path, teacher), (good, path)] for name, path in bad.items()}
    found["other tokenizer"] = [(good, f"{EMBEDDED}teacher"), (f"{EMBEDDED}small", good)]
    return found


def _write(path: Path, records: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def _ledger_files(place: Path) -> list[str]:
    prompts = [f"a{i % 10}+{i // 10};>" for i in range(12)]
    answered = [{"prompt": p, "answer": str(i % 10)} for i, p in enumerate(prompts)]
    return [
        _write(place / "ledger-answered.jsonl", answered),
        _write(place / "ledger-plain.jsonl", [{"prompt": p} for p in prompts]),
        _write(place / "ledger-english.jsonl", [{"prompt": f"What is {i}?"} for i in range(9)]),
    ]


def _files(place: Path) -> list[str]:
    asked = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    some = [record if i % 2 else {"prompt": record["prompt"]} for i, record in enumerate(asked)]
    chats = [
        {"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in asked
    ]
    long = [{"prompt": "x" * 150 + str(i), "answer": "1"} for i in range(4)]
    very_long = [{"prompt": "x" * 1500 + str(i), "answer": "1"} for i in range(4)]
    return [
        _write(place / "asked.jsonl", asked),
        _write(place / "asked-again.jsonl", asked),
        _write(place / "some.jsonl", some),
        _write(place / "chats.jsonl", chats),
        _write(place / "long.jsonl", asked + long),
        _write(place / "very-long.jsonl", asked + very_long),
        _write(place / "formulas.jsonl",
               [{"prompt": f"x{i}", "answer": f"\\frac{{{i}}}{{7}}"} for i in range(9)]),
    ]  # fmt: skip


def _broken_files(place: Path) -> list[str]:
    control = [{"prompt": f"{i} <|im_end|> more", "answer": "1"} for i in range(6)]
    mixed = [{"prompt": f"{i}"} for i in range(30)] + [{"prompt": "a <|im_end|> b"}]
    path = place / "cut.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b')
    return [
        str(place / "nowhere.jsonl"),
        str(path),
        _write(place / "control.jsonl", control),
        _write(place / "control-once.jsonl", mixed),
        _write(place / "empty.jsonl", []),
        _write(place / "one.jsonl", [{"prompt": "one", "answer": "1"}]),
        _write(place / "numbers.jsonl", [1, 2, 3]),
        _write(place / "blank.jsonl", [{"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}]),
    ]
