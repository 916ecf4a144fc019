"""The diagrams of the kernels' pages: ``python docs/kernels/diagrams.py`` writes them beside this file."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
WIDTH = 760

# Diagrams have their own background, so that they can be read on a page of any colour.
_STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f; }
  .title { font-weight: 600; }
  .small { font-size: 12px; fill: #57606a; }
  .back { fill: #ffffff; stroke: #d0d7de; }
  .line { fill: none; stroke: #57606a; }
  .thick { fill: none; stroke: #24292f; stroke-width: 2; }
  .dash { fill: none; stroke: #57606a; stroke-dasharray: 5 4; }
  .plain { fill: #f6f8fa; stroke: #8c959f; }
  .q { fill: #b6d0f2; stroke: #3f6fb5; }
  .k { fill: #fad7ae; stroke: #c4762b; }
  .v { fill: #bfe3c4; stroke: #3d8b4c; }
  .s { fill: #e4d7f5; stroke: #8250df; }
  .hot { fill: #cf222e; fill-opacity: .25; stroke: #cf222e; stroke-width: 1.5; }
  .head { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .small { fill: #9198a1; }
    .back { fill: #161b22; stroke: #30363d; }
    .line, .dash { stroke: #9198a1; }
    .thick { stroke: #e6edf3; }
    .plain { fill: #21262d; stroke: #6e7681; }
    .q { fill: #1f3a5f; stroke: #6a9be0; }
    .k { fill: #57391a; stroke: #e0a060; }
    .v { fill: #1e4427; stroke: #6cc07b; }
    .s { fill: #3a2a55; stroke: #a98ae8; }
    .head { fill: #9198a1; }
  }
"""


def box(kind: str, x: float, y: float, w: float, h: float) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    wide = len(words) * (6.5 if kind == "small" else 7.1)  # of a wide font
    left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
    if left < 4 or left + wide > WIDTH - 4:
        raise ValueError(f"{words!r} does not fit into the drawing")
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def path(d: str, kind: str = "line") -> str:
    return f'<path class="{kind}" d="{d}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A horizontal or vertical arrow."""
    if y == to_y:
        sign = 1 if to_x > x else -1
        head = f"M{to_x:g} {y:g}l{-7 * sign} -4v8z"
    else:
        sign = 1 if to_y > y else -1
        head = f"M{to_x:g} {to_y:g}l-4 {-7 * sign}h8z"
    return path(f"M{x:g} {y:g}L{to_x:g} {to_y:g}") + f'<path class="head" d="{head}"/>'


def rows(kind: str, x: float, y: float, w: float, each: float, n: int) -> str:
    return "".join(box(kind, x, y + i * each, w, each) for i in range(n))


def columns(kind: str, x: float, y: float, each: float, h: float, n: int) -> str:
    return "".join(box(kind, x + i * each, y, each, h) for i in range(n))


def drawing(title: str, height: float, *parts: str) -> str:
    lines = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="back" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="6"/>',
        text(16, 26, title, "title"),
        *parts,
        "</svg>",
    )
    return "\n".join(lines) + "\n"


def attention_cpu() -> str:
    parts = [
        # q
        rows("q", 40, 70, 64, 40, 5),
        box("hot", 40, 110, 64, 40),
        text(72, 62, "q of a head", anchor="middle"),
        text(72, 290, "blocks of 48 rows", "small", "middle"),
        # k panels
        columns("k", 200, 70, 56, 64, 6),
        text(200, 62, "k, transposed, in panels of 64 keys (AVX-512), packed once per head"),
        text(544, 106, "d", "small"),
        # scores
        box("s", 200, 168, 336, 40),
        columns("line", 200, 168, 56, 40, 6),
        box("hot", 256, 168, 56, 10),
        text(200, 160, "scores of the block: whole rows, in the L2 cache"),
        text(544, 178, "register tile:"),
        text(544, 194, "6 rows x 64 keys", "small"),
        path("M108 130L192 174"),
        # softmax
        arrow(368, 212, 368, 236),
        text(380, 230, "softmax of whole rows: maximum, exp2, sum, in place"),
        # v and out
        rows("v", 200, 244, 64, 18, 6),
        text(232, 368, "v in panels", "small", "middle"),
        text(284, 290, "probabilities x v"),
        arrow(400, 286, 456, 286),
        box("q", 464, 266, 64, 40),
        text(540, 282, "output, divided by the sums;"),
        text(540, 298, "a log-sum-exp per row"),
        # threads
        text(16, 408, "Work of the threads: (image, head, piece of query blocks). A thread keeps the panels of a head"),
        text(16, 426, "while its next pieces are of the same head, and fetches the next head's rows meanwhile."),
    ]
    return drawing("Attention on a CPU, forward: one block of queries", 444, *parts)


