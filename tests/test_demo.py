# SPDX-License-Identifier: MIT
"""The demo, a few steps of it: it runs, writes a picture, and trained beats untrained."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("skimage", reason="the demo's photographs are in scikit-image")
pytest.importorskip("tqdm")


def test_a_few_steps(tmp_path: Path) -> None:
    from PIL import Image

    from examples import landmarks

    output = tmp_path / "sheet.png"
    result = landmarks.main(["--steps", "30", "--output", str(output), "--seed", "1"])
    assert result.soft_argmax.mean < 0.9 * result.untrained.mean
    assert min(Image.open(output).size) > 500


def test_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    from examples import landmarks

    with pytest.raises(SystemExit):
        landmarks.main(["--device", "nonsense"])
    assert "nonsense" in capsys.readouterr().err
