"""Global and shared memory, with checks of who may access which bytes, and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Addresses of global memory start here: above 32 bits, so that a pointer cut to 32 bits is seen.
BASE = 0x7_0000_0000
_PAGE = 1 << 12
_MANY = -2


class Fault(AssertionError):
    """An error that a GPU might not report: an access out of bounds, a race, a read of bytes that have not arrived."""


class Lanes(NamedTuple):
    """The lanes of an access, as columns: block of the grid, warp, and number of barriers their block has passed."""

    block: np.ndarray
    warp: np.ndarray
    epoch: np.ndarray


class Global:
    """The storages of a launch's tensors, at distant addresses. Only bytes of some tensor may be accessed. Only pages
    with such bytes are stored, because a view may span more than the available memory."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        end = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages:
                self._storages[storage.data_ptr()] = (end, storage)
                end += (storage.nbytes() // _PAGE + 2) * _PAGE
        starts = [self._starts(tensor) for tensor in tensors]
        self._pages = np.unique(np.concatenate([at // _PAGE for at, _ in starts]))
        size = len(self._pages) * _PAGE
        self._bytes = np.zeros(size, np.uint8)
        self._allowed = np.zeros(size, bool)
        self._writer = np.full(size, -1, np.int32)  # block
        self._write_warp, self._write_epoch = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        for kept, stored in self._pairs_of_pages():
            self._bytes[kept] = stored
        for at, itemsize in starts:
            self._allowed[self._kept(at)[0][:, None] + np.arange(itemsize)] = True

    def _starts(self, tensor: Tensor) -> tuple[np.ndarray, int]:
        """Where the elements of ``tensor`` begin, and their size, bytes."""
        at = np.array([tensor.storage_offset()])
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            at = np.unique((at[:, None] + np.arange(n) * stride).ravel())
        return self._storages[tensor.untyped_storage().data_ptr()][
            0
        ] + at * tensor.element_size(), tensor.element_size()

    def _kept(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in what is kept, and whether they are."""
        if not len(self._pages):
            return at, np.zeros(len(at), bool)
        page = np.minimum(np.searchsorted(self._pages, at // _PAGE), len(self._pages) - 1)
        return page * _PAGE + at % _PAGE, self._pages[page] == at // _PAGE

    def _pairs_of_pages(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Each page: where it is kept, and the storage's own bytes."""
        bases = np.array([at for at, _ in self._storages.values()])
        stored = [torch.tensor([], dtype=torch.uint8).set_(storage).numpy() for _, storage in self._storages.values()]
        for i, page in enumerate(self._pages):
            which = int(np.searchsorted(bases, page * _PAGE, "right")) - 1
            own = stored[which][page * _PAGE - bases[which] :][:_PAGE]
            yield slice(i * _PAGE, i * _PAGE + len(own)), own

    def address(self, tensor: Tensor) -> int:
        return (
            BASE
            + self._storages[tensor.untyped_storage().data_ptr()][0]
            + tensor.storage_offset() * tensor.element_size()
        )

    def write_back(self) -> None:
        """The bytes of every storage, as the kernels left them, into the tensors."""
        for kept, stored in self._pairs_of_pages():
            stored[:] = self._bytes[kept]

    def _places(self, address: np.ndarray, size: int, what: str) -> np.ndarray:
        if (wrong := address % size != 0).any():
            raise Fault(f"{what} of {size} bytes at a misaligned address {address[wrong][0]:#x}")
        first, known = self._kept(address.astype(np.int64) - BASE)
        places = np.where(known, first, 0)[:, None] + np.arange(size)
        if not (fine := known & self._allowed[places].all(1)).all():
            raise Fault(f"{what} of {size} bytes outside every tensor, at {address[~fine][0]:#x}")
        return places

    def load(self, address: np.ndarray, size: int, who: Lanes) -> np.ndarray:
        places = self._places(address, size, "load")
        self._refuse_others(places, who, "load")
        if ((self._write_epoch[places] == who.epoch) & (self._write_warp[places] != who.warp)).any():
            raise Fault("race: load of global bytes that another warp wrote since the last barrier")
        return self._bytes[places]

    def store(self, address: np.ndarray, data: np.ndarray, who: Lanes) -> None:
        places = self._places(address, data.shape[1], "store")
        self._refuse_others(places, who, "store")
        self._writer[places], self._write_warp[places], self._write_epoch[places] = who.block, who.warp, who.epoch
        self._bytes[places] = data
        if (self._writer[places] != who.block).any():
            raise Fault("two blocks store to the same global bytes")
        if (self._bytes[places] != data).any():
            raise Fault("two lanes store different values to the same global bytes")

    def _refuse_others(self, places: np.ndarray, who: Lanes, what: str) -> None:
        writer = self._writer[places]
        if ((writer >= 0) & (writer != who.block)).any():
            raise Fault(f"{what} of global bytes that another block wrote in the same launch")


class Shared:
    """The shared memory of a row of blocks. ``epoch`` counts each block's barriers: accesses of one byte by different
    warps within one epoch must all be reads, or be writes of the same value."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.bytes = np.full(blocks * size, 0xFF, np.uint8)
        self.epoch = np.zeros(blocks, np.int32)
        shape = blocks * size
        self._write_epoch, self._write_warp = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        self._read_epoch, self._read_warp = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
        self._unfenced = np.zeros(shape, bool)  # written by ordinary stores, not yet visible to wgmma
        self._arriving = np.zeros(shape, bool)  # cp.async under way
        self._held = np.zeros(shape, np.int16)  # wgmma under way that reads them

    def places(self, address: np.ndarray, size: int, block: np.ndarray, what: str) -> np.ndarray:
        """Indices (lanes, size) into :attr:`bytes`."""
        address = address.astype(np.int64)
        if (wrong := address % min(size, 16) != 0).any():
            raise Fault(f"{what} of {size} shared bytes at a misaligned address {address[wrong][0]}")
        if (wrong := (address < 0) | (address + size > self.size)).any():
            raise Fault(f"{what} of {size} shared bytes at {address[wrong][0]}, of {self.size}")
        return (block.astype(np.int64) * self.size + address)[:, None] + np.arange(size)

    def read(self, places: np.ndarray, warp: np.ndarray, block: np.ndarray) -> np.ndarray:
        """``places`` (lanes, bytes); ``warp`` and ``block`` per lane."""
        warp, epoch = warp[:, None], self.epoch[block][:, None]
        if self._arriving[places].any():
            raise Fault("read of shared bytes that cp.async has not brought yet")
        if ((self._write_epoch[places] == epoch) & (self._write_warp[places] != warp)).any():
            raise Fault("race: read of shared bytes that another warp wrote since the last barrier")
        known = self._read_epoch[places] == epoch
        several = known & (self._read_warp[places] != warp)
        self._read_epoch[places] = epoch
        self._read_warp[places] = warp
        several |= self._read_warp[places] != warp
        self._read_warp[places[several]] = _MANY
        return self.bytes[places]

    def write(
        self, places: np.ndarray, data: np.ndarray, warp: np.ndarray, block: np.ndarray, arriving: bool = False
    ) -> None:
        warp, epoch = warp[:, None], self.epoch[block][:, None]
        if self._held[places].any():
            raise Fault("write of shared bytes that a wgmma under way reads")
        if not arriving and self._arriving[places].any():
            raise Fault("write of shared bytes that cp.async has not brought yet")
        if ((self._read_epoch[places] == epoch) & (self._read_warp[places] != warp)).any():
            raise Fault("race: write of shared bytes that another warp read since the last barrier")
        if (
            (self._write_epoch[places] == epoch) & (self._write_warp[places] != warp) & (self.bytes[places] != data)
        ).any():
            raise Fault("race: write of shared bytes that another warp wrote since the last barrier")
        self._write_epoch[places] = epoch
        self._write_warp[places] = warp
        self._unfenced[places] = not arriving
        self.bytes[places] = data
        # Lanes of one warp may differ (a sum of products that each lane contracted its own way): one of them wins, as
        # on a GPU.
        if ((self._write_warp[places] != warp) & (self.bytes[places] != data)).any():
            raise Fault("two warps write different values to the same shared bytes")

    def expect(self, places: np.ndarray, warp: np.ndarray, block: np.ndarray) -> None:
        """``cp.async`` was issued: what lies there is gone, what comes is not there."""
        self.write(places, np.full(places.shape, 0xFF, np.uint8), warp, block, arriving=True)
        self._arriving[places] = True

    def arrive(self, places: np.ndarray, data: np.ndarray, warp: np.ndarray, block: np.ndarray) -> None:
        self._arriving[places] = False
        self.write(places, data, warp, block, arriving=True)

    def fence(self, warps: np.ndarray) -> None:
        """``fence.proxy.async`` by these warps: what they stored is visible to wgmma after the next barrier."""
        self._unfenced[np.isin(self._write_warp, warps) & self._unfenced] = False

    def hold(self, places: np.ndarray, block: int) -> np.ndarray:
        """A wgmma reads ``places`` (flat) until :meth:`release`."""
        if self._arriving[places].any():
            raise Fault("wgmma reads shared bytes that cp.async has not brought yet")
        if (self._write_epoch[places] == self.epoch[block]).any():
            raise Fault("race: wgmma reads shared bytes written since the last barrier")
        if self._unfenced[places].any():
            raise Fault("wgmma reads shared bytes stored without fence.proxy.async")
        self._held[places] += 1
        return self.bytes[places]

    def release(self, places: np.ndarray, block: int) -> None:
        self._held[places] -= 1
        self._read_epoch[places] = self.epoch[block]
        self._read_warp[places] = _MANY
