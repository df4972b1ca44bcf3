"""Images and labels, by name, and the loader that feeds them.

>>> digits = load("embedded_mnist")
>>> train, held_out = split(digits.train, holdout=1000, seed=0)
>>> batches = Loader(train, batch_size=100, mean=digits.mean, std=digits.std, shuffle=True, augment="shift")
>>> len(batches), batches.num_data
(90, 9000)
"""

from __future__ import annotations

from sparsebayes.data.images import Dataset, Images
from sparsebayes.data.loader import Loader, split
from sparsebayes.data.sources import SOURCES, load

__all__ = ["SOURCES", "Dataset", "Images", "Loader", "load", "split"]
