"""Operations: shapes, the norm at the end, and what counts as free of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsebayes.errors import RecipeError
from sparsebayes.nas.ops import OPS, build_op, scale_of


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("c_in", "c_out"), [(4, 4), (4, 6)])
@pytest.mark.parametrize("name", sorted(OPS))
def test_every_operation_has_the_shape_it_should(name, c_in, c_out, stride):
    op = build_op(name, c_in, c_out, stride=stride, affine=False)
    assert op(torch.randn(2, c_in, 8, 8)).shape == (2, c_out, 8 // stride, 8 // stride)


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_operation_sends_out_unit_variance_so_that_switches_compare(name):
    op = build_op(name, 4, 4, stride=1, affine=False)
    out = op(5 * torch.randn(16, 4, 8, 8)).detach()
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(out.var((0, 2, 3), correction=0), torch.ones(4), atol=1e-2)


@pytest.mark.parametrize("name", sorted(OPS))
def test_parameter_free_means_no_parameters(name):
    op = build_op(name, 4, 4, stride=1, affine=False)
    assert OPS[name].parameter_free == (not list(op.parameters()))


@pytest.mark.parametrize("name", sorted(OPS))
def test_scaling_the_last_norm_scales_the_operation(name):
    op = build_op(name, 4, 4, stride=1, affine=True).eval()
    images = torch.randn(2, 4, 8, 8)
    before = op(images)
    with torch.no_grad():
        scale_of(op).mul_(-2.5)
    assert torch.allclose(op(images), -2.5 * before, atol=1e-5)


def test_an_operation_that_ends_in_no_norm_is_refused():
    with pytest.raises(RecipeError, match="ends in an affine batch norm, got ReLU"):
        scale_of(nn.Sequential(nn.ReLU()))


def test_an_unknown_operation_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match="unknown operation 'sep_conv_3x4'; did you mean 'sep_conv_3x3'"):
        build_op("sep_conv_3x4", 1, 1, stride=1, affine=True)
