"""What each claim is taken to say: the differences it needs, fixed before the runs.

A claim about arms is a list of differences, each judged by one test of `claims_verdicts`. It gets
one verdict a setting and kind of loss, on all of its `differences` there. What stands in `beside`
is measured in the same way and shown, but does not count: what a reader has to know besides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from claims_arms import Loss, loss_of

METRICS = {
    "mean": ("mean@8", "points"),
    "pass": ("pass@8", "points"),
    "hidden_pass": ("hidden-start pass@8", "points"),
    "q3_kept_first": ("share of Q3 kept at step 1", "points"),
    "entropy": ("entropy", "nats"),
    "high_forward_kl": ("high forward KL", "nats"),
    "distinct": ("distinct", "completions"),
}
"""What a metric is called on the page, and its unit."""


@dataclass(frozen=True)
class Difference:
    """A metric of arm `a` minus that of arm `b`; positive speaks for the claim."""

    setting: str
    a: str
    b: str
    test: str
    metric: str = "mean"

    @property
    def label(self) -> str:
        return f"{METRICS[self.metric][0]}, {self.setting}: {self.a} minus {self.b}"

    @property
    def unit(self) -> str:
        return METRICS[self.metric][1]

    @property
    def group(self) -> str:
        """The setting and kind of loss that its verdict is about."""
        return group_of(self.setting, loss_of(self.a))


def group_of(setting: str, loss: Loss) -> str:
    """What a setting with a kind of loss is called."""
    return setting if loss == "exact" else f"{setting}, sampled loss"


Differences = tuple[Difference, ...]


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper and what it is taken to mean here."""

    text: str
    rule: str
    source: str
    """Who says so, and what was measured there."""
    differences: Differences = ()
    """Empty where no arms are compared: token scores and toys."""
    beside: Differences = ()


LEDGER = ("overconfident", "scarce")
"""The settings of the ledger task with a student that is often wrong."""
BROAD = (*LEDGER, "coins")
"""Settings in which claims about accuracy are judged, but for those of many budgets."""
WIDE = (*BROAD, "coins-small")
"""Settings of the claims about the rules that are compared most, gap and Soft-OR."""
VARIED = ("collapsed",)
"""Settings of claims about variety: a student whose entropy has collapsed."""
TOY, PROBED = "toy", "overconfident"
"""Groups of claims without arms: categoricals, and tokens of one student."""


def _each(
    settings: tuple[str, ...], a: str, b: str, test: str, metric: str = "mean"
) -> Differences:
    return tuple(Difference(setting, a, b, test, metric) for setting in settings)


def _sampled(differences: Differences) -> Differences:
    """The same arms with the sampled loss."""
    return tuple(replace(d, a=f"{d.a}+sampled", b=f"{d.b}+sampled") for d in differences)


def _both(
    settings: tuple[str, ...], a: str, b: str, test: str, metric: str = "mean"
) -> Differences:
    """With the exact loss and with the sampled one."""
    exact = _each(settings, a, b, test, metric)
    return exact + _sampled(exact)


def _lower(settings: tuple[str, ...], a: str, b: str, metric: str) -> Differences:
    """Where less of a metric speaks for arm `a`."""
    exact = tuple(Difference(setting, b, a, "beats", metric) for setting in settings)
    return exact + _sampled(exact)


_TIP, _EOPD = "TIP (arXiv 2604.14084)", "EOPD (arXiv 2603.07079)"
_DIAL = "DIAL-OPD (arXiv 2610.11659)"
_EARLIER = "Measured here before this benchmark"

