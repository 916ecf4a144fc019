"""Sound to log-mel spectrograms in the units of AST (Gong et al., 2021, section 2), kept as bytes."""

from __future__ import annotations

import functools
import wave
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.models.audio import LogMel

RATE, BANDS = 16000, 128

#: What bytes 0 and 255 stand for: silence and a full-scale sound, in the units of :class:`pyvit.models.audio.LogMel`; a step is half a dB.
LOW, HIGH = -1.3, 2.0

#: ``Data.mean`` and ``Data.std`` that take bytes / 255 back to those units.
MEAN, STD = (-LOW / (HIGH - LOW),), (1 / (HIGH - LOW),)


@functools.cache
def _front_end(frames: int) -> LogMel:
    return LogMel(BANDS, frames, RATE)


def spectrogram(samples: Tensor, rate: int, frames: int) -> Tensor:
    """Mono ``samples`` (n,) in [-1, 1] at ``rate`` Hz to uint8 (1, 128 mel bands, frames), one frame per 10 ms, low bands first.

    Longer sounds are cut, shorter ones filled up.
    """
    if samples.dim() != 1 or samples.numel() == 0:
        raise ValueError(f"spectrogram: samples must be a mono signal (n,), got shape {tuple(samples.shape)}")
    if rate != RATE:
        samples = resample(samples, rate, RATE)
    front = _front_end(frames)
    samples = F.pad(samples, (0, max(front.length - samples.numel(), 0)))
    units = front(samples[None])[0]
    return ((units - LOW) / (HIGH - LOW) * 255).round().clamp(0, 255).to(torch.uint8)


def resample(samples: Tensor, rate: int, wanted: int) -> Tensor:
    """``samples`` (n,) at another rate, frequencies above half of either rate removed."""
    n = max(round(samples.numel() * wanted / rate), 1)
    return torch.fft.irfft(torch.fft.rfft(samples.double())[: n // 2 + 1], n).float() * (n / samples.numel())


def read_wave(path: Path | BinaryIO) -> tuple[Tensor, int]:
    """Mono samples in [-1, 1] and the rate of a PCM .wav file of 16 bits."""
    with wave.open(str(path) if isinstance(path, Path) else path) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"{path}: only 16-bit PCM is read, this file has {8 * file.getsampwidth()} bits")
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).float() / 32768
        return samples.view(-1, file.getnchannels()).mean(1), file.getframerate()
