"""Spoken words as log-mel spectrograms: said by espeak-ng where it is installed, else sung as tones of fixed formants."""

from __future__ import annotations

import io
import shutil
import subprocess
import wave

import torch
from torch import Tensor

from pyvit.data.audio import log_mel, to_images
from pyvit.data.sets import Data, TensorImages

WORDS = ["yes", "no", "up", "down", "left", "right", "stop", "go"]
_RATE = 16000
_FORMANTS = [(270, 2290), (730, 1090), (300, 870), (530, 1840), (660, 1720), (440, 1020), (640, 1190), (490, 1350)]


def words(size: int = 64, per_word: int = 60, seed: int = 0, voice: str = "auto") -> Data:
    """Eight words, each said ``per_word`` times at different pitch, speed and noise; a fifth is held out.

    Args:
        size: mel bands and frames of the spectrogram image.
        voice: "espeak" (raises when it is not installed), "tones", or "auto": espeak-ng where present. ``data.extra["voice"]`` tells which.
    """
    if voice not in ("auto", "espeak", "tones"):
        raise ValueError(f"words: voice must be 'auto', 'espeak' or 'tones', got {voice!r}")
    program = shutil.which("espeak-ng") or shutil.which("espeak")
    if voice == "espeak" and program is None:
        raise FileNotFoundError("words: voice 'espeak' needs the program espeak-ng on the PATH")
    spoken = program is not None and voice != "tones"
    generator = torch.Generator().manual_seed(seed)
    clips, labels = [], []
    for label, word in enumerate(WORDS):
        for _ in range(per_word):
            draw = torch.rand(3, generator=generator).tolist()
            clip = _say(str(program), word, draw) if spoken else _sing(label, draw)
            noise = torch.randn(clip.shape, generator=generator) * clip.std() * (0.05 + 0.25 * draw[2])
            clips.append(log_mel(clip + noise, _RATE, bands=size, frames=size))
            labels.append(label)
    images, target = to_images(torch.stack(clips)), torch.tensor(labels)
    held = torch.zeros(len(target), dtype=torch.bool)
    held[torch.arange(len(target)) % per_word >= per_word - max(per_word // 5, 1)] = True
    parts = [TensorImages(images[m], target[m], [WORDS[c] for c in target[m].tolist()]) for m in (~held, held)]
    extra = {"voice": "espeak" if spoken else "tones"}
    return Data("words", parts[0], parts[1], (size, size), WORDS, flip=False, mean=(0.5,) * 3, std=(0.25,) * 3, extra=extra)


def _say(program: str, word: str, draw: list[float]) -> Tensor:
    command = [program, "--stdout", "-p", str(int(20 + 60 * draw[0])), "-s", str(int(120 + 100 * draw[1])), word]
    with wave.open(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)) as file:
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16).float() / 32768
        rate = file.getframerate()
    return torch.nn.functional.interpolate(samples[None, None], scale_factor=_RATE / rate, mode="linear")[0, 0]


def _sing(label: int, draw: list[float]) -> Tensor:
    """Harmonics of a gliding pitch under two formants, and a syllable's rise and fall."""
    n = int(_RATE * (0.4 + 0.3 * draw[1]))
    t = torch.arange(n) / _RATE
    pitch = 90 + 130 * draw[0]
    glide = 1 + (0.15 if label % 2 else -0.15) * t / t[-1]
    wave_ = torch.zeros(n)
    for k in range(1, 30):
        f = k * pitch
        level = sum(1 / (1 + ((f - formant) / 120) ** 2) for formant in _FORMANTS[label])
        wave_ += level * torch.sin(2 * torch.pi * f * glide.cumsum(0) / _RATE)
    syllables = 1 + label % 3
    return wave_ * torch.sin(torch.pi * syllables * t / t[-1]).abs()
