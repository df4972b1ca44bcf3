"""Reference networks, by name: plain modules that know nothing of sparsity.

>>> build("lenet5_caffe").fc1.in_features
800
"""

from __future__ import annotations

from sparsebayes.models.building import MODELS, build
from sparsebayes.models.lenet import LeNet5Caffe, LeNet300100
from sparsebayes.models.resnet import ResNet
from sparsebayes.models.vgg import VGG16

__all__ = ["MODELS", "VGG16", "LeNet5Caffe", "LeNet300100", "ResNet", "build"]
