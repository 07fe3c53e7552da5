"""Group quantization in PyTorch without a compiler, as most libraries do it on a CPU today."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor, bits: int, group_size: int, *, stochastic: bool = False) -> tuple[Tensor, Tensor]:
    """Absmax scales and unsigned codes; `stochastic` adds `torch.rand` before the floor.

    x: (m, k) f32, group_size divides k. Returns codes (m, k) u8 and scales (m, k / group_size) bf16.
    """
    half = 1 << (bits - 1)
    groups = x.view(-1, group_size)
    scales = (groups.abs().amax(dim=1, keepdim=True) / (half - 1)).bfloat16()
    steps = groups / scales.float()
    steps = steps.add_(torch.rand_like(steps)).floor_() if stochastic else steps.round_()
    codes = steps.clamp_(-half, half - 1).add_(half).to(torch.uint8)
    return codes.view_as(x), scales.view(x.shape[0], -1)


def pack(x: Tensor, bits: int, group_size: int, *, stochastic: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize`, then two 4-bit codes a byte (8-bit codes are bytes already)."""
    codes, scales = quantize(x, bits, group_size, stochastic=stochastic)
    if bits == 4:
        pairs = codes.view(-1, 2)
        codes = pairs[:, 0] | (pairs[:, 1] << 4)
    return codes, scales


def unpack(packed: Tensor, scales: Tensor, bits: int, group_size: int, out: Tensor) -> Tensor:
    """The inverse, into `out`: (m, k) f32."""
    codes = packed
    if bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), dim=1)
    centred = codes.view(-1, group_size).float().sub_(1 << (bits - 1))
    return torch.mul(centred, scales.view(-1, 1).float(), out=out.view(-1, group_size))
