"""In which format a machine computes fastest: without instructions for bfloat16 it takes four times as long as float32."""

from __future__ import annotations

import torch

BF16_CAPABILITIES = ("amx_bf16", "avx512_bf16", "bf16")  # of x86-64, and of aarch64


def precision() -> torch.dtype:
    """The shortest format that the GPU computes in, or the processor where there is none."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return processor_precision()


def processor_precision() -> torch.dtype:
    """The same of the processor: bfloat16 or float32."""
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(has.get(name) for name in BF16_CAPABILITIES) else torch.float32


def autocast() -> torch.autocast:
    """Products in the processor's own format, as a context."""
    return torch.autocast("cpu", torch.bfloat16, enabled=processor_precision() == torch.bfloat16)
