"""Losses as modules, with the defaults of their papers."""

from pyvit.losses.contrastive import CLIPLoss, NTXentLoss, SigLIPLoss, TripletLoss
from pyvit.losses.distillation import DINOLoss, IBOTLoss, KoLeoLoss
from pyvit.losses.masked import masked_pixel_loss, patchify, unpatchify

__all__ = [
    "CLIPLoss",
    "DINOLoss",
    "IBOTLoss",
    "KoLeoLoss",
    "NTXentLoss",
    "SigLIPLoss",
    "TripletLoss",
    "masked_pixel_loss",
    "patchify",
    "unpatchify",
]
