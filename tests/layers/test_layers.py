"""The layers of compacted networks against the layers of PyTorch that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.layers import (
    Constant,
    HeadAttention,
    PartialGroupNorm,
    PartialLayerNorm,
    PartialRMSNorm,
    Passage,
)


def assert_close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=1e-12, rtol=1e-12)


def filled(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [-1, 1])
def test_a_partial_layer_norm_is_the_full_one_on_zeros(dim: int, bias: bool) -> None:
    kept = torch.tensor([0, 2, 3])
    full = filled(nn.LayerNorm(5, eps=1e-3, bias=bias))
    part = PartialLayerNorm(3, total=5, dim=dim, eps=1e-3, bias=bias).double()
    part.load_state_dict({name: value[kept] for name, value in full.state_dict().items()})
    x = torch.randn(2, 3, 4, 6).double() if dim == 1 else torch.randn(2, 4, 3).double()
    wide = torch.zeros_like(x.movedim(dim, -1)[..., :1]).expand(*x.movedim(dim, -1).shape[:-1], 5).clone()
    wide[..., kept] = x.movedim(dim, -1)
    assert_close(part(x), full(wide)[..., kept].movedim(-1, dim))


def test_a_partial_group_norm_is_the_full_one_on_zeros() -> None:
    kept = torch.tensor([0, 2, 3, 5])  # two of each group of three
    full = filled(nn.GroupNorm(2, 6))
    part = PartialGroupNorm(2, 4, total=6).double()
    part.load_state_dict({name: value[kept] for name, value in full.state_dict().items()})
    x = torch.randn(3, 4, 5, 5).double()
    wide = torch.zeros(3, 6, 5, 5).double()
    wide[:, kept] = x
    assert_close(part(x), full(wide)[:, kept])


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_a_partial_rms_norm_is_the_full_one_on_zeros(eps: float | None) -> None:
    kept = torch.tensor([0, 2, 3])
    full = filled(nn.RMSNorm(5, eps=eps))
    part = PartialRMSNorm(3, total=5, eps=eps).double()
    part.load_state_dict({"weight": full.state_dict()["weight"][kept]})
    x = torch.randn(2, 4, 3).double()
    wide = torch.zeros(2, 4, 5).double()
    wide[..., kept] = x
    assert_close(part(x), full(wide)[..., kept])


def test_norms_that_lost_nothing_are_those_of_pytorch_without_affine_too() -> None:
    x = torch.randn(4, 6, 3).double()
    assert_close(PartialLayerNorm(3, total=3, affine=False)(x), nn.LayerNorm(3, elementwise_affine=False)(x))
    assert_close(PartialGroupNorm(3, 6, total=6, affine=False)(x), nn.GroupNorm(3, 6, affine=False)(x))
    assert_close(PartialRMSNorm(3, total=3, affine=False)(x), nn.RMSNorm(3, elementwise_affine=False)(x))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_of_large_values_in_half_precision_are_those_of_pytorch(
    half: torch.dtype, affine: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3000 + 2000 * torch.randn(4, 48, 6, generator=generator)).to(half)  # sums and squares exceed 65504
    tokens = x.transpose(1, 2).contiguous()
    pairs = [
        (PartialLayerNorm(48, total=48, affine=affine), nn.LayerNorm(48, elementwise_affine=affine), tokens),
        (PartialGroupNorm(4, 48, total=48, affine=affine), nn.GroupNorm(4, 48, affine=affine), x),
        (PartialRMSNorm(48, total=48, affine=affine), nn.RMSNorm(48, elementwise_affine=affine), tokens),
    ]
    for part, full, images in pairs:
        for parameter in full.parameters():
            nn.init.normal_(parameter, generator=generator)
        part.load_state_dict(full.state_dict())
        found, expected = part.to(half)(images), full.to(half)(images)
        assert found.dtype == half
        assert float(expected.detach().std()) > 0.5
        torch.testing.assert_close(
            found, expected, atol=8 * torch.finfo(half).eps, rtol=4 * torch.finfo(half).eps
        )


def test_norms_in_half_precision_with_parameters_in_single_return_single() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert PartialLayerNorm(4, total=5)(x).dtype == torch.float32


def attention(**options: bool) -> tuple[nn.MultiheadAttention, HeadAttention]:
    dense = nn.MultiheadAttention(12, 4, **options).double()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.5)
    return dense, HeadAttention.like(dense)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head", "padding"])
def test_attention_by_heads_is_that_of_pytorch(
    batch_first: bool, bias: bool, need_weights: bool, mask: str
) -> None:
    dense, heads = attention(batch_first=batch_first, bias=bias)
    query, key = torch.randn(3, 5, 12).double(), torch.randn(3, 7, 12).double()
    allowed = torch.rand(5, 7) > 0.3
    allowed[:, 0] = True
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[:, 5:] = True
    options = {
        "none": {},
        "bool": {"attn_mask": ~allowed},
        "float": {"attn_mask": torch.randn(5, 7).double()},
        "per head": {"attn_mask": torch.randn(12, 5, 7).double()},
        "padding": {"key_padding_mask": padding},
    }[mask]
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    expected = dense(query, key, key, need_weights=need_weights, **options)
    actual = heads(query, key, key, need_weights=need_weights, **options)
    assert_close(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None)
    if actual[1] is not None:
        assert_close(actual[1], expected[1])


def test_attention_to_itself_unbatched_and_weights_of_each_head() -> None:
    dense, heads = attention()
    x = torch.randn(5, 12).double()
    expected = dense(x, x, x, average_attn_weights=False)
    actual = heads(x, x, x, average_attn_weights=False)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_unbatched_attention_takes_a_padding_mask_of_its_tokens(kind: torch.dtype) -> None:
    dense, heads = attention(batch_first=True)
    x = torch.randn(5, 12).double()
    mask = torch.tensor([False, True, False, False, True])
    mask = mask if kind == torch.bool else torch.zeros(5).double().masked_fill(mask, float("-inf"))
    for expected, found in zip(
        dense(x, x, x, key_padding_mask=mask), heads(x, x, x, key_padding_mask=mask), strict=True
    ):
        assert_close(found, expected)


def test_what_attention_by_heads_does_not_stand_for() -> None:
    assert HeadAttention.fits(nn.MultiheadAttention(4, 2))
    for other in (
        nn.MultiheadAttention(4, 2, kdim=3),
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, add_zero_attn=True),
        HeadAttention.like(nn.MultiheadAttention(4, 2)),
        nn.Linear(4, 2),
    ):
        assert not HeadAttention.fits(other)


def test_a_constant_has_the_size_of_its_input_and_memory_of_its_own() -> None:
    layer = Constant(torch.tensor([1.0, 2.0]), stride=(2, 2))
    y = layer(torch.full((3, 7, 5, 5), torch.nan))
    assert y.shape == (3, 2, 3, 3)
    y += torch.ones(3, 2, 3, 3)
    assert torch.equal(y[1, :, 2, 0], torch.tensor([2.0, 3.0]))
    assert torch.equal(layer.value.detach(), torch.tensor([1.0, 2.0]))
    assert Constant(torch.ones(4), dim=-1)(torch.zeros(2, 3, 9)).shape == (2, 3, 4)


def test_a_passage_neither_reads_nor_shares_its_input() -> None:
    x = torch.full((2, 5, 7, 7), torch.nan)
    y = Passage(stride=(2, 3))(x)
    assert y.shape == (2, 1, 4, 3)
    assert not y.any()
    y.add_(1)
    assert x.isnan().all()
