"""Where the teacher's numbers come from, as configuration: one class for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from tutelage.config.bounds import STRICT, require
from tutelage.config.method import (
    EOPDObjective,
    GRPOObjective,
    ObjectiveConfig,
    OPSAObjective,
    SampledObjective,
    SelectKDWeighting,
    TopKObjective,
    TrOPDObjective,
    WeightingConfig,
)
from tutelage.config.models import TeacherConfig, TeacherMode, UnsharedTeacher
from tutelage.config.selection import SelectionConfig
from tutelage.config.self_teacher import SelfTeacher


class ServerTeacher(UnsharedTeacher):
    """What kinds on servers have in common: every process asks for its own rows."""

    url: str | tuple[str, ...]
    timeout_s: float

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses as a list."""
        return (self.url,) if isinstance(self.url, str) else self.url

    @property
    def mode(self) -> TeacherMode:
        """What is here of it stays on the device."""
        return "resident"

    @property
    def quantization(self) -> Literal["none"]:
        """Of what is here of it."""
        return "none"

    def require_reachable(self) -> None:
        """Refuses a table without an address, or with a time that none can answer in."""
        hint = "Add one."
        require(any(self.urls), "teacher.url", "at least one address", list(self.urls), hint)
        seconds, hint = self.timeout_s, "600 is usual."
        require(1 <= seconds <= 86400, "teacher.timeout_s", "from 1 to 86400", seconds, hint)


@dataclass(frozen=True)
class HiddenServerTeacher(ServerTeacher):
    """A teacher on a server, which answers token ids with final hidden states.

    Prompts and completions leave this machine as token ids. Of the model itself only the head and
    the tokenizer are loaded here, so that everything over the whole vocabulary stays exact.
    """

    __pydantic_config__ = STRICT
    kind: Literal["hidden_server"]
    model: str
    """Folder or hub id of the model that is served; its head and tokenizer are loaded from it."""
    url: str | tuple[str, ...]
    """Address of a server of that model, such as http://host:8100, or a list of several that share
    the requests; a key comes from TUTELAGE_API_KEY."""
    server: Literal["tutelage", "vllm"] = "tutelage"
    """What answers there: `tutelage serve-teacher`, or vLLM's pooling endpoint."""
    served_name: str = ""
    """Name of the model at a vLLM server; "" where it is `model`."""
    logprob_url: str = ""
    """Address of a vLLM server of the same model that gives log-probabilities, with which hidden
    states of a vLLM server are compared; "" compares them with nothing."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights on the server, and of the head here."""
    payload: Literal["float32", "bfloat16"] = "float32"
    """Dtype of hidden states on their way; bfloat16 halves them, and is exact for a model in
    bfloat16."""
    num_concurrent: int = 0
    """Requests to one server at the same time, each with a part of a micro-batch's sequences; 0 is
    1 for tutelage, which then computes what a local teacher would, and for vllm 64, of one sequence
    each."""
    timeout_s: float = 600.0
    """Seconds for one request, all tries together."""
    hidden_budget_bytes: int = 4 << 30
    """Hidden states of one step kept in main memory; more go to a file in the run folder."""
    stop_token: Literal["map", "class", "refuse"] = "map"
    """As for a local teacher."""

    def __post_init__(self) -> None:
        self.require_reachable()
        for name in ("served_name", "logprob_url"):
            is_used, hint = self.server == "vllm", "Models are compared by checksums."
            rule = "left out with teacher.server = tutelage"
            require(
                is_used or not self.__dict__[name],
                f"teacher.{name}",
                rule,
                self.__dict__[name],
                hint,
            )
        count, hint = self.num_concurrent, "0 is usual."
        require(0 <= count <= 256, "teacher.num_concurrent", "from 0 to 256", count, hint)
        budget, hint = self.hidden_budget_bytes, "0 writes all hidden states to disk."
        require(budget >= 0, "teacher.hidden_budget_bytes", "at least 0", budget, hint)


