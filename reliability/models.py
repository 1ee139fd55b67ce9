"""Models and prompt files for random configurations: pairs that are usable, and others."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from transformers import AutoConfig, AutoModelForCausalLM

from tiny import save_tiny_gguf, save_tiny_model
from tutelage.models.load import load_model
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


_EMBEDDED_PAIRS = {
    "ledger_tools": (f"{EMBEDDED}tools-overconfident", f"{EMBEDDED}tools-teacher"),
    "coins": ("package:tutelage/assets/coins-student", "package:tutelage/assets/coins-teacher"),
}
"""By kind of data; of the ledger there are several, among other pairs of its vocabulary."""


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
    all_answered: set[str]
    """Files of which every prompt has an answer."""

    def draw(
        self, rng: random.Random, is_broken: bool, kind: str | None
    ) -> tuple[str, tuple[str, str]]:
        """A pair and what it is; the models of the embedded tasks, if the data are to be those."""
        if kind in _EMBEDDED_PAIRS and not is_broken:
            return str(kind), _EMBEDDED_PAIRS[str(kind)]
        source = self.broken if is_broken else self.pairs
        where = "ledger" if kind == "ledger" and not is_broken else rng.choice(list(source))
        return where, rng.choice(source[where])

    def data(
        self, rng: random.Random, where: str, is_broken: bool, kind: str | None
    ) -> dict[str, Any]:
        """A table of data that suits the pair, of the kind if one is given."""
        if kind in _EMBEDDED_PAIRS:
            return {"kind": kind}
        is_ledger = where == "ledger"
        share = 0.5 if is_ledger else 0.1
        if kind == "ledger" or (kind is None and rng.random() < share):
            return {"kind": "ledger"}
        files = self.broken_files if is_broken else self.files["ledger" if is_ledger else "bytes"]
        table: dict[str, Any] = {"kind": "file", "path": rng.choice(files), "num_held_out": 2}
        table["chat"] = not is_ledger and rng.random() < 0.7
        return table

    def answered(self, file: str) -> str:
        """A file of which every prompt has an answer: the same, or the first that suits it."""
        for files in self.files.values():
            if file in files and file not in self.all_answered:
                return files[0]
        return file


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
    pairs |= _other_forms(place)
    broken_files = _broken_files(place)
    files = {"ledger": _ledger_files(place), "bytes": _files(place)}
    answered = {"answered", "asked", "asked-again", "chats", "parquet", "ended", "long"}
    whole = {path for kind in files.values() for path in kind if Path(path).stem in answered}
    return Models(pairs, _broken(place), files, broken_files, whole)


def _other_forms(place: Path) -> dict[str, list[tuple[str, str]]]:
    """Pairs of models that are saved in other ways than one float32 file."""
    import peft

    student, teacher = (place / "qwen3" / who for who in ("student", "teacher"))
    plain = str(student), str(teacher)
    adapter = place / "forms" / "adapter"
    peft_config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(load_model(plain[1]), peft_config).save_pretrained(adapter)
    named = json.loads((adapter / "adapter_config.json").read_text())
    named["base_model_name_or_path"] = plain[1]
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    model = AutoModelForCausalLM.from_pretrained(student)
    for name, dtype, size in (("shards", None, "20KB"), ("bfloat16", torch.bfloat16, "1GB")):
        model.to(dtype or torch.float32).save_pretrained(
            place / "forms" / name, max_shard_size=size
        )
        _take_tokenizer(student, place / "forms" / name)
    shutil.copytree(student, place / "forms" / "no-eos")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = place / "forms" / "no-eos" / file
        table = json.loads(path.read_text())
        for key in ("eos_token_id", "eos_token"):
            table.pop(key, None)
        path.write_text(json.dumps(table))
    files = [save_tiny_gguf(place / "forms" / f"{seed}.gguf", seed) for seed in (1, 2)]
    first, second = map(str, files)
    forms = str(place / "forms")
    return {
        "adapter": [(plain[0], str(adapter)), (str(adapter), plain[1])],
        "shards": [(f"{forms}/shards", plain[1])],
        "bfloat16": [(f"{forms}/bfloat16", plain[1]), (plain[0], f"{forms}/bfloat16")],
        "no eos": [(f"{forms}/no-eos", f"{forms}/no-eos")],
        "gguf": [(first, second), (first, first), (first, plain[1]), (plain[0], second)],
    }


def _take_tokenizer(source: Path, target: Path) -> None:
    for path in source.glob("*token*"):
        shutil.copy(path, target)
    shutil.copy(source / "chat_template.jinja", target)


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
        "adapter too": changed("adapter-too", "adapter_config.json", edit(peft_type="LORA")),
        "unsavable": changed(
            "unsavable", "generation_config.json", edit(do_sample=False, temperature=0.6)
        ),
        "odd eos": changed("odd-eos", "generation_config.json", edit(eos_token_id="end")),
        "quantised": changed(
            "quantised", "config.json",
            edit(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ),
    }  # fmt: skip
    (place / "broken" / "cut.gguf").write_bytes((place / "forms" / "1.gguf").read_bytes()[:20000])
    (place / "broken" / "other.gguf").write_bytes(b"GGML" + bytes(99))
    bad |= {"cut gguf": str(place / "broken" / "cut.gguf")}
    bad |= {"no gguf": str(place / "broken" / "other.gguf")}
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
    answers = [r | {"messages": [*c["prompt"], {"role": "assistant", "content": r["answer"]}]}
               for r, c in zip(asked, chats, strict=True)]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(asked), place / "parquet.parquet")
    return [
        _write(place / "asked.jsonl", asked),
        str(place / "parquet.parquet"),
        _write(place / "ended.jsonl",
               [{"prompt": a["messages"], "answer": a["answer"]} for a in answers]),
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
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    path = place / "cut.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b')
    return [
        str(place / "nowhere.jsonl"),
        str(path),
        _write(place / "control.jsonl", control),
        _write(place / "control-once.jsonl", mixed),
        _write(place / "empty.jsonl", []),
        _write(place / "twice.jsonl", [{"id": "a", "prompt": "a"}, {"id": "a", "prompt": "b"}]),
        _write(place / "images.jsonl", [{"prompt": "a", "images": ["x.png"]}] * 3),
        _write(place / "answers-only.jsonl",
               [{"prompt": [{"role": "assistant", "content": "4"}]}] * 3),
        _write(place / "half.jsonl", [{"prompt": "a"}, {"prompt": "\ud83d"}, {"prompt": "c"}]),
        _write(place / "cut.parquet", [{"prompt": "a"}]),
        _write(place / "tools.jsonl",
               [{"prompt": [{"role": "user", "content": "a"}], "tools": tools}] * 3),
        "gsm8k-train",
        "no/such-set",
        _write(place / "one.jsonl", [{"prompt": "one", "answer": "1"}]),
        _write(place / "numbers.jsonl", [1, 2, 3]),
        _write(place / "blank.jsonl", [{"prompt": ""}, {"prompt": "a"}, {"prompt": "b"}]),
    ]  # fmt: skip
