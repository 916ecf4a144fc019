"""Audio Spectrogram Transformer. Gong et al., "AST: Audio Spectrogram Transformer" (2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.models.deit import DistilledVisionTransformer
from pyvit.models.registry import register
from pyvit.models.vit import SIZES
from pyvit.nn.constants import Constants


class AudioSpectrogramTransformer(DistilledVisionTransformer):
    """Log-mel spectrograms (B, 1, mel bins, frames) to logits (B, num_classes): a DeiT on overlapping 16 x 16 patches
    (section 2.1).

    The mean of class and distillation token is normalised and classified. ``img_size`` is (mel bins, frames).
    """

    def __init__(self, **settings: Any) -> None:
        defaults = {"img_size": (128, 1024), "in_chans": 1, "patch_stride": 10, "num_classes": 527}
        super().__init__(**{**defaults, **settings})
        self.fc_norm = nn.LayerNorm(self.embed_dim, eps=self.norm_eps)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        del self.head_dist  # both tokens share one head

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, P + N, D) to logits (B, num_classes)."""
        x = self.head_drop(self.fc_norm((x[:, 0] + x[:, 1]) / 2))
        return x if pre_logits else self.head(x)


class LogMel(Constants):
    """Waveforms (B, samples) at 16 kHz to normalised log-mel spectrograms (B, 1, mel bins, frames), AST's input.

    Kaldi's filter bank: frames of 25 ms every 10 ms, mean removed, pre-emphasis 0.97, Hann window, power spectrum,
    triangular filters equally spaced on the mel scale 1127 ln(1 + f / 700) from 20 Hz to half the sample rate. Frames
    are padded with zeros to ``frames`` (None: no padding) and normalised to (x - mean) / (2 std) with AudioSet's
    statistics.
    """

    filters: Tensor
    window: Tensor

    def __init__(
        self,
        mel_bins: int = 128,
        frames: int | None = 1024,
        rate: int = 16000,
        mean: float = -4.2677393,
        std: float = 4.5689974,
    ) -> None:
        super().__init__()
        self.frames = frames
        self.mean = mean
        self.std = std
        self.mel_bins = mel_bins
        self.rate = rate
        self.length, self.hop = rate * 25 // 1000, rate // 100
        self.size = 2 ** math.ceil(math.log2(self.length))
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        window = torch.hann_window(self.length, periodic=False, dtype=torch.float32, device="cpu")
        return {"window": window, "filters": mel_filters(self.mel_bins, self.size, self.rate)}

    def forward(self, waves: Tensor) -> Tensor:
        if waves.dim() != 2 or waves.shape[1] < self.length:
            raise ValueError(
                f"LogMel: waves must be (B, samples) with at least {self.length} samples, got {tuple(waves.shape)}"
            )
        x = waves.unfold(1, self.length, self.hop)  # (B, frames, length)
        x = x - x.mean(-1, keepdim=True)
        x = torch.cat((x[..., :1] * 0.03, x[..., 1:] - 0.97 * x[..., :-1]), -1)
        power = torch.fft.rfft(x * self.window, self.size).abs().square()
        mel = (power @ self.filters).clamp_min(torch.finfo(torch.float32).eps).log()  # (B, frames, mel bins)
        if self.frames is not None:
            mel = F.pad(mel[:, : self.frames], (0, 0, 0, max(self.frames - mel.shape[1], 0)))
        return ((mel - self.mean) / (2 * self.std)).transpose(1, 2).unsqueeze(1)


def mel_filters(bins: int, size: int, rate: int, low: float = 20.0) -> Tensor:
    """Triangular filters (size // 2 + 1, bins) over the bins of an FFT of length ``size``, linear on the mel scale."""
    mel = lambda f: 1127.0 * torch.log1p(f / 700.0)  # noqa: E731
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    edges = torch.linspace(*(float(mel(torch.tensor(f, **exact))) for f in (low, rate / 2)), bins + 2, **exact)
    at = mel(torch.arange(size // 2 + 1, **exact) * rate / size)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    filters = torch.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clamp_min(0)
    return filters.float()


def from_image_model(model: AudioSpectrogramTransformer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an image ViT or DeiT (native keys), adapted as initial weights of ``model`` (section 2.2).

    The patch projection is averaged over colours. Positions are cut where the new grid is smaller and interpolated
    bilinearly where it is larger. A missing distillation token becomes a copy of the class token. Heads are left out.
    Load with ``load_checkpoint(model, result, allow=("head.*", "fc_norm.*"))``.
    """
    found = {k: v for k, v in state.items() if not k.startswith(("head", "fc_norm"))}
    found["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].mean(1, keepdim=True)
    pos = state["pos_embed"]
    tokens = next((t for t in (1, 2) if math.isqrt(pos.shape[1] - t) ** 2 == pos.shape[1] - t), None)
    if tokens is None:
        raise ValueError(
            f"from_image_model: pos_embed must belong to a square grid and 1 or 2 tokens, got {tuple(pos.shape)}"
        )
    side = math.isqrt(pos.shape[1] - tokens)
    image = pos[0, tokens:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
    for axis, (n, dim) in enumerate(zip(model.grid, (2, 3), strict=True)):
        if n <= image.shape[dim]:
            image = image.narrow(dim, (image.shape[dim] - n) // 2, n)
        else:
            size = (n, image.shape[3]) if axis == 0 else (image.shape[2], n)
            image = F.interpolate(image, size=size, mode="bilinear")
    of_class = pos[:, :tokens] if tokens == 2 else pos[:, :1].expand(-1, 2, -1)
    found["pos_embed"] = torch.cat((of_class, image.flatten(2).transpose(1, 2)), 1)
    found.setdefault("dist_token", state["cls_token"].clone())
    return found


register("ast_base_patch16_1024x128", AudioSpectrogramTransformer, **SIZES["base"])
