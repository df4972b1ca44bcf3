from __future__ import annotations

import torch

from sparsebayes.curvature import Curvature


def test_repr_names_range_error_and_images() -> None:
    curvature = Curvature(torch.tensor([8.0, 0.5]), torch.tensor([0.3, 0.1]), num_images=256, num_data=60000)
    assert repr(curvature) == (
        "Curvature(2 groups, 0.5 to 8 nats, relative error 0.039, from 256 of 60000 images)"
    )


def test_repr_of_dead_and_of_no_groups() -> None:
    zero = Curvature(torch.zeros(3), torch.zeros(3), num_images=2, num_data=2)
    assert repr(zero) == "Curvature(3 groups, 0 to 0 nats, relative error 0, from 2 of 2 images)"
    none = Curvature(torch.zeros(0), torch.zeros(0), num_images=2, num_data=4)
    assert repr(none) == "Curvature(0 groups, from 2 of 4 images)"
