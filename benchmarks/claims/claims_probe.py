"""Measurements that train no student: what a token is worth, and the two toys of EOPD."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from tutelage.config.schema import Config
from tutelage.core import LazyLogits, TokenStats, composite_objective, importance, quadrants
from tutelage.core.counter import counter_uniform
from tutelage.core.divergence import forward_kl, reverse_kl
from tutelage.core.entropy import entropy
from tutelage.core.rules import RULES
from tutelage.core.terms import ForwardKL, SampledReverseKL, Term, TopKForwardKL
from tutelage.data.batch import collate, micro_batches
from tutelage.data.types import Rollout
from tutelage.models.tokenizers import pad_id
from tutelage.rollout.request import RolloutRequest
from tutelage.rollout.sampler import TransformersSampler
from tutelage.setup.components import Components
from tutelage.train.distributed import StepRows

SCORES = (
    *("random", "entropy", "soft_or", "q3", "divergence", "forward_divergence"),
    *("teachability", "gradient_norm", "local_oracle", "local_gain"),
)
"""Rules whose scores are correlated with the value of a token; `random` is the control."""
PROBE_PROMPTS = 24

VOCABULARY = 100
NUM_CATEGORICALS = 64
FLAT, PEAKED = 0.5, 5.0
"""Standard deviation of the toy teachers' logits, nats: entropy about 4.48 and about 1.2."""
OSCILLATION_STEPS = 400
BURN_IN_STEPS = 200
"""Until then the student still finds its way; changes after it are oscillation alone."""
OSCILLATION_RATES = (0.3, 1.0, 3.0, 10.0)
"""The paper's is unknown, so several are tried and all are reported."""
BIAS_STEPS = 300
BIAS_RATE = 10.0

Values = dict[str, list[float]]


def score(
    components: Components, rollouts: Sequence[Rollout], extras: Sequence[str] = ()
) -> StepRows:
    """All tokens of rollouts with their statistics, by rollout and position."""
    stats, completion, position, tokens = [], [], [], []
    for batch in micro_batches(rollouts, 64, pad_id(components.tokenizer)):
        teacher = components.teacher.to_device(components.teacher.forward(batch))
        stats.append(components.student(batch, teacher, extras=extras))
        completion.append(batch.completion)
        position.append(batch.position)
        tokens.append(batch.tokens)
    places = torch.cat(completion), torch.cat(position)
    order = (places[0] * (1 + places[1].max()) + places[1]).argsort()
    return StepRows(
        TokenStats.cat(stats)[order],
        places[0][order],
        places[1][order],
        torch.arange(len(order)),
        torch.cat(tokens)[order],
    )


def probe(components: Components, config: Config, num_tokens: int) -> dict[str, Values]:
    """Scores of randomly drawn tokens of one batch, and what learning each of them alone gives.

    `gradient` is the squared norm of the gradient g of one token's reverse KL over all parameters.
    `decrease` is g·G, G being the gradient of the batch's mean reverse KL: by how much that mean
    falls, per unit of learning rate, in one small gradient step on the token alone.
    """
    prompts = components.task.prompts(0, PROBE_PROMPTS, config.seed)
    seed = (config.seed, 1)
    sampler = TransformersSampler(components.student.model, components.tokenizer, PROBE_PROMPTS)
    rollouts = sampler.sample(RolloutRequest(prompts, config.sampling, seed))
    extras = tuple(dict.fromkeys(name for rule in SCORES for name in RULES[rule].extras))
    rows = score(components, rollouts, extras)
    stats, completion, position = rows.stats, rows.completion, rows.position
    uniform = counter_uniform((config.seed, 2), completion, position)
    drawn = uniform.argsort()[:num_tokens].sort().values
    noise = counter_uniform((config.seed, 3), completion, position)
    values = {rule: importance(stats, rule, uniform=noise)[drawn].tolist() for rule in SCORES}
    places = [(int(completion[i]), int(position[i])) for i in drawn.tolist()]
    whole = [(row, slice(None)) for row in range(len(rollouts))]
    mean = sum(_token_gradient(components, rollouts, *place) for place in whole) / len(stats)
    gradients = (_token_gradient(components, rollouts, *place) for place in places)
    worth = [(float(g.square().sum()), float(g @ mean)) for g in gradients]
    cuts = config.quadrant_thresholds
    return {
        "tokens": {
            **values,
            "gradient": [gradient for gradient, _ in worth],
            "decrease": [decrease for _, decrease in worth],
            "quadrant": quadrants(stats.entropy, stats.reverse_kl, cuts)[drawn].tolist(),
        }
    }


