"""Shared settings: one thread a process, and no deadline on a machine that may be busy."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
