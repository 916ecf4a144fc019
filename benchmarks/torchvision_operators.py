"""Makes torchvision importable with a torch that it was not built for. Its models and transforms work; of its compiled
operators this module implements nms in Python.

PyPI's torchvision is built for a CUDA torch. With a CPU-only torch its library does not load, and its import fails when
it registers fake kernels for the library's operators. Importing this module declares these operators if torchvision
lacks them. ``make test`` installs a copy into its environment, imported when Python starts, because timm, open_clip and
transformers import torchvision.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

_LIBRARY: list[Any] = []  # declarations live as long as the library object


def nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    """Indices of ``boxes`` (N, 4), in descending order of ``scores`` (N,), that no kept box with a higher score
    overlaps by more than ``iou_threshold``."""
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
