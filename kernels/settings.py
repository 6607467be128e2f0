"""What users may choose about the kernels. Reading and setting it imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CpuSettings:
    """Choices of the CPU kernels; they hold from the next operation on.

    winograd: compute float32 3x3 convolutions of stride 1 in Winograd's form, two to three times
        as fast. Their results are within 3e-5 of the exact ones, relative to the largest value,
        where direct sums are within 3e-6.
    """

    winograd: bool = True


cpu = CpuSettings()
