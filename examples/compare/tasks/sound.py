"""Recordings as samples: read from files, and at another rate."""

import wave
from pathlib import Path

import torch
from torch import Tensor


def read(path: Path) -> tuple[Tensor, int]:
    """Samples of a file between -1 and 1, mean of its channels, and their rate in Hz.

    Files of PCM are read by the standard library, others by ``soundfile`` where it is installed.

    Raises:
        ValueError: for a file that cannot be read; the text says why.
    """
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
        return _pcm(raw, width).view(-1, channels).mean(1), rate
    except (wave.Error, EOFError, RuntimeError) as error:
        return _by_soundfile(path, error)


def _pcm(raw: bytes, width: int) -> Tensor:
    """Little-endian PCM of `width` bytes; that of one byte is unsigned."""
    if width == 1:
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).float() / 128 - 1
    parts = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, width)
    wide = torch.zeros(len(parts), 4, dtype=torch.uint8)
    wide[:, 4 - width :] = parts  # the lowest bytes stay zero
    return wide.flatten().view(torch.int32).float() / 2**31


def _by_soundfile(path: Path, error: Exception) -> tuple[Tensor, int]:
    try:
        import soundfile
    except ImportError:
        raise ValueError(f"{error}; soundfile, which reads more than PCM, is not installed") from None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as again:
        raise ValueError(str(again)) from None
    return torch.from_numpy(samples).mean(1), int(rate)


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """Band-limited interpolation of ``[..., samples]`` from one rate in Hz to another."""
    length = samples.shape[-1]
    new_length = round(length * new_rate / rate)
    if rate == new_rate or not length:
        return samples
    return torch.fft.irfft(torch.fft.rfft(samples), n=new_length) * (new_length / length)
