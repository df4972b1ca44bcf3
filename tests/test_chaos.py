"""One run that is really killed and goes on; `tools/chaos.py` kills a hundred and adds every other fault."""

from __future__ import annotations

import importlib.util
import signal
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def chaos() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("chaos_tool", ROOT / "tools" / "chaos.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_killed_run_with_a_damaged_checkpoint_ends_in_the_same_numbers(
    chaos: types.ModuleType, tmp_path: Path
) -> None:
    small = chaos.RECIPE.replace("epochs: 3", "epochs: 2").replace("count: 3", "count: 1")
    (tmp_path / "chaos.yaml").write_text(small.replace("holdout: 1000", "holdout: 8000"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    chaos.finish(chaos.start(whole, "--out", str(whole)))
    process = chaos.start(broken, "--out", str(broken))
    chaos.wait_for(broken / "points" / "0" / "model.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    chaos.flip(broken)
    chaos.resume(broken)
    chaos.compare(chaos.result(broken), chaos.result(whole))


def test_what_differs_is_said(chaos: types.ModuleType) -> None:
    chaos.compare({"front": [1], "more": 2}, {"front": [1]})
    with pytest.raises(chaos.Broken, match=r"front differs: \[1\] instead of \[2\]"):
        chaos.compare({"front": [1]}, {"front": [2]})
