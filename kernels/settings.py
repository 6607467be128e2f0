"""What users may choose about the kernels. Reading and setting it imports no compiler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GeneralSettings:
    """Choices of all kernels; they hold from the next operation on.

    deterministic: compute in one order always, also where another is faster: see
        `gradengine.use_deterministic_algorithms`.
    """

    deterministic: bool = False


@dataclass
class CpuSettings:
    """Choices of the CPU kernels; they hold from the next operation on.

    winograd: compute float32 3x3 convolutions of stride 1 in Winograd's form, two to three times
        as fast. Their results are within 3e-5 of the exact ones, relative to the largest value,
        where direct sums are within 3e-6.
    """

    winograd: bool = True


@dataclass
class CudaSettings:
    """Choices of the CUDA kernels; they hold from the next operation on.

    conv_tf32: multiply float32 convolutions on tensor cores, many times as fast. Factors are
        rounded to 11 significant bits (tf32), sums are float32: results are within 1e-3 of the
        exact ones, relative to the norm. As PyTorch's torch.backends.cudnn.allow_tf32, which is on
        by default as well.
    float32_matmul_precision: "highest" multiplies matrices of float32 as they are; "high" and
        "medium" round their elements to 11 significant bits first (tf32), which tensor cores
        multiply several times as fast.
    own_matmul: multiply matrices with these kernels also where cuBLAS is faster.
    benchmark: time the tiles that a convolution can be computed in, and the kernels for its gradient
        by the weight, when it first meets a shape, and take the fastest from then on. What a rule
        chooses otherwise is the same in every process; what is timed need not be, nor are the last
        bits of sums then. As PyTorch's torch.backends.cudnn.benchmark.
    """

    conv_tf32: bool = True
    float32_matmul_precision: str = "highest"
    own_matmul: bool = False
    benchmark: bool = False


general = GeneralSettings()
cpu = CpuSettings()
cuda = CudaSettings()
