"""The benchmarks are scripts beside the package; their modules are found by folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for folder in (".", "claims", "performance"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / folder))

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture
def toy_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture tiny, and a CPU in place of the card."""
    import gpu_card
    import gpu_models

    monkeypatch.setattr(gpu_card, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_models, "VOCABULARY", 1000)
    for size, table in gpu_models.SIZES.items():
        sizes = TINY | {"tie_word_embeddings": table["tie_word_embeddings"]}
        monkeypatch.setitem(gpu_models.SIZES, size, sizes)
