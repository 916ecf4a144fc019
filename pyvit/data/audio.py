"""Sound to spectrogram images (AST: Gong et al., 2021, section 2)."""

from __future__ import annotations

import functools
import wave
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def mel_filters(rate: int, n_fft: int, bands: int) -> Tensor:
    """Triangular filters, equally spaced in mel = 1127 ln(1 + f / 700) from 20 Hz: (bands, n_fft // 2 + 1)."""
    mel = torch.linspace(*(1127 * torch.tensor([20.0, rate / 2]).div(700).log1p()).tolist(), bands + 2)
    bins = 1127 * (torch.linspace(0, rate / 2, n_fft // 2 + 1) / 700).log1p()
    low, middle, high = mel[:-2, None], mel[1:-1, None], mel[2:, None]
    return torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)


def log_mel(samples: Tensor, rate: int, bands: int = 128, frames: int = 1024) -> Tensor:
    """Log-mel energies (bands, frames) of mono ``samples``: 25 ms Hann windows every 10 ms, cut or padded with silence at the end."""
    if samples.dim() != 1 or samples.numel() == 0:
        raise ValueError(f"log_mel: samples must be a mono signal (n,), got shape {tuple(samples.shape)}")
    hop, width = rate // 100, rate // 40
    n_fft = 1 << (width - 1).bit_length()
    wanted = (frames - 1) * hop
    samples = F.pad(samples - samples.mean(), (0, max(wanted - samples.numel(), 0)))[:wanted]
    window = torch.hann_window(width)
    power = torch.stft(samples, n_fft, hop, width, window, center=True, return_complex=True).abs().square()
    return (mel_filters(rate, n_fft, bands) @ power).clamp(min=1e-8).log()[:, :frames]


def to_images(spectrograms: Tensor) -> Tensor:
    """(N, bands, frames) to uint8 (N, 3, bands, frames), 80 dB below each clip's peak to black; low bands at the bottom."""
    top = spectrograms.amax((1, 2), keepdim=True)
    scaled = ((spectrograms - top) / (8 * torch.log(torch.tensor(10.0))) + 1).clamp(0, 1)
    return (scaled * 255).round().to(torch.uint8).flip(1)[:, None].expand(-1, 3, -1, -1).contiguous()


def read_wave(path: Path) -> tuple[Tensor, int]:
    """Mono samples in [-1, 1] and the rate of a PCM .wav file of 16 bits."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"{path}: only 16-bit PCM is read, this file has {8 * file.getsampwidth()} bits")
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).float() / 32768
        return samples.view(-1, file.getnchannels()).mean(1), file.getframerate()
