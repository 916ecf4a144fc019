"""Evaluation with two processes: each decodes half of the images, both get all results and know the unreadable
files."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys, torch, warnings
import torch.distributed as dist
from pyvit.data.files import DecodedImages
from pyvit.eval.features import labels_of, over

class Fragile:
    shape = (1, 1, 1)
    def __init__(self):
        self.read = 0
    def whole(self, source):
        self.read += 1
        if source < 0:
            raise ValueError("negative")
        return torch.full((1, 1, 1), source, dtype=torch.uint8)

rank, meeting = int(sys.argv[1]), sys.argv[2]
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
items = [9, 8, -1, 7, 6, 5, 4, -1, 3, 2]
images = DecodedImages(items, Fragile(), list(range(10)))
if rank == 1:
    images.fetch([2])  # found in training, by one process alone
    images.decoder.read = 0
for again in range(2):
    got = over(images, lambda b: b["image"].flatten().float(), batch=2, group=dist.group.WORLD)
    assert got.tolist() == [9, 8, 7, 6, 5, 4, 3, 2], got
    assert labels_of(images).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
assert images.decoder.read <= 9, images.decoder.read
dist.destroy_process_group()
"""


def test_two_ranks_share_an_evaluation(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stderr=subprocess.PIPE, text=True, env=env)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
