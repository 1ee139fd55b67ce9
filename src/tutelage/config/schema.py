"""The configuration of a run: one frozen dataclass per table of the TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tutelage.config.bounds import STRICT, require, require_counts, require_least
from tutelage.config.conversations import (
    ConversationData,
    LedgerToolsData,
    ShoppingData,
    TravelData,
)
from tutelage.config.evaluation import (
    EvaluationConfig,
    Metric,
    StopWhenConfig,
    require_measured,
)
from tutelage.config.method import (
    GRPOObjective,
    IDAWeighting,
    KLObjective,
    NoWeighting,
    ObjectiveConfig,
    OPSAObjective,
    PacedWeighting,
    TopKObjective,
    WeightingConfig,
    needs_sampler,
)
from tutelage.config.models import OptimizerConfig, StudentConfig, TeacherConfig
from tutelage.config.rollouts import (
    LiveRollouts,
    RolloutsConfig,
    require_rollouts,
    stores_teacher,
)
from tutelage.config.sampling import (
    EngineConfig,
    SamplingConfig,
    TransformersEngine,
    VLLMServer,
)
from tutelage.config.selection import AllTokens, SelectionConfig
from tutelage.config.self_teacher import SelfTeacher
from tutelage.config.teachers import (
    NOT_EVALUATED,
    AnyTeacher,
    LogprobServerTeacher,
    require_known_ids,
)
from tutelage.config.verifiers import VerifiersData


@dataclass(frozen=True)
class LedgerData:
    """The embedded task: no download, strictly graded."""

    __pydantic_config__ = STRICT
    kind: Literal["ledger"] = "ledger"
    num_items: int = 5
    """Sums in a prompt, 1 to 16; the shipped models are trained on 5."""

    def __post_init__(self) -> None:
        count, hint = self.num_items, "The shipped models are trained on 5."
        require(1 <= count <= 16, "data.num_items", "from 1 to 16", count, hint)


@dataclass(frozen=True)
class CoinsData:
    """The second embedded task: pay an amount exactly, asked in sentences; strictly graded."""

    __pydantic_config__ = STRICT
    kind: Literal["coins"] = "coins"


@dataclass(frozen=True)
class FileData:
    """Prompts from a JSONL or parquet file, a named set or a `datasets` id."""

    __pydantic_config__ = STRICT
    kind: Literal["file"]
    path: str
    """JSONL or parquet file (also looked for in $TUTELAGE_DATA and ./data), a named set
    (dapo-math-17k, math-train, gsm8k-train), or a data set's hub id."""
    split: str = "train"
    """Split of a hub data set; ignored for files."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    prompt_column: str | None = None
    """Key of the prompt; None takes the first of prompt, problem, question, messages."""
    answer_column: str = "answer"
    """Key of the reference answer, which a record may lack."""
    chat: bool = True
    """Render a text prompt as one user message with the tokenizer's chat template."""
    suffix: str | None = None
    """Text appended to every prompt, e.g. how to mark the answer; None takes a named set's own."""
    enable_thinking: bool | None = None
    """Passed to the chat template (Qwen3 thinks unless False); None leaves it to the template."""
    max_prompt_tokens: Annotated[int, Field(ge=0)] = 0
    """Longer prompts are left out and counted; 0 keeps all."""
    teacher_column: str | None = None
    """Key of the teacher's name, one of the tables [teachers.NAME]; a record without one has the
    teacher of [teacher]."""
    grader: Literal["none", "number", "math", "exact"] = "none"
    """How a completion is compared with the reference answer; `math` needs the extra math."""
    num_held_out: int = 64
    """Prompts kept out of training for evaluation."""


