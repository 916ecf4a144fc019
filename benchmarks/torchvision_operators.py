"""torchvision beside a torch that it was not built for: its models and transforms work, and of its compiled operators
this one, in Python.

PyPI's torchvision is built for a CUDA torch. Beside a CPU-only one its library does not load, and then it does not even
import, because it registers fake kernels for operators of that library. Importing this module declares them when
torchvision turns out to lack them. ``make test`` installs a copy into its environment, to be imported when Python
starts, since timm, open_clip and transformers all import torchvision.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

_LIBRARY: list[Any] = []  # declarations live as long as the library object


def nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    """Indices of ``boxes`` (N, 4), best ``scores`` (N,) first, that no better box kept overlaps by more than
    ``iou_threshold``."""
    import torch

    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        low, high = torch.maximum(boxes[kept, :2], boxes[i, :2]), torch.minimum(boxes[kept, 2:], boxes[i, 2:])
        common = (high - low).clamp(min=0).prod(1)
        if not bool((common > iou_threshold * (area[kept] + area[i] - common)).any()):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Finds nothing; notices that torchvision is about to register its fake kernels."""
        if name == "torchvision._meta_registrations":
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                _LIBRARY.append(torch.library.Library("torchvision", "FRAGMENT"))
                for name in ("nms", "qnms"):
                    _LIBRARY[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _LIBRARY[0].impl("nms", nms, "CPU")


sys.meta_path.insert(0, _Finder())
