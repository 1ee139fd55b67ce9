"""What a plan has to know of a CUDA device, and what a process takes of it beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tutelage.core.kernels import is_supported
from tutelage.memory.cpu import available_bytes
from tutelage.memory.plan import UNCOUNTED, Phase

CONTEXT_BYTES = 640 << 20
"""What a process takes of a device before its first tensor: the driver's context, the kernels of
torch and cuBLAS, captured graphs. Between 0.5 and 0.7 GiB on the cards of the last years."""
NUM_WORKSPACES = 3
"""Where cuBLAS works: once for the forward pass, for the thread of the backward pass, and for the
stream that graphs are captured on."""
ALLOCATOR_SHARE = 1 / 20
"""What torch's allocator holds beyond the tensors in it, as a share of them: sizes rounded up to
512 bytes and 2 MiB, and gaps that no later tensor fits. An assumption, not a measurement."""


@dataclass(frozen=True)
class Facts:
    """What a plan has to know of a CUDA device."""

    total_bytes: int
    available_bytes: int
    """Free now, with what this process holds already."""
    capability: tuple[int, int]
    has_kernels: bool
    """Whether the objective runs by fused kernels."""
    host_bytes: int
    """Main memory that is free now."""

    @staticmethod
    def of(device: torch.device) -> Facts:
        """What is known of the device that is here."""
        about = torch.cuda.get_device_properties(device)
        return Facts(
            about.total_memory,
            available_bytes(device) + CONTEXT_BYTES,
            (about.major, about.minor),
            is_supported(device),
            available_bytes(torch.device("cpu")),
        )

    @property
    def workspace_bytes(self) -> int:
        """cuBLAS's memory, which torch allocates: 32 MiB from Hopper on, before 8.125 MiB."""
        return NUM_WORKSPACES * ((32 << 20) if self.capability >= (9, 0) else 8_519_680)


def with_uncounted(phase: Phase) -> Phase:
    """The phase with what is no tensor."""
    allocator = int(phase.allocated_bytes * ALLOCATOR_SHARE)
    return Phase(
        phase.name, phase.parts | dict(zip(UNCOUNTED, (CONTEXT_BYTES, allocator), strict=True))
    )
