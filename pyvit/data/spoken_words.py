"""Spoken words as log-mel spectrograms: from espeak-ng if it is installed, else synthesised from tones with fixed
formants."""

from __future__ import annotations

import io
import shutil
import subprocess

import torch
from torch import Tensor

from pyvit.data.audio import MEAN, RATE, STD, read_wave, resample, spectrogram
from pyvit.data.dataset import Data, TensorImages

WORDS = ["yes", "no", "up", "down", "left", "right", "stop", "go"]
_FORMANTS = [(270, 2290), (730, 1090), (300, 870), (530, 1840), (660, 1720), (440, 1020), (640, 1190), (490, 1350)]

#: Voices of espeak-ng: for training, and held out.
_VOICES = (("en+m1", "en+m2", "en+m3", "en+m4", "en+f1", "en+f2", "en+f3"), ("en+m5", "en+f4"))


def words(size: int = 64, per_word: int = 60, seed: int = 0, voice: str = "auto") -> Data:
    """Eight words, each spoken ``per_word`` times with different pitch, speed and noise; a fifth, in other voices, is
    held out.

    Args:
        size: frames of the spectrograms, 10 ms each, of 128 mel bands.
        voice: "espeak" (raises if it is not installed), "tones", or "auto": espeak-ng if installed.
            ``data.extra["voice"]`` says which was used.
    """
    if voice not in ("auto", "espeak", "tones"):
        raise ValueError(f"words: voice must be 'auto', 'espeak' or 'tones', got {voice!r}")
    program = shutil.which("espeak-ng") or shutil.which("espeak")
    if voice == "espeak" and program is None:
        raise FileNotFoundError("words: voice 'espeak' needs the program espeak-ng on the PATH")
    spoken = program is not None and voice != "tones"
    generator = torch.Generator().manual_seed(seed)
    clips, labels = [], []
    held = torch.arange(per_word, device="cpu") >= per_word - max(per_word // 5, 1)
    for label, word in enumerate(WORDS):
        for again, new in enumerate(held.tolist()):
            draw = torch.rand(3, generator=generator, dtype=torch.float32, device="cpu").tolist()
            voices = _VOICES[int(new)]
            clip = _say(str(program), word, voices[again % len(voices)], draw) if spoken else _sing(label, new, draw)
            noise = (
                torch.randn(clip.shape, generator=generator, dtype=torch.float32, device="cpu")
                * clip.std()
                * (0.05 + 0.25 * draw[2])
            )
            clips.append(spectrogram(0.1 * (clip + noise) / clip.std(), RATE, size))
            labels.append(label)
    images, target = torch.stack(clips), torch.tensor(labels, device="cpu")
    parts = [
        TensorImages(images[m], target[m], [WORDS[c] for c in target[m].tolist()])
        for m in (~held.repeat(8), held.repeat(8))
    ]
    extra = {"voice": "espeak" if spoken else "tones"}
    return Data(
        "words",
        parts[0],
        parts[1],
        tuple(images.shape[2:]),
        WORDS,
        flip=False,
        mean=MEAN,
        std=STD,
        sound=True,
        extra=extra,
    )


def _say(program: str, word: str, voice: str, draw: list[float]) -> Tensor:
    pitch, speed = str(int(20 + 60 * draw[0])), str(int(120 + 100 * draw[1]))
    said = subprocess.run(
        [program, "--stdout", "-v", voice, "-p", pitch, "-s", speed, word], check=True, capture_output=True
    )
    samples, rate = read_wave(io.BytesIO(said.stdout))
    return resample(samples, rate, RATE)


def _sing(label: int, higher: bool, draw: list[float]) -> Tensor:
    """Harmonics of a gliding pitch, filtered by two formants, with the envelope of a syllable. Held-out voices are
    ``higher``."""
    n = int(RATE * (0.4 + 0.3 * draw[1]))
    t = torch.arange(n, dtype=torch.float32, device="cpu") / RATE
    pitch = 210 + 50 * draw[0] if higher else 90 + 110 * draw[0]
    glide = 1 + (0.15 if label % 2 else -0.15) * t / t[-1]
    wave_ = torch.zeros(n, dtype=torch.float32, device="cpu")
    for k in range(1, 30):
        f = k * pitch
        level = sum(1 / (1 + ((f - formant) / 120) ** 2) for formant in _FORMANTS[label])
        wave_ += level * torch.sin(2 * torch.pi * f * glide.cumsum(0) / RATE)
    syllables = 1 + label % 3
    return wave_ * torch.sin(torch.pi * syllables * t / t[-1]).abs()
