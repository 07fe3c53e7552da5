"""QuantEmbedding: a lookup table that keeps its rows packed and decodes only those it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from turboquant_rs.ops.cuda.chosen import capturing
from turboquant_rs.packed import PackedTensor, chosen, pack
from turboquant_rs.scheme import Rounding, Scheme

from .weight import PackedWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantEmbedding(PackedWeight, nn.Embedding):
    """`input: (...)` row numbers -> `(..., embedding_dim)` in the compute dtype, `weight` packed.

    In place of nn.Embedding: same constructor and attributes, state dicts of either kind. `padding_idx`,
    `scale_grad_by_freq` and `sparse` concern gradients of the weight, which codes have not; they are kept as
    attributes. A padding row of zeros stays exactly zero.

    Raises `ValueError` for `max_norm`, which rewrites rows as they are looked up, and for subtractive dither,
    which is a function of an element's place in the whole table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: Scheme | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if max_norm is not None:
            raise ValueError(
                f"max_norm={max_norm} rewrites rows as they are looked up, which packed rows do not allow; "
                "renormalize the weight once and use max_norm=None"
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx {padding_idx} is outside the {num_embeddings} rows of the table")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx % num_embeddings if padding_idx is not None else None
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        if _weight is not None:
            device, dtype = _weight.device, _weight.dtype
        self._init_packed(scheme if scheme is not None else Scheme(), device, dtype)
        if _weight is None:
            self.reset_parameters()
        else:
            self.weight = _weight

    @classmethod
    def from_float(
        cls,
        embedding: nn.Embedding,
        scheme: Scheme | None = None,
        rounding: Rounding | str = "nearest",
        *,
        seed: int | None = None,
    ) -> Self:
        """The quantized twin of `embedding`.

        Raises `ValueError` or `TypeError` for `max_norm` and for weights outside the domain of `tq.pack`.
        """
        layer = cls.empty_like(embedding, scheme, device="meta")
        parsed = Rounding.parse(rounding, seed)
        layer.check_rounding(parsed)
        layer.load_packed("weight", pack(embedding.weight.detach(), scheme=layer.scheme, rounding=parsed))
        return layer

    @classmethod
    def empty_like(
        cls,
        embedding: nn.Embedding,
        scheme: Scheme | None = None,
        *,
        device: torch.device | str | int | None = None,
    ) -> Self:
        """A quantized table of the size, dtype and device of `embedding`, all zeros."""
        weight = embedding.weight
        layer = cls(
            *(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, embedding.max_norm),
            *(embedding.norm_type, embedding.scale_grad_by_freq, embedding.sparse),
            device="meta",
            dtype=weight.dtype,
            scheme=scheme,
        )
        return layer._zeros_on(weight.device if device is None else torch.device(device))

    def to_float(self) -> nn.Embedding:
        """nn.Embedding with the dequantized weight in the compute dtype."""
        weight = self.packed.dequantize()
        layer = nn.Embedding(
            *(self.num_embeddings, self.embedding_dim, self.padding_idx, self.max_norm),
            *(self.norm_type, self.scale_grad_by_freq, self.sparse),
            device="meta",
            dtype=weight.dtype,
        )
        layer.weight = nn.Parameter(weight)
        return layer

    @property
    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def reset_parameters(self) -> None:
        """Quantizes a fresh draw of nn.Embedding's initialization (nothing on the meta device)."""
        if self.weight_packed.is_meta:
            return
        weight = torch.empty(self._weight_shape, device=self.weight_packed.device, dtype=self.weight_dtype)
        nn.init.normal_(weight)
        if self.padding_idx is not None:
            weight[self.padding_idx].zero_()
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """input: (...) integers in 0 … num_embeddings-1 -> (..., embedding_dim)."""
        choice = self._choice(self.weight_packed.device) if capturing() else None
        if choice is None:
            values = gather_rows(self.packed, input.reshape(-1)).dequantize()
        else:
            rows = gather_rows(self._packed_at(self._stored_bits), input.reshape(-1))
            values = chosen(rows, choice).dequantize(rows.dtype)
        return values.reshape(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """nn.Embedding's line, then the scheme."""
        return f"{nn.Embedding.extra_repr(self)}, {self._packed_repr()}"

    def check_rounding(self, rounding: Rounding) -> None:
        if rounding.mode == "subtractive":
            raise ValueError(
                "rows of subtractive dither cannot be decoded one by one, the dither is a function of an "
                "element's place in the whole table; use another rounding mode"
            )


def gather_rows(packed: PackedTensor, index: Tensor) -> PackedTensor:
    """The rows `index: (m,)` of `packed: (n, k)`, in that order: packed (m, k), of the planes read."""
    rows, columns = packed.shape
    planes = [
        plane.view(rows, plane.numel() // max(rows, 1)).index_select(0, index).reshape(-1)
        for plane in packed._planes()
    ]
    zero_points = packed.zero_points
    return PackedTensor(
        packed=torch.cat(planes),
        scales=packed.scales.index_select(0, index),
        zero_points=None if zero_points is None else zero_points.index_select(0, index),
        shape=torch.Size((index.numel(), columns)),
        dtype=packed.dtype,
        scheme=packed.scheme,
        rounding=packed.rounding,
        bits=packed.bits,
        trusted=True,
    )
