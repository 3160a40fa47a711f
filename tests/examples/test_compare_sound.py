"""Recordings: samples of every width, another rate."""

import math
import wave
from pathlib import Path

import pytest
import torch

from examples.compare.tasks import sound


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_every_width(width: int, tmp_path: Path) -> None:
    """Two channels of opposite halves of a value: their mean is known."""
    top = 2 ** (8 * width - 1)
    values = [v + (top if width == 1 else 0) for v in (top // 2, 0, -top // 2, -top // 2)]
    raw = b"".join(v.to_bytes(width, "little", signed=width > 1) for v in values)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, width, 123, 0, "NONE", ""))
        file.writeframes(raw)
    samples, rate = sound.read(tmp_path / "a.wav")
    assert rate == 123
    assert samples.tolist() == [0.25, -0.5]


def test_resampling_keeps_a_tone() -> None:
    def tone(rate: int) -> torch.Tensor:
        return torch.sin(torch.arange(rate) * 2 * math.pi * 5 / rate)

    for rate, new in ((100, 160), (160, 100), (100, 100)):
        torch.testing.assert_close(sound.resample(tone(rate), rate, new), tone(new), rtol=0, atol=1e-5)
