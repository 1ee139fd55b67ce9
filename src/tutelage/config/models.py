"""Student, teacher and optimizer as configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tutelage.config.bounds import STRICT, require

TeacherMode: TypeAlias = Literal["resident", "offload", "reload"]
TeacherSharding: TypeAlias = Literal["none", "fsdp2", "tp"]
OptimizerKind: TypeAlias = Literal[
    "adamw", "adamw_on_disk", "adamw_8bit", "paged_adamw_8bit", "adafactor"
]


@dataclass(frozen=True)
class LoraConfig:
    """Trains low-rank updates of frozen weights; needs the extra `lora`."""

    __pydantic_config__ = STRICT
    rank: int = 16
    """Rank of the updates."""
    alpha: float = 32.0
    """Scale of the updates, times the rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped while training, in [0, 1); never while sampling."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt; none means all but the head."""

    def __post_init__(self) -> None:
        rank, alpha, dropout = self.rank, self.alpha, self.dropout
        require(1 <= rank <= 65536, "student.lora.rank", "from 1 to 65536", rank, "16 is usual.")
        hint, rule = "Twice the rank is usual.", "above 0, at most 65536"
        require(0 < alpha <= 65536, "student.lora.alpha", rule, alpha, hint)
        require(0 <= dropout < 1, "student.lora.dropout", "in [0, 1)", dropout, "0 drops nothing.")


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained."""

    __pydantic_config__ = STRICT
    model: str
    """Folder, .gguf file, package:NAME/folder, or hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and forward pass; updates are summed in float32 in either case."""
    num_layers: int | None = None
    """Depth to prune the model to before training; None keeps all layers."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again for the backward pass instead of keeping them."""
    layers: Literal["transformers", "liger"] = "transformers"
    """Norms and gated units by transformers, or on CUDA by Liger's fused kernels (Llama, Mistral,
    Qwen2 and Qwen3 models; extra `liger`), which round in another order."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Bits of the frozen weights under an adapter (QLoRA); needs the extra `lowbit`."""
    lora: LoraConfig | None = None
    """Train an adapter instead of the weights; None trains all weights."""
    sharding: Literal["none", "fsdp2"] = "none"
    """Where several processes share a run: none keeps the weights, gradients and optimizer state
    whole in each; fsdp2 cuts them into as many parts, of which each process keeps one (torch's
    FSDP2), and gathers weights for sampling, and layer by layer for a pass."""
    sharding_group_size: int = 0
    """Neighbouring processes that keep one copy of the weights between them; 0 is all. A smaller
    group, such as those of one host, gathers within itself and sums gradients with the others."""

    def __post_init__(self) -> None:
        is_possible = self.quantization == "none" or self.lora is not None
        hint = "Quantized weights cannot be trained; add a table [student.lora]."
        require(is_possible, "student.quantization", "none", self.quantization, hint)
        is_whole, size = self.sharding == "none", self.sharding_group_size
        is_possible, hint = self.quantization == "none" or is_whole, 'Use sharding = "none".'
        rule = "none with student.sharding = fsdp2"
        require(is_possible, "student.quantization", rule, self.quantization, hint)
        key, hint = "student.sharding_group_size", "0 is one group of all processes."
        require(size == 0 or size >= 2, key, "0 or at least 2", size, hint)
        require(size == 0 or not is_whole, key, "0 without student.sharding = fsdp2", size, hint)


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen model that the student is trained towards, in the processes of the run."""

    __pydantic_config__ = STRICT
    kind: Literal["local"] = field(default="local", kw_only=True)
    model: str
    """Folder, .gguf file, package:NAME/folder, or hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights."""
    mode: TeacherMode = "resident"
    """Where it is while the student generates and is trained: resident on the device, offload to
    main memory, or reload, which loads it from its folder in every step. On a CPU, whose memory is
    main memory, offload leaves the teacher in its folder if it has one (safetensors), as reload."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Bits of the weights; needs the extra `lowbit`."""
    hidden_budget_bytes: int = 4 << 30
    """Hidden states of one step kept in main memory; more go to a file in the run folder."""
    stop_token: Literal["map", "class", "refuse"] = "map"
    """Where student and teacher end a text with different ids: map exchanges them for the teacher;
    class adds up the probability of all ids that end a text for one side or the other, also where
    a side has several; refuse ends the run."""
    vocabulary: Literal["same", "aligned"] = "same"
    """aligned is a teacher with another tokenizer, byte-level or SentencePiece's: tokens that cover
    the same characters on both sides are trained on, over the ids that both have."""
    sharding: TeacherSharding = "none"
    """Where several processes share a run: none keeps the weights whole in each; fsdp2 cuts them
    into as many parts, of which each process keeps one, and gathers a layer while it is computed;
    tp (tensor parallelism) cuts each layer's products, and each process computes its part for the
    batches of all, for architectures with a plan in transformers. The model is a folder or hub id
    with safetensors; it gives no completions of its own to an evaluation."""
    sharding_group_size: int = 0
    """Neighbouring processes that keep one copy of the weights between them; 0 is all."""

    def __post_init__(self) -> None:
        budget = self.hidden_budget_bytes
        hint = "0 writes all hidden states to disk."
        require(budget >= 0, "teacher.hidden_budget_bytes", "at least 0", budget, hint)
        self._require_sharded()

    def _require_sharded(self) -> None:
        size, key = self.sharding_group_size, "teacher.sharding_group_size"
        hint = "0 is one group of all processes."
        require(size == 0 or size >= 2, key, "0 or at least 2", size, hint)
        if self.sharding == "none":
            require(size == 0, key, "0 without teacher.sharding", size, hint)
            return
        rule, hint = f"none with teacher.sharding = {self.sharding}", "Low bits are not cut."
        require(self.quantization == "none", "teacher.quantization", rule, self.quantization, hint)
        rule = f"resident or reload with teacher.sharding = {self.sharding}"
        hint = "Reload maps the files in every step."
        require(self.mode != "offload", "teacher.mode", rule, self.mode, hint)


