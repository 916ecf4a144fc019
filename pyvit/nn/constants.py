"""Buffers that follow from a module's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """A module with buffers that are not saved because its settings say what they hold.

    Built on the meta device and given memory by ``to_empty``, a module takes its parameters from a checkpoint, but no
    checkpoint has these buffers: they are filled again.
    """

    def constants(self) -> dict[str, Tensor]:
        """The buffers' values by name, on a CPU in float32."""
        raise NotImplementedError

    def register_constants(self) -> None:
        for name, value in self.constants().items():
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        without = [name for name, buffer in self._buffers.items() if buffer is not None and buffer.is_meta]
        super()._apply(fn, recurse)
        for name, value in self.constants().items() if without else ():
            buffer = self._buffers[name]
            if name in without and buffer is not None and not buffer.is_meta:
                buffer.copy_(value)
        return self
