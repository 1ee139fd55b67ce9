"""TIP's four quadrants of the (entropy, divergence) plane, and what lies in each of them."""

from __future__ import annotations

from torch import Tensor

from tutelage.core.rules import quantile


def quadrants(
    entropy: Tensor, divergence: Tensor, thresholds: str | tuple[float, float] = "median"
) -> Tensor:
    """TIP's quadrant of every row, 1 to 4.

    Q1 both high, Q2 high entropy, Q3 high divergence, Q4 both low; high means
    strictly above the threshold.

    Args:
        entropy: student entropy `[N]`, nats.
        divergence: reverse KL `[N]`, nats.
        thresholds: "median" of the given rows on both axes, or (entropy, divergence) in nats.
            The paper states none; every report says which were used.

    Returns:
        int64 `[N]` of 1, 2, 3, 4.

    Raises:
        ValueError: thresholds are neither "median" nor two numbers.

    Source: TIP (arXiv 2604.14084), section 3; median thresholds as in TA-OPD's code.
    """
    if thresholds == "median":
        limits = (quantile(entropy, 0.5), quantile(divergence, 0.5))
    elif isinstance(thresholds, tuple) and len(thresholds) == 2:
        limits = thresholds  # type: ignore[assignment]
    else:
        raise ValueError(f"thresholds must be 'median' or two numbers in nats, got {thresholds!r}.")
    is_uncertain, is_wrong = entropy > limits[0], divergence > limits[1]
    return 4 - 2 * is_uncertain.long() - is_wrong.long()


def quadrant_table(
    quadrant: Tensor, divergence: Tensor, is_kept: Tensor
) -> dict[str, dict[str, float]]:
    """Per quadrant: share of the tokens, share of the divergence, and share of it that is kept.

    Args:
        quadrant: 1 to 4, `[N]`.
        divergence: reverse KL `[N]`, nats.
        is_kept: boolean `[N]`.

    Returns:
        {"q1": {"share", "kl_mass", "kept_share"}, …, "q4": …}; the shares of a column that has
        nothing to share (no tokens, no divergence, no tokens of the quadrant) are 0.
    """
    total, mass = max(len(quadrant), 1), float(divergence.sum())
    table = {}
    for number in (1, 2, 3, 4):
        here = quadrant == number
        size = int(here.sum())
        table[f"q{number}"] = {
            "share": size / total,
            "kl_mass": float(divergence[here].sum()) / mass if mass > 0 else 0.0,
            "kept_share": int(is_kept[here].sum()) / size if size else 0.0,
        }
    return table