class UnsharedTeacher:
    """What kinds have in common of which every process has all it needs."""

    @property
    def sharding(self) -> TeacherSharding:
        """Nothing is cut."""
        return "none"

    @property
    def sharding_group_size(self) -> int:
        """No processes share anything."""
        return 0


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    __pydantic_config__ = STRICT
    kind: OptimizerKind = "adamw"
    """adamw; adamw_on_disk, the same with its moments in a file of the run folder; adamw_8bit or
    paged_adamw_8bit with the extra `lowbit`; adafactor without moments."""
    offload: bool = False
    """Keep float32 weights and optimizer state in main memory and update there."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after warm-up, towards 0 for the last two."""
    warmup_steps: int = 0
    """Steps of linear warm-up; 0 starts at the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of matrices only."""
    decay_all: bool = False
    """Decay norms, biases, embeddings and a head tied to them too, which are spared otherwise."""
    beta1: float = 0.9
    """Decay of the first moment, the mean of gradients, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the second moment, the mean of squared gradients, in [0, 1)."""
    max_grad_norm: float = 1.0
    """Norm the gradient is clipped to; 0 never clips."""

    @property
    def state_is_on_disk(self) -> bool:
        """Whether moments take disk and no memory."""
        return self.kind == "adamw_on_disk"

    def __post_init__(self) -> None:
        hint = "1e-6 is usual for large models, 1e-3 for the embedded ones."
        rate = self.learning_rate
        require(0 < rate <= 10, "optimizer.learning_rate", "above 0, at most 10", rate, hint)
        change, hint = rate * self.weight_decay, "0.1 is usual."
        rule = "at most 1 / optimizer.learning_rate, beyond which weights change their sign"
        require(change <= 1, "optimizer.weight_decay", rule, self.weight_decay, hint)
        for name in ("beta1", "beta2"):
            beta = self.__dict__[name]
            require(0 <= beta < 1, f"optimizer.{name}", "in [0, 1)", beta, "0.9 is usual.")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            value = self.__dict__[name]
            require(value >= 0, f"optimizer.{name}", "at least 0", value, "0 switches it off.")