def window_shift() -> str:
    cell, x0, y0 = 22, 40, 72
    size, window, shift = 8, 4, 2
    colours = ("s", "q", "k", "v")

    def region(y: int, x: int) -> int:
        """Which part of the map a token of the last window comes from."""
        return 2 * (y < shift) + (x < shift)

    parts = [text(x0, 60, "feature map, 8 x 8 tokens")]
    for y in range(size):
        for x in range(size):
            last = (y - shift) % size >= window and (x - shift) % size >= window
            kind = colours[region(y, x)] if last else "plain"
            parts.append(box(kind, x0 + x * cell, y0 + y * cell, cell, cell))
    for at in (shift, shift + window):
        parts.append(path(f"M{x0 + at * cell} {y0}v{size * cell}M{x0} {y0 + at * cell}h{size * cell}", "thick"))
    parts += [
        text(x0, 268, "windows of 4, shifted by 2;", "small"),
        text(x0, 284, "coloured: the last window", "small"),
    ]
    wx, wy = 296, 116
    parts += [text(wx - 8, 104, "the last window"), arrow(226, 160, 286, 160)]
    places = [((i - window + shift) % size, (j - window + shift) % size) for i in range(window) for j in range(window)]
    regions = [region(y, x) for y, x in places]
    for n, r in enumerate(regions):
        parts.append(box(colours[r], wx + n % window * cell, wy + n // window * cell, cell, cell))
    parts.append(text(wx, 222, "four regions", "small"))
    sx, sy, each = 470, 72, 12
    parts += [text(sx, 60, "its scores: 16 keys x 16 queries"), arrow(394, 160, 460, 160)]
    for i, a in enumerate(regions):
        for j, b in enumerate(regions):
            parts.append(box(colours[a] if a == b else "plain", sx + j * each, sy + i * each, each, each))
    parts += [
        text(sx, 284, "no colour: no attention", "small"),
        text(16, 318, "Row y of a shifted window is row (y + shift) mod height of the map, and a token's region"),
        text(16, 336, "follows from the same numbers. Nothing is rolled, cut or masked in memory."),
    ]
    return drawing("Shifted windows by index arithmetic", 354, *parts)


def window_scores() -> str:
    parts = [
        columns("s", 90, 74, 96, 150, 3),
        box("k", 392, 74, 14, 150),
        path("".join(f"M90 {86 + 12 * i}h288" for i in range(7)), "dash"),
        box("hot", 90, 74, 288, 96),
        text(90, 62, "16 queries"),
        text(186, 62, "16"),
        text(282, 62, "16"),
        text(394, 62, "1"),
        text(80, 154, "49 keys", anchor="end"),
        arrow(138, 176, 138, 218),
        text(430, 98, "red: a register tile, 8 keys x 48 queries", "small"),
        text(430, 190, "maximum and sum of the softmax", "small"),
        text(430, 206, "run down the columns", "small"),
        text(
            16, 256, "A vector register holds the scores of one key and 16 queries, so the softmax needs no reduction"
        ),
        text(
            16, 274, "across a register. 49 = 3 x 16 + 1: the remaining query is computed by dot products, instead of"
        ),
        text(16, 292, "in a fourth register of 15 zeros. All scores of a window stay in the L1 cache."),
    ]
    return drawing("Scores of a 7 x 7 window on a CPU (AVX-512): keys as rows, queries as columns", 310, *parts)


def patch_embed() -> str:
    cell, x0, y0 = 30, 30, 78
    kept = {1, 4, 6, 11, 12, 14}
    parts = [text(x0, 66, "image")]
    for i in range(16):
        parts.append(box("q" if i in kept else "plain", x0 + i % 4 * cell, y0 + i // 4 * cell, cell, cell))
    parts += [
        text(x0, 218, "blue: kept patches;", "small"),
        text(x0, 234, "others are not read", "small"),
        arrow(156, 138, 196, 138),
        text(204, 66, "block of patches"),
        rows("q", 204, 96, 150, 14, 6),
        text(204, 218, "rows of pixels, normalised", "small"),
        text(204, 234, "while gathered, in cache", "small"),
        text(368, 142, "x"),
        columns("k", 392, 78, 32, 120, 3),
        text(392, 66, "weight"),
        text(392, 218, "packed panels", "small"),
        arrow(500, 138, 540, 138),
        box("s", 548, 82, 96, 14),
        rows("v", 548, 96, 96, 14, 7),
        text(548, 66, "tokens"),
        text(652, 93, "class token", "small"),
        text(652, 142, "+ bias", "small"),
        text(652, 158, "+ position", "small"),
        text(548, 218, "written once, where", "small"),
        text(548, 234, "the first block reads", "small"),
    ]
    return drawing("Patch embedding: one matrix product whose left operand is gathered", 252, *parts)


def attention_gpu_short() -> str:
    parts = [
        box("dash", 30, 48, 700, 234),
        text(42, 68, "on chip: one head"),
        rows("q", 90, 96, 64, 44, 4),
        box("hot", 90, 140, 64, 44),
        text(122, 88, "q", anchor="middle"),
        text(166, 256, "tiles of 64 or 128 rows", "small"),
        text(260, 88, "all keys, in parts that are powers of two: 128 + 64 + 16"),
        box("k", 260, 96, 192, 36),
        box("k", 452, 96, 96, 36),
        box("k", 548, 96, 24, 36),
        arrow(158, 162, 252, 162),
        box("s", 260, 144, 312, 36),
        text(270, 167, "scores of the tile: one softmax, whole rows"),
        box("v", 260, 192, 192, 36),
        box("v", 452, 192, 96, 36),
        box("v", 548, 192, 24, 36),
        text(582, 214, "all values", "small"),
        arrow(576, 162, 640, 162),
        box("q", 648, 140, 64, 44),
        text(680, 132, "out", anchor="middle"),
        text(16, 310, "Nothing is rescaled, and keys and values are read once. 197 keys take 208 columns, not 256."),
        text(16, 328, "On sm_90, with many heads, a program takes one head after another and loads the next"),
        text(16, 346, "while it computes."),
    ]
    return drawing("Attention on a GPU, up to 288 keys: forward", 364, *parts)


def attention_gpu_long() -> str:
    def grid(x: float, y: float) -> str:
        return "".join(box("plain", x + 30 * j, y + 30 * i, 30, 30) for i in range(5) for j in range(5))

    parts = [
        # forward
        text(30, 60, "forward"),
        grid(60, 84),
        *(box("s", 60 + 30 * j, 144, 30, 30) for j in range(5)),
        box("q", 24, 144, 26, 30),
        text(37, 164, "q", anchor="middle"),
        arrow(62, 159, 206, 159),
        text(60, 78, "keys", "small"),
        text(30, 256, "one program per tile of queries;", "small"),
        text(30, 272, "a running maximum and sum", "small"),
        # dq
        text(274, 60, "backward, dQ"),
        grid(304, 84),
        *(box("s", 304 + 30 * j, 144, 30, 30) for j in range(5)),
        box("q", 268, 144, 26, 30),
        text(281, 164, "dq", anchor="middle"),
        arrow(306, 159, 450, 159),
        text(274, 256, "the same rows: owns its dq,", "small"),
        text(274, 272, "stores sums per row", "small"),
        # dk dv
        text(518, 60, "backward, dK and dV"),
        grid(548, 84),
        *(box("s", 608, 84 + 30 * i, 30, 30) for i in range(5)),
        box("k", 608, 240, 30, 12),
        box("v", 608, 252, 30, 12),
        arrow(623, 86, 623, 230),
        text(646, 254, "dk, dv"),
        text(518, 288, "one program per block of keys: owns", "small"),
        text(518, 304, "its dk and dv, loops over queries", "small"),
        text(30, 330, "No gradient has two owners, so none needs atomics, and its bits do not depend on the schedule."),
    ]
    return drawing("Attention on a GPU, longer sequences: who owns what of the scores", 348, *parts)


def backward_short() -> str:
    parts = [
        box("dash", 30, 48, 700, 220),
        text(42, 68, "on chip: one head"),
        rows("q", 90, 96, 64, 40, 4),
        rows("v", 164, 96, 64, 40, 4),
        rows("s", 600, 96, 64, 40, 4),
        text(122, 88, "q", anchor="middle"),
        text(196, 88, "dO", anchor="middle"),
        text(632, 88, "dQ", anchor="middle"),
        columns("plain", 300, 112, 40, 128, 5),
        box("k", 380, 112, 40, 128),
        text(400, 104, "k, v: a block of keys", anchor="middle"),
        arrow(342, 176, 376, 176),
        arrow(424, 176, 498, 176),
        text(400, 260, "dK and dV of the block: written once", "small", "middle"),
        text(
            16, 296, "The loop runs over blocks of keys. For each: scores, probabilities from the log-sum-exp, dV, dP,"
        ),
        text(16, 314, "dK, and a part of dQ, which stays in registers: five products instead of the seven of two"),
        text(16, 332, "passes, and every tensor is read once."),
    ]
    return drawing("Attention on a GPU, up to 288 queries: backward in one program per head", 350, *parts)


DIAGRAMS = {
    "attention-cpu.svg": attention_cpu,
    "window-shift.svg": window_shift,
    "window-scores.svg": window_scores,
    "patch-embed.svg": patch_embed,
    "attention-gpu-short.svg": attention_gpu_short,
    "attention-gpu-backward-short.svg": backward_short,
    "attention-gpu-long.svg": attention_gpu_long,
}

if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (HERE / name).write_text(draw())
