"""Launchers of shifted-window attention, and the final sums of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyvit.triton_kernels.common import arch_of, dropout_args, launch, precision, processors, rows_unit
from pyvit.triton_kernels.tiles import Config, choose, parts, window_bias_fits
from pyvit.triton_kernels.window_attention_backward import window_backward
from pyvit.triton_kernels.window_attention_backward_tiles import window_backward_keys, window_backward_queries
from pyvit.triton_kernels.window_attention_bias import table_gradient, window_backward_bias
from pyvit.triton_kernels.window_attention_forward import LN100, window_forward, window_forward_long
from torch import Tensor

from pyvit.ops.reference import window_padding

#: Windows of at most this many tokens share a tile of _PACKED rows.
_PACK_AREA, _PACKED = 32, 64
#: Larger windows are tiled.
_TILE = 64


def _strides(t: Tensor) -> tuple[int, int, int, int]:
    """Strides of images, rows and columns; the last number has 64 bits if offsets within an image need them, because a
    kernel's integers are as wide as their values."""
    b, y, x, _ = t.stride()
    span = (t.shape[1] - 1) * abs(y) + (t.shape[2] - 1) * abs(x)
    return b, y, x, 0 if span < 2**31 else 2**32


class _Map:
    """The geometry of a call, as kernel arguments."""

    def __init__(
        self,
        qkv: Tensor,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        num_heads: int,
        bias_table: Tensor | None,
        logit_scale: Tensor | None,
        pad_qkv: Tensor | None,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        self.qkv = rows_unit(qkv)
        self.batch, h, w, c3 = qkv.shape
        self.channels, self.heads, self.d = c3 // 3, num_heads, c3 // 3 // num_heads
        self.window = (window_size[0], window_size[1])
        self.area = self.window[0] * self.window[1]
        hp, wp, sy, sx = window_padding((h, w), self.window, (shift_size[0], shift_size[1]))
        self.windows = hp // self.window[0] * (wp // self.window[1])
        self.total = self.batch * self.windows
        self.arch, self.itemsize = arch_of(qkv), qkv.element_size()
        self.common: dict[str, Any] = {
            "qkv": self.qkv,
            "qkv_strides": _strides(self.qkv),
            "table": None if bias_table is None else bias_table.contiguous(),
            "logit_scale": None if logit_scale is None else logit_scale.contiguous(),
            # A map without padding has no padding tokens.
            "pad": None if pad_qkv is None or (hp, wp) == (h, w) else pad_qkv.contiguous(),
            "size": (h, w),
            "padded": None if (hp, wp) == (h, w) else (hp, wp),
            "shift": (sy, sx) if sy or sx else None,
            "windows": self.windows,
            "windows_x": wp // self.window[1],
            "total": self.total,
            "HEADS": self.heads,
            "scale": scale,
            **dropout_args(dropout_p, seed),
            "D": self.d,
            "D_PARTS": parts(self.d),
            "WINDOW": self.window,
            "PRECISION": precision(qkv),
        }
        self.set_pack(_PACKED if self.area <= _PACK_AREA else 0)

    def set_pack(self, rows: int) -> None:
        """Pack as many windows into a tile as fit into ``rows``, at least one."""
        self.pack = max(1, min(rows // self.area, self.total))
        self.rows = self.pack * self.area
        self.packs = -(-self.total // self.pack)
        self.common["PACK"] = self.pack

    def bias_bands(self, by_query: bool = False) -> Tensor | None:
        """The bias table in float32 with a row of biases for each column of a window: (heads, 2 wh - 1, ww, ww), where
        [h, qy - ky + wh - 1, ww - 1 - qx, kx] is the bias of a query and a key, so that biases of adjacent keys are
        adjacent; ``by_query``: [h, ky - qy + wh - 1, ww - 1 - kx, qx], for adjacent queries."""
        table = self.common["table"]
        if table is None:
            return None
        rows, cols = (2 * w - 1 for w in self.window)
        differences = table.t().reshape(self.heads, rows, cols)
        bands = differences.flip(1 if by_query else 2).unfold(2, self.window[1], 1)
        return table.new_empty(bands.shape, dtype=torch.float32).copy_(bands)

    def choose(self, kernel: str) -> Config:
        return choose(kernel, self.arch, self.itemsize, self.d, self.rows)

    def bias_fits(self) -> bool:
        return window_bias_fits(self.arch, self.itemsize, self.d, self.area)

    def pad_partial(self, groups: int, tiles: int) -> Tensor:
        return self.qkv.new_zeros((groups, tiles, 2, self.heads, self.d), dtype=torch.float32)

    def edges(self) -> int:
        """How many of the last windows of an axis may have regions, and so are kept apart from the others where a
        program holds the masks of its windows. Those of packs differ."""
        masked = self.common["padded"] is not None and self.common["pad"] is None
        return 0 if self.pack > 1 else (self.common["shift"] is not None) + masked

    def split_over_programs(self, config: Config, tiles: int, edges: int = 0) -> tuple[int, int]:
        """Number of groups of packs, and packs per group at most: ``config.group`` programs per processor. A group does
        not mix windows of the classes that ``edges`` make."""
        groups = max(1, min(self.packs, config.group * processors(self.qkv) // (self.heads * tiles)))
        share = max(1, -(-self.packs // groups))
        if edges == 0:
            return -(-self.packs // share), share
        x = self.common["windows_x"]
        rows, columns = ([max(n - edges, 0)] + [1] * min(edges, n) for n in (self.windows // x, x))
        return sum(-(-self.batch * r * c // share) for r in rows for c in columns), share


def _without(args: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in names}


def window_attention(
    qkv: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    num_heads: int,
    bias_table: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """out (B, H, W, C) and lse (B, windows, heads, area), as :func:`pyvit.ops.window_attention` states them."""
    m = _Map(qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv, scale, dropout_p, seed)
    out = qkv.new_empty(*qkv.shape[:3], m.channels)
    lse = qkv.new_empty(m.batch, m.windows, m.heads, m.area, dtype=torch.float32)
    if m.rows > _TILE and not m.bias_fits():
        c = m.choose("window_forward_long")
        args = _without(m.common, "table", "PACK", "total") | {"out": out, "out_strides": _strides(out), "lse": lse}
        own = {"bands": m.bias_bands(), "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "EDGE_N": c.edge_n}
        launch(window_forward_long, m.heads * m.total * -(-m.area // c.block_m), args | own, c.warps, c.stages)
        return out, lse
    c = m.choose("window_forward")
    tiles = -(-m.rows // c.block_m)
    edges = m.edges()
    groups, share = m.split_over_programs(c, tiles, edges)
    args = m.common | {
        "EDGES": edges,
        "out": out,
        "out_strides": _strides(out),
        "lse": lse,
        "share": share,
        "KEY_PARTS": parts(m.rows, c.block_n),
        "BLOCK_M": c.block_m,
    }
    launch(window_forward, m.heads * tiles * groups, args, c.warps, c.stages)
    return out, lse


def window_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    num_heads: int,
    bias_table: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias_table, logit_scale and pad_qkv; empty if not given."""
    m = _Map(qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv, scale, dropout_p, seed)
    grad_out, lse = rows_unit(grad_out), lse.contiguous()
    grad_qkv = qkv.new_empty(qkv.shape)
    args = m.common | {
        "grad_out": grad_out,
        "grad_out_strides": _strides(grad_out),
        "grad_qkv": grad_qkv,
        "grad_qkv_strides": _strides(grad_qkv),
    }
    c = m.choose("window_backward") if m.rows <= _TILE else None
    if c is not None and m.area <= c.block_m:
        m.set_pack(c.block_m if m.area <= _PACK_AREA else 0)
        groups, share = m.split_over_programs(c, 1)
        sums = _Sums(m, groups, (groups, 1))
        pad_partial = m.pad_partial(groups, 1)
        args |= {"PACK": m.pack, "lse": lse, "share": share, "BLOCK_M": c.block_m}
        args |= {"bias_partial": sums.bias, "logit_partial": sums.logit, "pad_partial": pad_partial}
        launch(window_backward, m.heads * groups, args, c.warps, c.stages)
    else:
        m.set_pack(0)
        sums, pad_partial = _gradients_by_tiles(m, args, rows_unit(out), lse)
    grad_pad = qkv.new_empty(0)
    if pad_qkv is not None:  # padding queries are not part of the output: their gradient is zero
        grad_pad = torch.cat([pad_partial.new_zeros(m.channels), pad_partial.sum((0, 1)).flatten()]).to(pad_qkv.dtype)
    return grad_qkv, sums.table_grad(bias_table, m), sums.logit_grad(logit_scale, m), grad_pad


def _gradients_by_tiles(m: _Map, args: dict[str, Any], out: Tensor, lse: Tensor) -> tuple[_Sums, Tensor]:
    """Backward of windows larger than a tile: a pass for the queries, one for keys and values, and one for the table
    where the queries' pass cannot hold its gradient."""
    held = m.bias_fits()
    c, k = m.choose("window_backward_queries"), m.choose("window_backward_keys")
    edges, tiles = m.edges() if held else 0, -(-m.area // c.block_m)
    groups, share = m.split_over_programs(c, tiles, edges)
    b = m.choose("window_backward_bias")
    bias_tiles = -(-m.area // b.block_m) * -(-m.area // b.block_n)
    bias_groups, bias_share = m.split_over_programs(b, bias_tiles)
    sums = _Sums(m, groups if held else bias_groups, (groups, tiles))
    args = _without(args, "table", "PACK") | {name: torch.empty_like(lse) for name in ("shifts", "rests", "row_sums")}
    table = {"table": m.common["table"] if held else None, "EDGES": edges}
    bands = None if held else m.bias_bands()
    own = {"out": out, "out_strides": _strides(out), "lse": lse, "share": share, "bands": bands}
    own |= {"bias_partial": sums.bias if held else None, "logit_partial": sums.logit}
    own |= {"KEY_PARTS": parts(m.area, c.block_n) if held else ()}
    own |= {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "EDGE_N": c.edge_n}
    launch(window_backward_queries, m.heads * tiles * groups, args | table | own, c.warps, c.stages)
    if sums.bias is not None and not held:
        own = {"bias_partial": sums.bias, "share": bias_share, "bands": bands}
        own |= {"BLOCK_M": b.block_m, "BLOCK_N": b.block_n}
        common = _without(args, "grad_qkv", "grad_qkv_strides")
        launch(window_backward_bias, m.heads * bias_tiles * bias_groups, common | own, b.warps, b.stages)
    tiles = -(-m.area // k.block_m)
    groups, share = m.split_over_programs(k, tiles, edges)
    pad_partial = m.pad_partial(groups, tiles)
    own = {"pad_partial": pad_partial, "share": share, "BLOCK_M": k.block_m, "BLOCK_N": k.block_n}
    own |= {"bands": None if held else m.bias_bands(by_query=True)}
    own |= {"QUERY_PARTS": parts(m.area, k.block_n) if held else ()}
    launch(window_backward_keys, m.heads * tiles * groups, args | table | own, k.warps, k.stages)
    return sums, pad_partial


class _Sums:
    """Partial sums of the gradients of the table (by groups of windows) and of the temperature (by ``programs`` per
    head); added in order at the end."""

    def __init__(self, m: _Map, groups: int, programs: tuple[int, int]) -> None:
        empty = torch.zeros if m.total == 0 else torch.empty
        like: dict[str, Any] = {"dtype": torch.float32, "device": m.qkv.device}
        table, logit = m.common["table"] is not None, m.common["logit_scale"] is not None
        self.bias = empty((groups, m.heads, m.rows, m.rows), **like) if table else None
        self.logit = empty((programs[0], programs[1], m.heads), **like) if logit else None

    def table_grad(self, table: Tensor | None, m: _Map) -> Tensor:
        if table is None or self.bias is None:
            return m.qkv.new_empty(0)
        grad = table.new_empty(table.shape)
        args = {"grad_bias": self.bias.sum(0), "grad_table": grad, "HEADS": m.heads, "WINDOW": m.window, "PACK": m.pack}
        entries, block = 16, 1 << (m.rows - 1).bit_length()
        grid = -(-table.shape[0] // entries) * m.heads
        launch(table_gradient, grid, args | {"ENTRIES": entries, "BLOCK": block}, 4, 1)
        return grad

    def logit_grad(self, logit_scale: Tensor | None, m: _Map) -> Tensor:
        if logit_scale is None or self.logit is None:
            return m.qkv.new_empty(0)
        # exp(min(scale, ln 100)) is constant above ln 100
        return torch.where(logit_scale.float() <= LN100.value, self.logit.sum((0, 1)), 0.0).to(logit_scale.dtype)
