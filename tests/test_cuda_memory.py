"""New memory on a GPU."""

from __future__ import annotations

import pytest
import torch

from turboquant_rs.ops.cuda.memory import new, new_bytes, new_on, row_major


@pytest.mark.parametrize("sizes", [(), (3,), (2, 3), (4, 1, 3), (0,), (2, 0), (2, 0, 3)], ids=str)
def test_the_strides_of_memory_without_gaps_are_torchs(sizes: tuple[int, ...]) -> None:
    assert row_major(sizes) == torch.empty(sizes).stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_as_torch_makes_it() -> None:
    x = torch.zeros(2, device="cuda")
    for inference in (False, True):
        with torch.inference_mode(inference):
            made = (new((2, 3), (3, 1), torch.bfloat16), new_on(x, (2, 3), torch.bfloat16))
            for tensor in made:
                assert tensor.shape == (2, 3) and tensor.dtype == torch.bfloat16 and tensor.device == x.device
                assert tensor.is_contiguous() and tensor.is_inference() == inference
            assert new_bytes(7, 0).shape == (7,)
