"""Multi-head attention whose heads need not fill the width of its tokens.

`nn.MultiheadAttention` insists on ``heads * head width == width``, so that neither a head nor a channel of its
input can go alone. This one computes the same from the same parameters, without that condition:

    >>> HeadAttention.like(nn.MultiheadAttention(12, 4))
    HeadAttention(num_heads=4, head_dim=3, width=12)

The scores are scaled by ``1 / sqrt(head_dim)``, and a head keeps its width: to remove heads changes no scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HeadAttention"]


class HeadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with a free number of heads; parameters keep their names.

    Attributes:
        num_heads: number H of heads.
        head_dim: width D of one head.
        in_proj_weight: of shape ``[3 H D, width]``: query, key and value.
        in_proj_bias: of shape ``[3 H D]``, or None.
        out_proj: linear layer from ``H D`` to the width of the output.
    """

    @classmethod
    def like(cls, dense: nn.MultiheadAttention) -> HeadAttention:
        """Make the layer that holds the very parameters and settings of ``dense``.

        Args:
            dense: a layer for which `fits` is true.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.num_heads, layer.head_dim = dense.num_heads, dense.head_dim
        layer.dropout, layer.batch_first = dense.dropout, dense.batch_first
        # TransformerEncoderLayer asks for these; the last one keeps it from its fused kernel, which assumes
        # heads that fill the width.
        layer.embed_dim, layer._qkv_same_embed_dim = dense.embed_dim, False
        layer.register_parameter("in_proj_weight", dense.in_proj_weight)
        layer.register_parameter("in_proj_bias", dense.in_proj_bias)
        layer.out_proj = dense.out_proj
        layer.train(dense.training)
        return layer

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether this class computes what ``layer`` computes."""
        return (
            type(layer) is nn.MultiheadAttention
            and layer._qkv_same_embed_dim
            and layer.bias_k is None
            and not layer.add_zero_attn
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `nn.MultiheadAttention` does, with the same arguments and results."""
        is_self = query is key and key is value
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None and key_padding_mask.dim() == 1:
                key_padding_mask = key_padding_mask.unsqueeze(0)  # [1, S]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if is_self:
            q, k, v = self._projected(query).unbind(0)  # [B, H, L, D] each
        else:
            q, k, v = (self._part(x, part) for part, x in enumerate((query, key, value)))
        mask = _additive(attn_mask, key_padding_mask, q, self.num_heads)
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            scores = scores if mask is None else scores + mask
            weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
            mixed = weights @ v
        else:
            rate = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))  # [B, L, width]
        out = out[0] if unbatched else out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights[0] if unbatched else weights

    def _projected(self, x: Tensor) -> Tensor:
        """Query, key and value of tokens ``[B, L, width]``: ``[3, B, H, L, D]``."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        split = projected.view(*projected.shape[:-1], 3, self.num_heads, self.head_dim)
        return split.permute(2, 0, 3, 1, 4)

    def _part(self, x: Tensor, part: int) -> Tensor:
        """Query (0), key (1) or value (2) of tokens: ``[B, H, L, D]``."""
        if torch.compiler.is_exporting():  # the tracer of units follows whole weights, not pieces of them
            return self._projected(x)[part]
        rows = slice(part * self.num_heads * self.head_dim, (part + 1) * self.num_heads * self.head_dim)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        projected = F.linear(x, self.in_proj_weight[rows], bias)
        return projected.view(*projected.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def __repr__(self) -> str:
        width = self.out_proj.out_features
        return f"HeadAttention(num_heads={self.num_heads}, head_dim={self.head_dim}, width={width})"


def _additive(mask: Tensor | None, padding: Tensor | None, q: Tensor, num_heads: int) -> Tensor | None:
    """Both masks as one that is added to the scores ``[B, H, L, S]``; True of a boolean mask means "not here"."""
    total: Tensor | None = None
    for part in (mask, padding):
        if part is None:
            continue
        added = part
        if part.dtype == torch.bool:
            added = torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, float("-inf"))
        if part is padding:
            added = added[:, None, None, :]
        elif part.dim() == 3:
            added = added.view(-1, num_heads, *part.shape[1:])
        total = added if total is None else total + added
    return total