def _token_gradient(
    components: Components, rollouts: Sequence[Rollout], completion: int, position: int | slice
) -> Tensor:
    """Gradient of the reverse KL of some tokens of a completion over all parameters, float64."""
    student, teacher = components.student, components.teacher
    batch = collate([rollouts[completion]], pad_id(components.tokenizer))
    rows = torch.arange(batch.num_rows)[position].reshape(-1)
    objective = student(batch, teacher.to_device(teacher.forward(batch)), rows)
    parameters = [p for p in student.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(objective.total, parameters)
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def oscillation(seed: int) -> dict[str, float]:
    """Top-1 changes per step of 100 categoricals under one-sample reverse-KL policy gradient.

    Flat and peaked teachers; the same start, rates and number of steps. `changes` counts all
    steps, `late` those after the burn-in.
    """
    start = _normal(seed, 0) * FLAT
    found = {}
    for name, scale in (("flat", FLAT), ("peaked", PEAKED)):
        teacher = _normal(seed, 1) * scale
        found[f"teacher_entropy_{name}"] = float(entropy(teacher.log_softmax(-1)).mean())
        for rate in OSCILLATION_RATES:
            changes = _top1_changes(start, teacher, rate, seed)
            found[f"changes_{name}_{rate}"] = fmean(changes)
            found[f"late_{name}_{rate}"] = fmean(changes[BURN_IN_STEPS:])
    return found


def _top1_changes(logits: Tensor, teacher: Tensor, rate: float, seed: int) -> list[float]:
    """Changes among 100 categoricals of every step."""
    rows = torch.arange(len(logits))
    changes = []
    for step in range(OSCILLATION_STEPS):
        log_p = logits.log_softmax(-1)
        uniform = counter_uniform((seed, 4, step), rows)
        tokens = torch.searchsorted(log_p.exp().double().cumsum(-1), uniform[:, None]).squeeze(1)
        tokens = tokens.clamp(max=VOCABULARY - 1)
        old = log_p.gather(-1, tokens[:, None]).squeeze(1)
        term = SampledReverseKL(tokens, old)
        best = logits.argmax(-1)
        logits = logits - rate * _gradient(logits, teacher, term)
        changes.append(100 * float((logits.argmax(-1) != best).double().mean()))
    return changes


def bias(seed: int) -> dict[str, float]:
    """Entropy and both KLs after descending three forms of forward KL to flat teachers, nats."""
    start, teacher = _normal(seed, 0) * 0.7, _normal(seed, 1) * FLAT
    forms: dict[str, Term] = {
        "full": ForwardKL(),
        "tail": TopKForwardKL(16, tail=True),
        "renorm": TopKForwardKL(16, tail=False),
    }
    found = {"teacher_entropy": float(entropy(teacher.log_softmax(-1)).mean())}
    found |= _distances("start", start, teacher)
    for name, term in forms.items():
        logits = start.clone()
        for _ in range(BIAS_STEPS):
            logits = logits - BIAS_RATE * _gradient(logits, teacher, term)
        found |= _distances(name, logits, teacher)
    return found


def _distances(name: str, logits: Tensor, teacher: Tensor) -> dict[str, float]:
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
    figures = {
        "entropy": entropy(log_p),
        "forward_kl": forward_kl(log_p, log_q),
        "reverse_kl": reverse_kl(log_p, log_q),
    }
    return {f"{figure}_{name}": float(x.mean()) for figure, x in figures.items()}


def _gradient(logits: Tensor, teacher: Tensor, term: Term) -> Tensor:
    """Gradient of the sum of a term over independent categoricals, through the fused objective."""
    hidden, identity = logits.detach().requires_grad_(True), torch.eye(VOCABULARY)
    sides = LazyLogits(hidden, identity), LazyLogits(teacher, identity)
    total = composite_objective(*sides, [(term, 1.0)]).total
    return torch.autograd.grad(total, hidden)[0]


def _normal(seed: int, stream: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + stream)
    return torch.randn(NUM_CATEGORICALS, VOCABULARY, generator=generator)
