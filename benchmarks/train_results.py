"""Train every recipe on a CPU and write docs/results.md: ``python -m benchmarks.train_results [NAME ...]``.

Runs are saved in ``runs/results``. An interrupted run resumes from its last checkpoint; a finished run is only
evaluated. The page is rewritten after every run. Seeds are fixed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pyvit.data import load_data
from pyvit.eval.features import features, labels_of
from pyvit.eval.knn import knn_accuracy
from pyvit.eval.linear import linear_probe
from pyvit.train import Config, train
from pyvit.train.checkpoint import write_atomic
from pyvit.train.runs import load_run

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "results"

#: name -> arguments of ``pyvit train``, as on the command line.
TRAINED = {
    "supervised-vit": "supervised --data digits",
    "supervised-swin": "supervised --data digits --model swin_pico_patch4_window4_32",
    "words": "supervised --data words",
    "mae": "mae --data digits --model vit_pico_patch4_32",
    "dino": "dino --data digits --set global_pool=avg",
    "dinov2": "dinov2 --data digits --set global_pool=avg --epochs 15",
    "simclr": "simclr --data digits",
    "clip": "clip --data digits",
    "siglip": "siglip --data digits",
    "scenes": "clip --data scenes",
}

#: Ablations of DINOv2 (table 1 of the paper), by the option that each changes.
ABLATION = {
    "ablation-no-koleo": "koleo=0.0",
    "ablation-no-ibot": "ibot=0.0",
    "ablation-shared-head": "separate_head=False",
    "ablation-centering": "centering='centering'",
}
SELF_SUPERVISED = ("mae", "dino", "dinov2", "simclr", *ABLATION)


def config(name: str) -> tuple[Config, str]:
    """The settings of a run and its command line."""
    line = TRAINED.get(name) or f"{TRAINED['dinov2']} --option {ABLATION[name]}"
    words = line.split()
    settings: dict[str, object] = {"recipe": words[0], "out": str(RUNS / name), "save_every": 50}
    for flag, value in zip(words[1::2], words[2::2], strict=True):
        settings[flag[2:]] = [value] if flag in ("--option", "--set") else float(value) if flag == "--epochs" else value
    return Config(**settings), f"pyvit train {line}"


def measure(name: str) -> str:
    """Train or resume one run, evaluate it and return its row of the table."""
    settings, line = config(name)
    folder = RUNS / name
    results = train(settings)  # refuses a folder that holds a run of other settings
    if name in SELF_SUPERVISED:
        recipe, data = load_run(folder)
        splits = (data.train, data.test)
        trained = [features(recipe.exported(), split, recipe.normalize) for split in splits]
        results["linear"] = linear_probe(*trained)["linear"]
        torch.manual_seed(0)
        initial = type(recipe)(recipe.config, data).eval()
        untrained = [features(initial.exported(), split, recipe.normalize) for split in splits]
        results["untrained knn"] = knn_accuracy(*untrained)
        results["untrained linear"] = linear_probe(*untrained)["linear"]
    if name == "words":
        results = {f"accuracy ({load_data('words').extra['voice']})": results["accuracy"]}
    if name == "scenes":
        from pyvit.eval.retrieval import quadrant_accuracy

        results["quadrant"] = quadrant_accuracy(*load_run(folder))
    figures = ", ".join(f"{k} {v:.3g}" if k == "test_loss" else f"{k} {v:.1f} %" for k, v in results.items())
    return f"| {name} | `{line}` | {figures} |"


def raw_pixels() -> str:
    """k-NN and linear probe on raw pixels."""
    data = load_data("digits")
    pair = [(split.images[:, :1].flatten(1).float(), labels_of(split)) for split in (data.train, data.test)]
    return f"| raw pixels | | knn {knn_accuracy(*pair):.1f} %, linear {linear_probe(*pair)['linear']:.1f} % |"


def write(name: str, row: str) -> None:
    """Add or replace the row of ``name`` in the page's table."""
    page = ROOT / "docs" / "results.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    table, _, after = rest.partition("<!-- end -->")
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]} | {name: row}
    known = [rows[n] for n in ("raw pixels", *TRAINED, *ABLATION) if n in rows]
    lines = ["| run | command | held-out results |", "|---|---|---|", *known]
    write_atomic(
        page, lambda file: file.write(f"{before}<!-- table -->\n{chr(10).join(lines)}\n<!-- end -->{after}".encode())
    )


def main(names: list[str]) -> None:
    wanted = names or [*TRAINED, *ABLATION]
    unknown = set(wanted) - {*TRAINED, *ABLATION}
    if unknown:
        sys.exit(f"results: NAME must be one of {', '.join([*TRAINED, *ABLATION])}, got {', '.join(sorted(unknown))}")
    write("raw pixels", raw_pixels())
    for name in wanted:
        row = measure(name)
        write(name, row)
        print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
