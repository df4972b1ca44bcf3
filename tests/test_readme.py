"""The README's Python example runs as it stands, on a model that knows nothing of this package."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparsebayes.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32)
        self.second = nn.Linear(32, 16)
        self.third = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.randn(600, 10)
    y = (x[:, 0] * x[:, 1] > 0).long()
    names = {"model": Net(), "loader": DataLoader(TensorDataset(x, y), batch_size=20)}
    before = sum(p.numel() for p in names["model"].parameters())
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), names)
    small = names["sparse"].model
    assert sum(p.numel() for p in small.parameters()) < before / 2
    session = onnxruntime.InferenceSession("model.onnx")
    found = session.run(None, {"input": x[:7].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), small(x[:7]).detach(), rtol=1e-4, atol=1e-5)


def test_recipe_example() -> None:
    (example,) = blocks("yaml")
    assert parse_recipe(example, "README.md").prune.budget is not None