DataConfig: TypeAlias = Annotated[
    LedgerData | CoinsData | FileData | LedgerToolsData | ShoppingData | TravelData | VerifiersData,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class RecordingConfig:
    """Tokens kept for the report's token viewer; changes no number of the run."""

    __pydantic_config__ = STRICT
    every: int = 0
    """Steps between snapshots, one before the first and one after the last; 0 records nothing."""
    num_prompts: int = 4
    """Held-out prompts, the same in every snapshot; the student completes each once."""
    num_rollouts: int = 4
    """Rollouts of the step that are scored too, by the weights after it."""
    max_new_tokens: int = 128
    """Longest completion of a held-out prompt, and the most tokens kept of any."""
    max_bytes: int = 6_000_000
    """Size at which tokens.jsonl stops growing; the run logs it."""

    def __post_init__(self) -> None:
        require_least("recording.", self.__dict__, every=0, max_bytes=1)
        require_counts("recording.", self.__dict__, num_prompts=0, num_rollouts=0, max_new_tokens=1)


@dataclass(frozen=True)
class Config:
    """A whole run. Everything that changes the weights is in here."""

    __pydantic_config__ = STRICT
    student: StudentConfig
    teacher: AnyTeacher
    teachers: dict[str, AnyTeacher] = field(default_factory=dict)
    """Further teachers by name, each of the prompts that name it in data.teacher_column."""
    data: DataConfig = field(default_factory=LedgerData)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=TransformersEngine)
    rollouts: RolloutsConfig = field(default_factory=LiveRollouts)
    selection: SelectionConfig = field(default_factory=AllTokens)
    objective: ObjectiveConfig = field(default_factory=KLObjective)
    weighting: WeightingConfig = field(default_factory=NoWeighting)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stop_when: StopWhenConfig = field(default_factory=StopWhenConfig)
    recording: RecordingConfig = field(default_factory=RecordingConfig)
    out: str | None = None
    """Run folder; None names one after the config file and its fingerprint, under runs/."""
    seed: int = 0
    """Seed of prompts, completions and random selection."""
    num_steps: int = 100
    """Training steps: one batch of rollouts and its updates."""
    prompts_per_step: int = 32
    """Prompts of one step over all processes; each gets sampling.num_samples completions."""
    updates_per_step: int = 1
    """Optimizer updates on the rollouts of a step, cut in order into that many mini-batches."""
    micro_batch_tokens: int = 4096
    """Tokens of one forward and backward pass, padding included where there is any; 0 sets no limit
    but the size."""
    micro_batch_size: int = 64
    """Completions in one forward and backward pass, at most; changes memory, not the result."""
    micro_batches: Literal["padded", "packed"] = "padded"
    """How completions lie in one: padded to one length, neighbours together; or packed, one after
    the other, each attending to itself (Llama, Mistral, Qwen2, Qwen3)."""
    sampling_batch_size: int = 64
    """Completions decoded at the same time."""
    scoring: Literal["recorded", "forward"] = "recorded"
    """Student states that tokens are scored by: those they were sampled from, which cost nothing,
    or those of a forward pass of their own. Equal up to rounding; the first step checks it."""
    diagnostics: Literal["all", "kept"] = "all"
    """Tokens that logged divergences and quadrants describe; with kept, rules that look at the
    student alone never project the teacher's other tokens."""
    quadrant_thresholds: Literal["median"] | tuple[float, float] = "median"
    """Cuts of entropy and divergence for the quadrant table: medians, or two numbers in nats."""
    renormalize: bool = True
    """Divide by the kept tokens; False divides by all, so a token weighs as without selection."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0 for only the last."""
    checkpoint_writer: Literal["auto", "thread", "inline"] = "auto"
    """What writes a checkpoint: a thread beside training, from a copy in main memory, which holds
    weights and optimizer state once more; inline, while training waits; auto takes the thread where
    the device has memory of its own and the copy is possible. The files are the same."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk, at least 1."""
    keep_best: Metric = "none"
    """Keep one more, the one with the best evaluation by mean_at_k or pass_at_k, of which more is
    better, or by held_out_reverse_kl_nats, of which less is. An evaluation that is the best so far
    writes a checkpoint of its own; the first of equals stays."""
    max_skipped_steps: int = 3
    """Stop after so many steps in a row with a skipped update, at least 1. An update whose loss or
    gradient is infinite or NaN is skipped: weights and optimizer stay as they are."""
    process_timeout_s: int = 600
    """Seconds without a heartbeat after which a process is lost and the others end, at least 5;
    work of any length is no silence."""
    num_threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    device: str = "auto"
    """auto (cuda where it is), cpu or cuda."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Services that receive every step's metrics besides the run folder, which always does."""

    @property
    def max_completion_tokens(self) -> int:
        """Most tokens behind a prompt: generated ones, and those inserted between turns."""
        inserted = 0
        if isinstance(self.data, ConversationData):
            inserted = self.data.max_inserted_tokens
        return self.sampling.max_new_tokens + inserted

    @property
    def can_copy_checkpoints(self) -> bool:
        """Whether all that a checkpoint holds has a copy in main memory that can be written later.

        Moments on disk are there to be nowhere else; weights of few bits save a state of their own.
        """
        return not self.optimizer.state_is_on_disk and self.student.quantization == "none"

    def __post_init__(self) -> None:
        samples = self.sampling.num_samples
        if isinstance(self.objective, GRPOObjective):
            hint = "A completion's advantage is over the others of its prompt."
            require(samples >= 2, "sampling.num_samples", "at least 2 for grpo", samples, hint)
        if isinstance(self.weighting, IDAWeighting):
            is_possible = not isinstance(self.objective, GRPOObjective | OPSAObjective)
            rule = f"another than ida with objective.kind = {self.objective.kind}"
            hint = "It weighs by the advantage over the teacher."
            require(is_possible, "weighting.kind", rule, "ida", hint)
        if isinstance(self.weighting, PacedWeighting):
            hint = "With one sample a pass rate is 0 or 1, and every weight s(1 - s) is 0."
            require(samples >= 2, "sampling.num_samples", "at least 2 for paced", samples, hint)
        if not isinstance(self.engine, TransformersEngine):
            temperature, hint = self.sampling.temperature, "Or use engine.kind = transformers."
            is_one = temperature == 1
            require(is_one, "sampling.temperature", "1 with this engine", temperature, hint)
        self._require_teachers()
        hint = NOT_EVALUATED.get(self.teacher.kind, "")
        rule = f"false with teacher.kind = {self.teacher.kind}"
        require(not hint or not self.evaluation.teacher, "evaluation.teacher", rule, "true", hint)
        if isinstance(self.teacher, SelfTeacher):
            object.__setattr__(self, "teacher", self.teacher.of(self.student))
            self._require_self(self.teacher)
        require_counts("", self.__dict__, prompts_per_step=1)
        require_least("", self.__dict__, checkpoint_every=0, micro_batch_tokens=0)
        require_least("", self.__dict__, process_timeout_s=5)
        positive = ("num_steps", "micro_batch_size", "sampling_batch_size", "keep_checkpoints")
        for key in (*positive, "max_skipped_steps", "updates_per_step"):
            require_least("", self.__dict__, **{key: 1})
        is_possible = self.can_copy_checkpoints or self.checkpoint_writer != "thread"
        what = "auto or inline with adamw_on_disk or quantized weights"
        hint = "A thread writes from a copy in memory."
        require(is_possible, "checkpoint_writer", what, self.checkpoint_writer, hint)
        self._require_sharded()
        require_rollouts(self)
        require_measured(self)
        self._require_comparable_stops()
        if isinstance(self.teacher, TeacherConfig) and self.teacher.vocabulary == "aligned":
            self._require_alignable()
        updates, prompts, threads = self.updates_per_step, self.prompts_per_step, self.num_threads
        require(0 <= threads <= 1024, "num_threads", "from 0 to 1024", threads, "0 is torch's own.")
        hint = "Every update trains on the same number of prompts."
        is_even = prompts % updates == 0
        require(is_even, "prompts_per_step", f"a multiple of {updates} updates", prompts, hint)

    def _require_teachers(self) -> None:
        """What several teachers need, and what one of top-k log-probabilities allows."""
        for teacher in (self.teacher, *self.teachers.values()):
            if isinstance(teacher, LogprobServerTeacher):
                require_known_ids(teacher, self.objective, self.selection, self.weighting)
        column = self.data.teacher_column if isinstance(self.data, FileData) else None
        if not self.teachers:
            hint = "Add a table [teachers.NAME] for each name."
            require(
                column is None, "data.teacher_column", "left out with one teacher", column, hint
            )
            return
        hint = "It names the teacher of each prompt."
        require(column is not None, "data.teacher_column", "a column with teachers", column, hint)
        rule, hint = "false with teachers", "They supervise different prompts."
        require(not self.evaluation.teacher, "evaluation.teacher", rule, "true", hint)
        is_free, hint = not stores_teacher(self.rollouts), "States of one teacher are stored."
        require(is_free, "rollouts.teacher_states", "none with teachers", "another", hint)
        for name, teacher in (("", self.teacher), *self.teachers.items()):
            key = f"teachers.{name}" if name else "teacher"
            rule, hint = (
                "local or on a server with teachers",
                "It would be the teacher of some prompts alone.",
            )
            require(teacher.kind != "self", f"{key}.kind", rule, teacher.kind, hint)
            is_same = not isinstance(teacher, TeacherConfig) or teacher.vocabulary == "same"
            hint = "All teachers have the student's tokenizer."
            require(is_same, f"{key}.vocabulary", "same with teachers", "aligned", hint)
            rule, hint = "map or refuse with teachers", "A class is of one teacher's ids."
            require(teacher.stop_token != "class", f"{key}.stop_token", rule, "class", hint)
            hint = "Processes would wait for one another."
            for place, side in ((key, teacher), ("student", self.student)):
                rule = "none with teachers"
                require(side.sharding == "none", f"{place}.sharding", rule, side.sharding, hint)

    def _require_self(self, teacher: SelfTeacher) -> None:
        """What a student that is its own teacher can be."""
        rule, hint = "none with teacher.kind = self", "Its forward pass needs whole weights."
        sharding = self.student.sharding
        require(sharding == "none", "student.sharding", rule, sharding, hint)
        is_possible = not teacher.context or not isinstance(self.data, ConversationData)
        rule, hint = f"empty with data.kind = {self.data.kind}", "Only single answers have one."
        require(is_possible, "teacher.context", rule, repr(teacher.context), hint)
        rule, hint = "resident with an adapter", "Its frozen base is the student's own."
        is_possible = teacher.mode == "resident" or teacher.is_copied
        require(is_possible, "teacher.mode", rule, teacher.mode, hint)

    def _require_alignable(self) -> None:
        """What works with tokens of which the teacher has only some."""
        objective, key = self.objective, "teacher.vocabulary"
        is_shared = isinstance(objective, TopKObjective) and objective.support == "student"
        is_single = not isinstance(self.data, ConversationData)
        has_all = self.diagnostics == "all"
        for is_possible, what in (
            (is_shared, "objective.kind = topk with objective.support = student"),
            (self.teacher.stop_token == "class", "teacher.stop_token = class"),
            (is_single, "prompts that have single answers"),
            (has_all, "diagnostics = all"),
            (not self.evaluation.teacher, "evaluation.teacher = false"),
            (self.recording.every == 0, "recording.every = 0"),
            (not stores_teacher(self.rollouts), "rollouts.teacher_states = none"),
        ):
            hint = f"Set that, or {key} = same."
            require(is_possible, key, f"same without {what}", "aligned", hint)

    def _require_comparable_stops(self) -> None:
        """What sampled reports the log-probability of one id, the objective has that of a class."""
        rollouts, engine = self.rollouts, self.engine
        is_ahead = isinstance(engine, VLLMServer) and bool(engine.max_staleness)
        is_older = is_ahead or not isinstance(rollouts, LiveRollouts)
        is_possible = not (is_older and needs_sampler(self.objective))
        hint = "Older completions have the log-probabilities of single ids."
        rule = f"map or refuse with objective.kind = {self.objective.kind} and older completions"
        policy = self.teacher.stop_token
        require(is_possible or policy != "class", "teacher.stop_token", rule, policy, hint)

    def _require_sharded(self) -> None:
        """What works on the parts of weights that fsdp2 leaves with a process."""
        if self.student.sharding == "none":
            return
        kind, writer = self.optimizer.kind, self.checkpoint_writer
        rule, hint = (
            "adamw or adamw_on_disk with student.sharding = fsdp2",
            "Others need whole weights.",
        )
        require(kind in ("adamw", "adamw_on_disk"), "optimizer.kind", rule, kind, hint)
        rule, hint = (
            "auto or inline with student.sharding = fsdp2",
            "Every process writes its part.",
        )
        require(writer != "thread", "checkpoint_writer", rule, writer, hint)