CLAIMS: dict[str, Claim] = {
    "T1": Claim(
        "Entropy sampling at 50 % matches or beats all tokens.",
        "Sampling half of the tokens by entropy is as good as all.",
        f"{_TIP}: 78.6 against 76.7 for all tokens on MATH-500.",
        _each(BROAD, "entropy_sample-50", "all", "matches"),
    ),
    "T2": Claim(
        "Soft-OR is at least as good as entropy at equal budget.",
        "Soft-OR is at least as good as entropy: like with like, at all three budgets.",
        f"{_TIP}: 77.6 against 74.1 at 20 % on MATH-500, where Soft-OR keeps the highest scores "
        "and entropy is sampled.",
        tuple(
            d
            for how in ("", "_sample")
            for n in (50, 20, 10)
            for d in _each(LEDGER, f"soft_or{how}-{n}", f"entropy{how}-{n}", "matches")
        ),
    ),
    "T3": Claim(
        "Q3 at 10–20 % nearly matches all tokens and beats divergence at the same budget.",
        "Q3 alone nearly matches all tokens, and is better than plain divergence: both halves.",
        f"{_TIP}: 76.1 with 10 % against 76.7 for all tokens on MATH-500.",
        (
            *(d for n in (20, 10) for d in _each(LEDGER, f"q3-{n}", "all", "nearly")),
            *(d for n in (20, 10) for d in _each(LEDGER, f"q3-{n}", f"divergence-{n}", "beats")),
        ),
    ),
    "T4": Claim(
        "The bottom 50 % are worse than a random 50 %.",
        "The lowest half by Soft-OR is worse than a random half.",
        f"{_TIP}: 72.3 for the bottom half against 76.7 for all tokens on MATH-500; no random arm.",
        _each(BROAD, "random-50", "bottom-50", "beats"),
    ),
    "T5": Claim(
        "Entropy is blind to Q3; Soft-OR is not.",
        "Entropy overlooks Q3 and Soft-OR does not; at small budgets, where there is a choice.",
        f"{_TIP}, by its theory.",
        tuple(
            d
            for n in (20, 10)
            for a, b, test in (
                (f"soft_or-{n}", f"entropy-{n}", "beats"),
                (f"entropy-{n}", f"random-{n}", "is_blind"),
            )
            for d in _each(LEDGER, a, b, test, "q3_kept_first")
        ),
    ),
    "T6": Claim(
        "Soft-OR tells what a token is worth better than entropy or divergence alone.",
        "Soft-OR tells a token's worth better than either of its parts, however it is measured.",
        f"{_TIP}, by its theory; a later study finds a correlation with the squared gradient norm "
        "of 0.54 for divergence, 0.26 for Soft-OR and 0.11 for entropy.",
    ),
    "E1": Claim(
        "EOPD keeps the student's entropy and diversity.",
        "EOPD keeps entropy and diversity: both higher than without it, where they had collapsed.",
        f"{_EOPD}.",
        (
            *_both(VARIED, "eopd", "all", "beats", "entropy"),
            *_both(VARIED, "eopd", "all", "beats", "distinct"),
        ),
        _both(VARIED, "eopd", "all", "matches"),
    ),
    "E2": Claim(
        "EOPD lowers forward KL on tokens where the teacher's entropy is high.",
        "Lower forward KL where the teacher's entropy is high.",
        f"{_EOPD}.",
        _lower((*VARIED, *BROAD), "eopd", "all", "high_forward_kl"),
    ),
    "E3": Claim(
        "EOPD raises pass@8.",
        "Higher pass@8: of hidden starts where variety collapsed.",
        f"{_EOPD}: 50.74 against 48.35 (1.7B), 61.76 against 56.71 (4B). A re-run with 4B finds "
        "+0.30 (and −0.04 for the mean).",
        (
            *_both(VARIED, "eopd", "all", "beats", "hidden_pass"),
            *_both(BROAD, "eopd", "all", "beats", "pass"),
        ),
    ),
    "E4": Claim(
        "One-sample reverse KL oscillates more under a high-entropy teacher.",
        "More top-1 changes under a flat teacher than under a peaked one, at every rate tried.",
        f"{_EOPD}: about 84 changes a step against 7.",
    ),
    "E5": Claim(
        "The renormalised top-k is biased on flat teachers; a tail bucket cures it.",
        "The renormalised top-k moves away from a flat teacher; the tail removes half of that.",
        "What follows from EOPD's published loss; no paper's claim.",
    ),
    "D1": Claim(
        "The 20–40 % of tokens with the largest probability gap beat all tokens.",
        "Ahead of all tokens at both budgets. The paper's loss is the sampled one.",
        f"{_DIAL}: 19.9 and 24.7 with 20 and 40 % against 19.4 for all tokens (0.6B from 4B, mean "
        "of seven benchmarks, one seed); ahead in 8 of 8 cells.",
        tuple(d for n in (20, 40) for d in _both(WIDE, f"probability_gap-{n}", "all", "beats")),
        _each(BROAD, "log_gap-20", "all", "beats"),
    ),
    "D2": Claim(
        "TIP's Soft-OR at 20–40 % does not beat all tokens.",
        "All tokens match Soft-OR at both budgets. The paper's loss is the sampled one.",
        f"{_DIAL}'s re-run of TIP: 16.3 and 18.8 against 19.4 (0.6B from 4B, one seed); behind in "
        "7 of 8 cells.",
        tuple(d for n in (20, 40) for d in _both(WIDE, "all", f"soft_or-{n}", "matches")),
    ),
    "D3": Claim(
        "Soft-OR is no better than as many random tokens.",
        "Random tokens match Soft-OR at both budgets; contradicted where Soft-OR is certainly more "
        "than 2 points ahead.",
        "CROP: 45.98 for 10 % random tokens against 46.06 for TIP's. DIAL-OPD's re-run has Soft-OR "
        "ahead at 20 % in 4 of 4 cells.",
        tuple(d for n in (20, 40) for d in _both(WIDE, f"random-{n}", f"soft_or-{n}", "matches")),
    ),
    "D4": Claim(
        "The probability gap beats Soft-OR at equal budget.",
        "Ahead of Soft-OR at both budgets. The paper's loss is the sampled one.",
        f"{_DIAL}: 19.9 against 16.3 at 20 %, 24.7 against 18.8 at 40 % (0.6B from 4B, one seed).",
        tuple(
            d
            for n in (20, 40)
            for d in _both(WIDE, f"probability_gap-{n}", f"soft_or-{n}", "beats")
        ),
    ),
    "I1": Claim(
        "The 1 % of tokens with the largest influence match all tokens.",
        "One token of each completion, chosen by influence joined with Soft-OR, is as good as all. "
        "Influence is the share of signal in the sampled gradient ([equations](../equations.md)); "
        "the paper's quoted denominator can be negative.",
        "IER-OPD (arXiv 2609.24432): budgets of 0.1 to 1 % match all tokens.",
        _both(BROAD, "influence-1", "all", "matches"),
        (
            *_both(LEDGER, "influence-10", "all", "matches"),
            *_both(BROAD, "influence-1", "random-1", "beats"),
            *(
                d
                for form in ("rank", "and", "teachability")
                for d in _each(BROAD, f"influence_{form}-1", "all", "matches")
            ),
        ),
    ),
    "S1": Claim(
        "The one token of extreme advantage matches all tokens and beats a random one.",
        "One token of each completion, of the largest or of the smallest log q − log p: each as "
        "good as all, and better than one random token. One at each end stand beside.",
        "Sparse OPD (arXiv 2609.04565): 30.1 and 28.9 for one token of either end against 27.5 "
        "for all and 15.6 for one random token.",
        tuple(
            d
            for end in ("max", "min")
            for b, test in (("all", "matches"), ("random-1", "beats"))
            for d in _both(BROAD, f"extreme_{end}-1", b, test)
        ),
        _each(BROAD, "extreme_advantage-1", "all", "matches"),
    ),
    "O1": Claim(
        "Sharpening without a teacher reaches what distillation does.",
        "The 20 % of tokens with the lowest probability, trained without a teacher, match all "
        "tokens with the sampled loss.",
        "OPSA (arXiv 2608.31046): 48.9 against 32.1 for distillation on AIME24.",
        _each(BROAD, "opsa-20", "all+sampled", "matches"),
        (
            *_both(BROAD, "lowest_logprob-20", "all", "matches"),
            *_both(BROAD, "lowest_logprob-20", "random-20", "beats"),
        ),
    ),
    "O2": Claim(
        "Part of what distillation gains is sharpening.",
        "Trained without a teacher, the student is better than at the start.",
        "OPSA (arXiv 2608.31046).",
        _each(BROAD, "opsa-20", "start", "beats"),
    ),
    "F1": Claim(
        "Stored rollouts of the initial student are no worse than live ones.",
        "Completions drawn once, before the first step, match those of each step's student. With "
        "the sampled loss the advantages are recomputed with each step's student.",
        "Semi-OPD (arXiv 2610.11291): ahead of live rollouts in 14 of 17 pairs.",
        _both(BROAD, "stored", "all", "matches"),
    ),
    "A1": Claim(
        "IDA weights raise pass@8.",
        "Higher pass@8 than without the weights: of hidden starts where variety collapsed.",
        "IDA-OPD (arXiv 2608.29846): pass@16 of 83.3 against 79.1.",
        (
            *_each(BROAD, "ida+sampled", "all+sampled", "beats", "pass"),
            *_each(VARIED, "ida+sampled", "all+sampled", "beats", "hidden_pass"),
        ),
    ),
    "R1": Claim(
        "TrOPD beats on-policy distillation and EOPD.",
        "Ahead of all tokens with the sampled loss and of EOPD as published: both halves. Its "
        "forward KL is renormalised; with a tail bucket, and without prefixes, beside.",
        "TrOPD (arXiv 2606.01249): 51.7 against 48.3 and 48.9.",
        (
            *_each(BROAD, "tropd", "all+sampled", "beats"),
            *_each(BROAD, "tropd", "eopd+sampled", "beats"),
        ),
        (
            *_each(BROAD, "tropd-tail", "all+sampled", "beats"),
            *_each(BROAD, "tropd-live", "all+sampled", "beats"),
        ),
    ),
    "P1": Claim(
        "At 3 % Soft-OR is worse than random tokens.",
        "Random tokens are ahead of Soft-OR with one token of each completion.",
        f"{_EARLIER} (24 steps, untuned rate, three seeds): 18 to 29 points against 37 to 57.",
        _each(LEDGER, "random-3", "soft_or-3", "beats"),
    ),
    "P2": Claim(
        "The student's own log-probability finds better tokens than its entropy or chance.",
        "The 10 % of tokens with the lowest probability are ahead of entropy's and of random ones.",
        f"{_EARLIER} (24 steps, untuned rate): 77 to 83 points against 63 for entropy and 59 to "
        "70 for random tokens.",
        (
            *_each(LEDGER, "lowest_logprob-10", "entropy-10", "beats"),
            *_each(LEDGER, "lowest_logprob-10", "random-10", "beats"),
        ),
    ),
    "P3": Claim(
        "Two sampled log-probabilities carry nearly what whole distributions do.",
        "10 % of the tokens by probability gap nearly match the same share by divergence.",
        f"{_EARLIER} (24 steps, untuned rate, three seeds): 87 to 91 points against 90 to 91.",
        _each(LEDGER, "probability_gap-10", "divergence-10", "nearly"),
    ),
    "P4": Claim(
        "At 10 % entropy is no better than random tokens.",
        "Random tokens match entropy's at 10 %.",
        f"{_EARLIER} (24 steps, untuned rate, five seeds): 53.4 and 53.4.",
        _each(LEDGER, "random-10", "entropy-10", "matches"),
    ),
    "P5": Claim(
        "Q3 has no advantage over plain divergence, nor Soft-OR over Q3, at 10 %.",
        "Divergence matches Q3, and Q3 matches Soft-OR: both halves.",
        f"{_EARLIER} (24 steps, untuned rate, five seeds): 84.4, 84.4 and 75.8.",
        (
            *_each(LEDGER, "divergence-10", "q3-10", "matches"),
            *_each(LEDGER, "q3-10", "soft_or-10", "matches"),
        ),
    ),
}


def arms_of_claims() -> dict[str, tuple[str, ...]]:
    """The arms by setting that a verdict, or what stands beside it, is about."""
    found: dict[str, dict[str, None]] = {}
    for claim in CLAIMS.values():
        for difference in (*claim.differences, *claim.beside):
            arms = found.setdefault(difference.setting, {})
            arms |= dict.fromkeys((difference.a, difference.b))
    return {setting: tuple(arms) for setting, arms in found.items()}
