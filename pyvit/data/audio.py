"""Audio to log-mel spectrograms in the units of AST (Gong et al., 2021, section 2), stored as uint8."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.models.audio import LogMel

RATE, BANDS = 16000, 128

#: Values of bytes 0 and 255 (silence and full scale), in the units of :class:`pyvit.models.audio.LogMel`. One step is
#: half a dB.
LOW, HIGH = -1.3, 2.0

#: ``Data.mean`` and ``Data.std`` that convert bytes / 255 to normalised values.
MEAN, STD = (-LOW / (HIGH - LOW),), (1 / (HIGH - LOW),)


@functools.cache
def _front_end(frames: int) -> LogMel:
    return LogMel(BANDS, frames, RATE)


def spectrogram(samples: Tensor, rate: int, frames: int) -> Tensor:
    """Mono ``samples`` (n,) in [-1, 1] at ``rate`` Hz to uint8 (1, 128 mel bands, frames), one frame per 10 ms, low
    bands first.

    Longer sounds are cut, shorter ones padded.
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
    """Resample ``samples`` (n,) to another rate, with a low-pass filter at half of the lower rate."""
    n = max(round(samples.numel() * wanted / rate), 1)
    return torch.fft.irfft(torch.fft.rfft(samples.double())[: n // 2 + 1], n).float() * (n / samples.numel())


def read_wave(source: Any) -> tuple[Tensor, int]:
    """Mono samples in [-1, 1] and the sample rate of a .wav file: PCM of 8, 16, 24 or 32 bits, or floats of 32 or 64
    bits. Channels are averaged.

    ``source`` is a path or an open file. Raises ValueError for another encoding, for values that are not finite, and
    for a damaged or truncated file.
    """
    content = Path(source).read_bytes() if isinstance(source, (str, Path)) else source.read()
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError("not a .wav file: it must begin with RIFF and WAVE")
    form = data = None
    at = 12
    while at + 8 <= len(content) and data is None:
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        body = content[at + 8 : at + 8 + size]
        if len(body) < size and not (name == b"data" and size >= _UNKNOWN):
            raise ValueError(f"cut short: the part {name!r} should have {size} bytes and has {len(body)}")
        if name == b"fmt ":
            form = body
        elif name == b"data":
            data = body
        at += 8 + size + size % 2
    if form is None or len(form) < 16 or data is None:
        raise ValueError("damaged: it must have a format and data")
    kind, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", form[:16])
    if kind == _EXTENSIBLE and len(form) >= 26:
        kind = int.from_bytes(form[24:26], "little")
    if (kind, bits) not in _SAMPLES:
        raise ValueError(
            f"samples must be PCM of 8, 16, 24 or 32 bits or floats of 32 or 64, got encoding {kind} of {bits} bits"
        )
    if not channels or not LOWEST <= rate <= HIGHEST or frame != channels * bits // 8:
        raise ValueError(f"damaged: {channels} channels of {bits} bits in frames of {frame} bytes at {rate} Hz")
    if size >= _UNKNOWN:
        data = data[: len(data) // frame * frame]
    if not data or len(data) % frame:
        raise ValueError(f"cut short: {len(data)} bytes of samples are not whole frames of {frame} bytes")
    samples = _SAMPLES[kind, bits](data)
    if not bool(samples.isfinite().all()):
        raise ValueError("samples must be finite")
    return samples.view(-1, channels).mean(1), rate


#: Accepted sample rates in Hz; a file with another one is damaged.
LOWEST, HIGHEST = 1000, 768_000

#: Programs that write to a pipe cannot fill in the size afterwards: a size from here on means "to the end".
_UNKNOWN = 0x7FFF0000

_EXTENSIBLE = 0xFFFE


def _integers(data: bytes, dtype: torch.dtype, full: float, middle: int = 0) -> Tensor:
    return (torch.frombuffer(bytearray(data), dtype=dtype).double() - middle).div_(full).float()


def _pcm24(data: bytes) -> Tensor:
    low, middle, high = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, 3).int().unbind(1)
    return ((high << 24 | middle << 16 | low << 8) >> 8).float() / 2**23


#: (encoding, bits) -> samples from bytes; 1 is PCM, 3 is floats.
_SAMPLES: dict[tuple[int, int], Callable[[bytes], Tensor]] = {
    (1, 8): lambda data: _integers(data, torch.uint8, 128, 128),
    (1, 16): lambda data: _integers(data, torch.int16, 2**15),
    (1, 24): _pcm24,
    (1, 32): lambda data: _integers(data, torch.int32, 2**31),
    (3, 32): lambda data: torch.frombuffer(bytearray(data), dtype=torch.float32),
    (3, 64): lambda data: torch.frombuffer(bytearray(data), dtype=torch.float64).float(),
}
