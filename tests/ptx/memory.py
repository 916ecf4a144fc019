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
#: A stamp is a number of barriers passed times this, plus a warp. The last one stands for several warps.
_WARPS = 1 << 10
_SEVERAL = _WARPS - 1
#: The stamp of shared bytes that a ``cp.async`` under way will write.
_COMING = np.iinfo(np.int32).max
#: A stamp of global memory also holds the block, plus one, times this.
_BLOCK = 1 << 40


class Fault(AssertionError):
    """An error that a GPU might not report: an access out of bounds, a race, a read of bytes that have not arrived."""


class Places(NamedTuple):
    """Accesses of ``size`` aligned bytes each, in an array with one element per byte."""

    row: np.ndarray
    size: int

    def of(self, array: np.ndarray) -> np.ndarray:
        """The elements (accesses, size)."""
        return array.reshape(-1, self.size).take(self.row, 0)

    def put(self, array: np.ndarray, value: np.ndarray | int | bool) -> None:
        array.reshape(-1, self.size)[self.row] = value

    def add(self, array: np.ndarray, value: int) -> None:
        np.add.at(array.reshape(-1, self.size), self.row, array.dtype.type(value))

    def only(self, chosen: np.ndarray) -> Places:
        return Places(self.row[chosen], self.size)


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
        used = np.zeros(end // _PAGE + 1, bool)
        for at, _ in starts:
            used[at // _PAGE] = True
        self._pages = np.flatnonzero(used)
        self._slot = np.where(used, np.cumsum(used) - 1, -1)  # of a page among those stored; the last one never is
        size = len(self._pages) * _PAGE
        self._bytes = np.zeros(size, np.uint8)
        self._allowed = np.zeros(size, bool)
        self._writer = np.zeros(size, np.int64)  # stamps
        self._stored_to = np.zeros(len(self._pages), bool)
        for kept, stored in self._pairs_of_pages():
            self._bytes[kept] = stored
        for at, itemsize in starts:
            Places((self._slot[at // _PAGE] * _PAGE + at % _PAGE) // itemsize, itemsize).put(self._allowed, True)

    def _starts(self, tensor: Tensor) -> tuple[np.ndarray, int]:
        """Where the elements of ``tensor`` begin, and their size, bytes."""
        at = np.array([tensor.storage_offset()])
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride or not n:
                at = (at[:, None] + np.arange(n) * stride).ravel()
        first, _ = self._storages[tensor.untyped_storage().data_ptr()]
        return first + at * tensor.element_size(), tensor.element_size()

    def _pairs_of_pages(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Each page: where it is kept, and the storage's own bytes."""
        bases = np.array([at for at, _ in self._storages.values()])
        stored = [torch.tensor([], dtype=torch.uint8).set_(storage).numpy() for _, storage in self._storages.values()]
        for i, page in enumerate(self._pages):
            which = int(np.searchsorted(bases, page * _PAGE, "right")) - 1
            own = stored[which][page * _PAGE - bases[which] :][:_PAGE]
            yield slice(i * _PAGE, i * _PAGE + len(own)), own

    def address(self, tensor: Tensor) -> int:
        first, _ = self._storages[tensor.untyped_storage().data_ptr()]
        return BASE + first + tensor.storage_offset() * tensor.element_size()

    def write_back(self) -> None:
        """The bytes of every storage, as the kernels left them, into the tensors."""
        for kept, stored in self._pairs_of_pages():
            stored[:] = self._bytes[kept]

    def _places(self, address: np.ndarray, size: int, what: str) -> tuple[Places, np.ndarray]:
        """Of each access: its place, and the slot of its page."""
        at = address.view(np.int64) - BASE
        if (wrong := at % size != 0).any():
            raise Fault(f"{what} of {size} bytes at a misaligned address {address[wrong][0]:#x}")
        page = at // _PAGE
        slot = self._slot[np.where((page >= 0) & (page < len(self._slot)), page, -1)]
        known = slot >= 0
        if known.all():
            places = Places((slot * _PAGE + at % _PAGE) // size, size)
            known = places.of(self._allowed).all(1)
        if not known.all():
            raise Fault(f"{what} of {size} bytes outside every tensor, at {address[~known][0]:#x}")
        return places, slot

    def load(self, address: np.ndarray, size: int, who: np.ndarray) -> np.ndarray:
        """``who``: each access's stamp, see :meth:`stamps`."""
        places, slot = self._places(address, size, "load")
        if self._stored_to[slot].any():
            writer = places.of(self._writer)
            self._refuse_others(writer, who, "load")
            if ((writer // _WARPS == who // _WARPS) & (writer != who)).any():
                raise Fault("race: load of global bytes that another warp wrote since the last barrier")
        return places.of(self._bytes)

    def store(self, address: np.ndarray, data: np.ndarray, who: np.ndarray) -> None:
        places, slot = self._places(address, data.shape[1], "store")
        if self._stored_to[slot].any():
            self._refuse_others(places.of(self._writer), who, "store")
        self._stored_to[slot] = True
        places.put(self._writer, who)
        places.put(self._bytes, data)
        if (places.of(self._writer) // _BLOCK != who // _BLOCK).any():
            raise Fault("two blocks store to the same global bytes")
        if (places.of(self._bytes) != data).any():
            raise Fault("two lanes store different values to the same global bytes")

    @staticmethod
    def stamps(block: np.ndarray, warp: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Block of the grid, warp, and number of barriers their block has passed, as a column of stamps."""
        return ((block.astype(np.int64) + 1) * _BLOCK + epoch * _WARPS + warp)[:, None]

    @staticmethod
    def _refuse_others(writer: np.ndarray, who: np.ndarray, what: str) -> None:
        if ((writer > 0) & (writer // _BLOCK != who // _BLOCK)).any():
            raise Fault(f"{what} of global bytes that another block wrote in the same launch")


class Shared:
    """The shared memory of a row of blocks. ``epoch`` counts each block's barriers: accesses of one byte by different
    warps within one epoch must all be reads, or be writes of the same value."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self._pitch = -(-size // 16) * 16  # bytes of a block, so that every access is aligned here too
        self.epoch = np.zeros(blocks, np.int32)
        shape = blocks * self._pitch
        self.bytes = np.full(shape, 0xFF, np.uint8)
        self._written, self._read = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)  # stamps
        self._unfenced = np.zeros(shape, bool)  # written by ordinary stores, not yet visible to wgmma
        self._held = np.zeros(shape, np.int16)  # wgmma under way that reads them
        self._holds = 0  # accesses by products under way

    def places(self, address: np.ndarray, size: int, block: np.ndarray, what: str) -> Places:
        address = address.astype(np.int64)
        if (wrong := address % size != 0).any():
            raise Fault(f"{what} of {size} shared bytes at a misaligned address {address[wrong][0]}")
        if (wrong := (address < 0) | (address + size > self.size)).any():
            raise Fault(f"{what} of {size} shared bytes at {address[wrong][0]}, of {self.size}")
        return Places((block * self._pitch + address) // size, size)

    def _stamps(self, warp: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each access, as columns: the first stamp since the last barrier, and its own. Within that time, a larger
        stamp than the first that is not its own is another warp's."""
        first = self.epoch[block][:, None] * _WARPS
        return first, first + warp[:, None]

    def read(self, places: Places, warp: np.ndarray, block: np.ndarray) -> np.ndarray:
        """``warp`` and ``block`` per access."""
        first, own = self._stamps(warp, block)
        written = places.of(self._written)
        if ((written >= first) & (written != own)).any():
            if (written == _COMING).any():
                raise Fault("read of shared bytes that cp.async has not brought yet")
            raise Fault("race: read of shared bytes that another warp wrote since the last barrier")
        before = places.of(self._read)
        places.put(self._read, own)
        several = ((before >= first) & (before != own)) | (places.of(self._read) != own)
        if several.any():
            row, byte = several.nonzero()
            self._read[places.row[row] * places.size + byte] = first[row, 0] + _SEVERAL
        return places.of(self.bytes)

    def write(
        self, places: Places, data: np.ndarray, warp: np.ndarray, block: np.ndarray, arriving: bool = False
    ) -> None:
        first, own = self._stamps(warp, block)
        if self._holds and places.of(self._held).any():
            raise Fault("write of shared bytes that a wgmma under way reads")
        written, read = places.of(self._written), places.of(self._read)
        if ((read >= first) & (read != own)).any():
            raise Fault("race: write of shared bytes that another warp read since the last barrier")
        others = (written >= first) & (written != own)
        if others.any():
            coming = written == _COMING
            if coming.any() and not arriving:
                raise Fault("write of shared bytes that cp.async has not brought yet")
            if (others & ~coming & (places.of(self.bytes) != data)).any():
                raise Fault("race: write of shared bytes that another warp wrote since the last barrier")
        places.put(self._written, own)
        places.put(self._unfenced, not arriving)
        places.put(self.bytes, data)
        # Lanes of one warp may differ (a sum of products that each lane contracted its own way): one of them wins, as
        # on a GPU.
        if ((places.of(self._written) != own) & (places.of(self.bytes) != data)).any():
            raise Fault("two warps write different values to the same shared bytes")

    def expect(self, places: Places, warp: np.ndarray, block: np.ndarray) -> None:
        """``cp.async`` was issued: what lies there is gone, what comes is not there."""
        self.write(places, np.full((len(places.row), places.size), 0xFF, np.uint8), warp, block, arriving=True)
        places.put(self._written, _COMING)

    def arrive(self, places: Places, data: np.ndarray, warp: np.ndarray, block: np.ndarray) -> None:
        self.write(places, data, warp, block, arriving=True)

    def fence(self, warps: np.ndarray) -> None:
        """``fence.proxy.async`` by these warps: what they stored is visible to wgmma after the next barrier."""
        stored = np.flatnonzero(self._unfenced)
        self._unfenced[stored[np.isin(self._written[stored] % _WARPS, warps)]] = False

    def hold(self, places: Places, block: np.ndarray) -> np.ndarray:
        """A wgmma reads ``places`` until :meth:`release`."""
        written = places.of(self._written)
        if (written >= self.epoch[block][:, None] * _WARPS).any():
            if (written == _COMING).any():
                raise Fault("wgmma reads shared bytes that cp.async has not brought yet")
            raise Fault("race: wgmma reads shared bytes written since the last barrier")
        if places.of(self._unfenced).any():
            raise Fault("wgmma reads shared bytes stored without fence.proxy.async")
        places.add(self._held, 1)
        self._holds += len(places.row)
        return places.of(self.bytes)

    def release(self, places: Places, block: np.ndarray) -> None:
        places.add(self._held, -1)
        self._holds -= len(places.row)
        places.put(self._read, self.epoch[block][:, None] * _WARPS + _SEVERAL)
