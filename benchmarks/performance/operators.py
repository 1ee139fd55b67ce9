"""Where the time of a run goes, seen by torch's profiler."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")
_ATTENTION = ("aten::bmm", "aten::baddbmm")
_FUSED = "scaled_dot_product"


class Operators:
    """Seconds that a stretch of work spends in operators, by kind.

    The profiler slows operators too, small ones most: compare shares, not seconds with those of a
    run without it.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._has_begun = False
        self._has_stopped = False

    def begin(self) -> None:
        """Look from here on; a second call changes nothing."""
        if not self._has_begun:
            self._profile.start()
            self._has_begun = True

    def stop(self) -> None:
        """Look no further; a second call changes nothing."""
        if not self._has_stopped:
            self._profile.stop()
            self._has_stopped = True

    def end(self, times: int = 1) -> dict[str, float]:
        """Seconds for each of `times` equal pieces: products of matrices, attention, the rest."""
        self.stop()
        spent = {"products_s": 0.0, "attention_s": 0.0, "other_operators_s": 0.0}
        for event in self._profile.key_averages():
            is_attention = event.key in _ATTENTION or _FUSED in event.key
            kind = "attention_s" if is_attention else "other_operators_s"
            spent["products_s" if event.key in _PRODUCTS else kind] += (
                event.self_cpu_time_total / 1e6 / times
            )
        return spent
