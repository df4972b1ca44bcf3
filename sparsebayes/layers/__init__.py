"""Layers that stand in a compacted network where no layer of PyTorch computes what the dense network computed."""

from __future__ import annotations

from sparsebayes.layers.attention import HeadAttention
from sparsebayes.layers.constant import Constant, Passage
from sparsebayes.layers.norms import PartialGroupNorm, PartialLayerNorm, PartialRMSNorm

__all__ = ["Constant", "HeadAttention", "PartialGroupNorm", "PartialLayerNorm", "PartialRMSNorm", "Passage"]