@dataclass(frozen=True)
class LogprobServerTeacher(ServerTeacher):
    """A teacher on a server that gives the likeliest ids of each token and their log-probabilities.

    Prompts and completions leave this machine as token ids. All other ids share one bucket, so an
    objective is one of buckets (`topk`, EOPD's top-k forms, `tropd`) or of the sampled token;
    divergences that are logged are lower bounds.
    """

    __pydantic_config__ = STRICT
    kind: Literal["logprob_server"]
    model: str
    """Folder or hub id of the model that is served; its tokenizer is loaded from it."""
    url: str | tuple[str, ...]
    """Address of a server of that model without a path, such as http://host:8000, or a list of
    several that share the requests; a key comes from TUTELAGE_API_KEY."""
    served_name: str = ""
    """Name of the model at the server; "" where it is `model`."""
    api: Literal["vllm", "completions", "sglang"] = "vllm"
    """How the server is asked: vLLM's prompt_logprobs; OpenAI's completions with echo and logprobs,
    which other servers have too; or SGLang's own /generate."""
    num_logprobs: int = 20
    """Ids of each token that the server is asked for, the k of its top k; vLLM gives up to 20
    unless it was started with more (--max-logprobs), others may give 5."""
    num_concurrent: int = 16
    """Sequences that one server is asked for at the same time."""
    timeout_s: float = 600.0
    """Seconds for one sequence, all tries together."""
    stop_token: Literal["map", "refuse"] = "map"
    """Where student and teacher end a text with different ids: map exchanges them for the teacher,
    refuse ends the run."""

    @property
    def dtype(self) -> Literal["float32"]:
        """Of its log-probabilities."""
        return "float32"

    @property
    def hidden_budget_bytes(self) -> int:
        """It has no hidden states."""
        return 0

    def __post_init__(self) -> None:
        self.require_reachable()
        count, hint = self.num_logprobs, "20 is what vLLM gives."
        require(1 <= count <= 1024, "teacher.num_logprobs", "from 1 to 1024", count, hint)
        count, hint = self.num_concurrent, "16 is usual."
        require(1 <= count <= 256, "teacher.num_concurrent", "from 1 to 256", count, hint)


NEED_ALL_IDS = ("teachability", "gradient_norm", "local_oracle", "local_gain", "influence")
"""Selection rules that look at the teacher's probability of every id."""


def require_known_ids(
    teacher: LogprobServerTeacher,
    objective: ObjectiveConfig,
    selection: SelectionConfig,
    weighting: WeightingConfig,
) -> None:
    """Refuses a method that needs what a teacher of top-k log-probabilities does not give."""
    num = teacher.num_logprobs
    given = f"with teacher.kind = 'logprob_server', which gives {num} ids of each token"
    hint = "A local teacher or a hidden_server has all."
    instead = (
        'Use kind = "topk" with its tail bucket, "sampled", "tropd", or "eopd" with estimator = '
        '"sampled" and fkl = "topk_tail".'
    )
    kinds = (
        *(TopKObjective, SampledObjective, EOPDObjective, TrOPDObjective),
        *(GRPOObjective, OPSAObjective),
    )
    known = f"topk, sampled, eopd, tropd, grpo or opsa {given}"
    require(isinstance(objective, kinds), "objective.kind", known, objective.kind, instead)
    if isinstance(objective, GRPOObjective):
        key, weight = "objective.distillation_weight", objective.distillation_weight
        require(weight == 0, key, f"0 {given}", weight, hint)
    if isinstance(objective, TopKObjective):
        side = objective.support
        require(side == "teacher", "objective.support", f"teacher {given}", side, hint)
    if isinstance(objective, EOPDObjective):
        for key, wanted in {"estimator": ("sampled",), "fkl": ("topk_tail", "topk_renorm")}.items():
            value = objective.__dict__[key]
            rule = f"{' or '.join(wanted)} {given}"
            require(value in wanted, f"objective.{key}", rule, value, instead)
        rule, gate = f"hard {given}", objective.gate
        require(gate == "hard", "objective.gate", rule, gate, "It opens at a bound of the entropy.")
    if isinstance(objective, TopKObjective | EOPDObjective | TrOPDObjective):
        rule = f"at most teacher.num_logprobs = {num}"
        require(objective.k <= num, "objective.k", rule, objective.k, "Raise teacher.num_logprobs.")
    rule = f"another than {', '.join(NEED_ALL_IDS)} {given}"
    require(selection.rule not in NEED_ALL_IDS, "selection.rule", rule, selection.rule, hint)
    if isinstance(weighting, SelectKDWeighting):
        rule, key = "at least 5 with weighting.kind = selectkd", "teacher.num_logprobs"
        require(num >= 5, key, rule, num, "It needs the teacher's five likeliest ids.")


AnyTeacher: TypeAlias = Annotated[
    TeacherConfig | HiddenServerTeacher | LogprobServerTeacher | SelfTeacher,
    Field(discriminator="kind"),
]
"""The kinds of `[teacher]`; a table without a kind is local."""
SERVED_KINDS = ("hidden_server", "logprob_server")
"""Kinds whose model is not here, so that it gives no completions of its own."""
NOT_EVALUATED = dict.fromkeys(SERVED_KINDS, "Its model is not here.") | {
    "self": "Its completions would be the student's own."
}
"""Kinds that an evaluation leaves out, and why."""
