"""Mutants of what several processes of a run do together."""

from __future__ import annotations

from .mutant_list_core import Group

PROCESS_MUTANTS: dict[str, Group] = {
    "train/sharded_files.py": (
        ["train/test_sharded_saving.py"],
        [
            (
                "torch.cat(found)[: shard.shape[0]].cpu()",
                "torch.cat(found)[-shard.shape[0] :].cpu()",
            ),
            ("gathered_to(process)\n", "gathered_to(0)\n"),
        ],
    ),
    "train/agreement.py": (
        ["train/test_sharded_saving.py"],
        [
            ("            if (folder / name).exists():\n", "            if folder.exists():\n"),
        ],
    ),
    "setup/shares.py": (
        ["train/test_sharded_saving.py"],
        [("        if failed:\n", "        if False:\n")],
    ),
    "models/weight_files.py": (
        ["models/test_weight_files.py"],
        [
            ("size + num_bytes > limit", "size > limit"),
            (
                "    for _, members in groupby(sizes, unit_of):",
                "    for _, members in groupby(sizes):",
            ),
        ],
    ),
}
