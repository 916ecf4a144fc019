"""The runs of docs/results.md, as data."""

from __future__ import annotations

from dataclasses import dataclass

#: Every run is repeated with these seeds.
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """A run of ``pyvit train``.

    Args:
        name: of the row and of the run's folder.
        command: arguments of ``pyvit train``, without the seed and the folder.
        table: the table of the page that shows it.
        init: the row whose weights ``--init`` loads, of the same seed.
        probe: also measure k-NN and a linear probe on the frozen features, before and after training.
        evaluate: further subcommands of ``pyvit eval`` whose figures are recorded.
        sheets: subcommands of ``pyvit eval`` whose picture of the first seed is kept.
        peers: functions of :mod:`benchmarks.learning.peers` that train the same network for the same CPU time.
    """

    name: str
    command: str
    table: str
    init: str | None = None
    probe: bool = False
    evaluate: tuple[str, ...] = ()
    sheets: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()


_FASHION = "--data fashion-mnist --precision bf16"
_STEM = "--model vit_pico_conv_s8_32 --image-size 32"
_FEW = f"{_FASHION} --train-images 1000"

ROWS = (
    Row("supervised-vit", f"supervised {_FASHION}", "supervised", peers=("timm",)),
    Row("supervised-conv", f"supervised {_FASHION} --model vit_pico_conv_s4_28", "supervised"),
    Row("supervised-swin", f"supervised {_FASHION} --model swin_pico_patch2_window7_28 --epochs 4", "supervised"),
    Row("simclr", f"simclr {_FASHION} {_STEM}", "self-supervised", probe=True, peers=("lightly_simclr",)),
    Row(
        "dino",
        f"dino {_FASHION} {_STEM}",
        "self-supervised",
        probe=True,
        sheets=("attention",),
        peers=("lightly_dino",),
    ),
    Row("dinov2", f"dinov2 {_FASHION} {_STEM}", "self-supervised", probe=True, sheets=("patches",)),
    Row("mae", f"mae {_FASHION}", "self-supervised", probe=True, sheets=("reconstruct",)),
    Row("mae-1000", f"finetune {_FEW}", "few labels", init="mae"),
    Row("scratch-1000", f"supervised {_FEW} --epochs 60 --batch-size 64 --option augment=mild", "few labels"),
    Row("clip-emoji", "clip --data emoji --precision bf16", "captions", evaluate=("zero-shot", "retrieval")),
    Row("siglip-emoji", "siglip --data emoji --precision bf16", "captions", evaluate=("zero-shot", "retrieval")),
    Row("clip-scenes", "clip --data scenes", "captions", evaluate=("retrieval",), sheets=("retrieval",)),
    Row("siglip-scenes", "siglip --data scenes", "captions", evaluate=("retrieval",)),
    Row("words", "supervised --data words", "sound"),
)

#: Variants of a short dinov2 run: each changes one setting.
_SHORT = f"dinov2 {_FASHION} {_STEM} --epochs 1"
VARIANTS = {
    "all": "",
    "no iBOT": "--option ibot=0.0",
    "no KoLeo": "--option koleo=0.0",
    "one head for both losses": "--option separate_head=False",
    "centering instead of Sinkhorn-Knopp": "--option centering=centering",
    "LayerScale 1e-5": "--option layer_scale=1e-5",
    "stochastic depth 0.1": "--option drop_path=0.1",
    "SwiGLU": "--option ffn=swiglu",
    "momentum 0.996": "--option momentum=0.996",
}
ABLATION = tuple(
    Row(f"dinov2-{i}", f"{_SHORT} {change}".strip(), "ablation", probe=True)
    for i, change in enumerate(VARIANTS.values())
)


def row_of(name: str) -> Row:
    """The row of this name. Raises ValueError for an unknown one."""
    known = {row.name: row for row in (*ROWS, *ABLATION)}
    if name not in known:
        raise ValueError(f"results: ROW must be one of {', '.join(known)}, got {name!r}")
    return known[name]
