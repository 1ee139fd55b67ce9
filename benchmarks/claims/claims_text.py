"""What the claims page says in words that no number changes."""

from __future__ import annotations

CAVEATS = """\
## Read this first

* **Q3 is made, in both tasks.** The overconfident student of the ledger task was trained on wrong
  arithmetic until its entropy there was low. That of the coins task has its teacher's architecture
  and was trained from random weights on texts of which 60 % pay carelessly and are mostly wrong in
  their last coin: {q3}.
  These tokens are the best case of rules that look for them. `coins-small`, a narrower student of
  two layers, was not made so: its training was stopped early.
* **Small students are best cases.** Those of the ledger task are copies of the teacher, damaged by
  a minute of training. Real pairs are not so close.
* **This says nothing about large models.** These are synthetic tasks, models below a million
  parameters and a few hundred rollouts. A verdict here is about the claim on these tasks; it
  neither confirms nor refutes what anybody measured elsewhere.
* **Learning rates are tuned on the all-token arms alone**, one for the exact loss and one for the
  sampled loss of every setting, on held-out prompts that no arm is judged on, and shared by all
  arms of the setting and loss. A rule with a rate of its own could do better; half and double are
  shown below. OPSA, TrOPD and IDA take the rate of the sampled loss.
* **"Cannot tell" is said where a verdict would be empty.** An arm that learns nothing matches all
  tokens where these gain at most 2 points over the start (*nothing to lose*), and no arm beats a
  pass@8 of at least 90 % (*saturated*).
* **"Not supported" is of several kinds.** *A part contradicted*: a claim that needs several
  comparisons has one that is contradicted beside another that is supported; whoever reads the claim
  as all of its parts may read this as contradicted. The others are told apart in the column
  *reading*. *A tie* and *not ahead* were measured: the interval leaves no room for a gain of
  {resolution}. *Worse, perhaps by less than the margin*: the interval of *matches* or *nearly* lies
  below 0 and not wholly below the margin. *Too noisy to say* means that the interval is wider than
  the margin which decides: the seeds are too few. *At the limit*: narrower than that margin, and
  across the limit.
* **Many comparisons are made.** {num_verdicts} verdicts are given, {decided} of them *supported* or
  *contradicted here*, on {judged} comparisons; the tables of arms hold {listed} more differences.
  None is corrected for their number. By the rates of [arms compared with
  themselves](#false-verdicts), if no two arms differed, {false}. *Supported* needs all comparisons
  of a setting, which errs on the strict side; *contradicted here* needs one. A pair picked from the
  tables afterwards has no such protection.
* **The rules of the verdicts were fixed before the runs**, in
  `benchmarks/claims/claims_rules.py` and `claims_verdicts.py`; their history and the commit below
  show it. Three things were changed after cells of an earlier run, whose verdicts were known, and
  before these: the rate of `collapsed` has to keep its accuracy with the worst of five tuning seeds
  instead of the mean of two, which it had not kept with four of the five seeds that counted; the
  judged problems of `coins` are different purchases, and rates are tuned on others; `influence`
  ranks tokens of equal score by the sum of their parts, not by rounding. S1 is about one token
  since, as its source is, and forms of rules stand beside D1, I1, S1 and R1. Earlier runs were
  discarded or replaced, because the harness did not train as `tutelage train` does; a test now
  compares the two to the last bit (`experiments/LOG.md`)."""

