"""What the page of claims_lm.py says in words that no number changes."""

from __future__ import annotations

CHANGES = (
    "Changed since, with cells known: the t-interval over the seeds became a part of the intervals "
    "(the bootstrap of three seeds is too narrow) and *cannot tell* a verdict, which make verdicts "
    "stricter; D3 is about twice as many random tokens, which is what was compared, and D5 about "
    "few; stored rollouts with the sampled loss recompute their advantages; OPSA has a rate of its "
    "own, for it had that of the sampled loss. The arms of T1, T3, E3 and I1 were added to what a "
    "CPU runs when the verdicts of the other claims were known, which these arms have no part in. "
    "Nine older cells, all of Soft-OR among them, were run again by the "
    "newer source with equal weights. The trained cells of a first version of this page were "
    "withdrawn: gradients were summed over the steps of a cell (`experiments/LOG.md`). "
)


HOW = """## How to continue

Cells may be run in any order, on any machine; the JSON is written after every cell and is all that
a later run needs beside the pair.

* On a CPU, one thread: `make claims-lm` builds the pair of stories (under an hour) and runs its
  cells, one in about three minutes of one core; `MINUTES=60` ends it earlier. Cells belong to the
  weights of their pair and to its texts of another kind: a pair that was built on another kind of
  machine, or another `OTHERS`, begins anew.
* On a GPU, all arms, more steps, problems and seeds: `make claims-lm DEVICE=cuda MINUTES=9`, with
  `PAIR=FOLDER` for the pair of GSM8K (`scripts/build_lm_pair.py --task gsm8k`).
* `OTHERS=FILE` names JSON lines whose `problem` is a text of another kind, for the loss on other
  texts (here problems of GSM8K). `claims_lm.py --merge FILE` takes over another machine's cells.
* A cell that other code made is run again; check out the commit above, or give `--any-source`. One
  of another configuration (`claims_lm.toml`, sizes, settings of its arm) is always run again.
* `claims_lm.py --pair FOLDER --verify 2` runs cells again and compares all numbers."""
