"""Reference networks, by name: plain modules that know nothing of sparsity.

>>> build("lenet5_caffe").fc1.in_features
800
"""

from __future__ import annotations

from sparsebayes.models.building import MODELS, build
from sparsebayes.models.lenet import LeNet5Caffe, LeNet300100

__all__ = ["MODELS", "LeNet5Caffe", "LeNet300100", "build"]