METHOD = """\
## How it was measured

All arms of a setting, loss and seed share starting weights, prompts of every step and the random
numbers of sampling; they differ in the method alone. They take equal numbers of steps, so arms that
keep fewer tokens train on fewer. `extreme_advantage` keeps half of a budget at each end, rounded
down, and at least one token: with a budget of one token it trains on two. *Sampled loss*: the
policy gradient of the sampled token alone instead of the divergence over the whole vocabulary
(`+sampled`). Every arm is measured on the same {problems} held-out problems with {samples}
completions each at temperature 1, and has {seeds}.

* **mean@8, pass@8**: a completion is right only if every step of it is.
* **hidden start**: of the right completions only those count that begin with one particular item,
  which the prompt does not tell. pass@8 then does not saturate: a student whose completions all
  begin with one item solves one problem in five.
* **distinct**: different right completions per problem among 8.
* **reverse KL, forward KL, entropy**: nats, means over the tokens of the student's own completions
  of the held-out problems; *high* forward KL: only where the teacher's entropy is at least 0.8.
* **KL kept**: share of the batch's reverse KL on the kept tokens, mean over steps. Where it is
  100 % at 50 %, rules differ only in which solved tokens they add.
* **Q3**: entropy at most 0.5 and reverse KL above 0.5 nats; kept share at the first step.
* **stored**: the completions of all steps are drawn once, by the student before the first step.
  With the sampled loss the advantages are those of each step's student, and there is no ratio to
  the probabilities that the tokens were drawn with (`objective.old_logprobs = "step"`).
* **opsa-20** trains the 20 % of tokens with the lowest probability without a teacher. **tropd** has
  the forward KL over the teacher's 64 likeliest ids, renormalised (its source does not say whether
  it is; **tropd-tail** has a tail bucket), and the teacher samples the first tokens of completions
  in the first half of the steps, a quarter of their usual length at first. The paper also trains on
  these tokens; this does not. The ledger's vocabulary has 38 ids, so that the forward KL is whole
  there. **tropd-live** has no such first tokens.
* Forms of rules beside those that are judged: **log_gap** is the probability gap with b = 0,
  **influence_rank**, **influence_and** and **influence_teachability** are influence by its rank
  alone, by Soft-AND, and with TA-OPD's usefulness; **extreme_advantage** keeps a token at each end.
* **Intervals** are 95 %: the wider, on either side, of a bootstrap over seeds and problems at once
  and Student's t over the means of seeds; for correlations the wider of a bootstrap over seeds and,
  within them, tokens, and of Student's t over the seeds' correlations, moved to the correlation of
  all tokens and cut at what is possible. Differences are paired by seed and problem.

A comparison is *supported* or *contradicted* by one of four tests: **beats** (interval above or
below 0), **matches** (interval above −2 points, or wholly below), **nearly** (at most 2 points
below and the interval above −3 points; contradicted if wholly below −2) and **is_blind** (at most 5
points above chance). In a setting and loss a claim is supported when all of its comparisons are,
contradicted here when at least one is contradicted and none supported, and not supported otherwise.
What stands *beside* a claim is measured and judged likewise and does not count."""

CUT = """\
## What was cut

No verdict rests on these, and earlier runs had them: the student `ledger-small`, which no arm
improved; the arms of `teachability`, `gradient_norm`, `local_oracle` and `local_gain` (their scores
are compared with [what a token is worth](#what-a-token-is-worth)), `q3` and `divergence` at 50 %,
EOPD on kept tokens and with a tail bucket; in `collapsed` all arms but those of claims about
variety. In `coins`, whose cells take longest, T2, T3, T5 and P1 to P5 are not asked; in
`coins-small` D1 to D4 alone are. Half and double the rate were run for few arms,
with {seeds} seeds."""

SETTINGS = {
    "overconfident": "The ledger task with a student whose wrong sums have low entropy.",
    "scarce": "The same student with so few prompts and steps that pass@8 cannot reach 1. (Longer "
    "ledgers are none: the teacher was trained on at most five items and fails on six.)",
    "coins": "A second task of another kind: pay an amount with coins, asked in sentences. The "
    "student is no damaged copy of its teacher; most texts that it was trained on are careless.",
    "coins-small": "The coins task with a student of another architecture, narrower and of two "
    "layers, whose training was stopped early. For claims about the gap and Soft-OR.",
    "collapsed": "A student of the ledger task whose completions are right and all in one order, "
    "for claims about variety.",
}
