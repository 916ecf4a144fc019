"""Runs requests on the emulated CUDA library, with the sanitizers preloaded: pickles on stdin and stdout."""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
from typing import Any

import torch


def call(library: ctypes.CDLL, name: str, args: tuple[Any, ...]) -> tuple[str | None, list[torch.Tensor]]:
    function = getattr(library, name)
    function.restype = ctypes.c_char_p if not name.endswith(("_skip", "_seed", "_limit", "_forget_sites")) else None
    # A new allocation of exactly the tensor's size, so that out-of-bounds accesses are detected.
    tensors = {i: a.clone() for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
    text = function(*(ctypes.c_void_p(tensors[i].data_ptr()) if i in tensors else a for i, a in enumerate(args)))
    return (text.decode() if text else None), list(tensors.values())


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # all output goes to stderr
    torch.ops.load_library(sys.argv[1])
    library = ctypes.CDLL(sys.argv[1])
    while True:
        try:
            kind, name, args, seed = pickle.load(requests)
        except EOFError:
            return
        library.pyvit_emulation_seed(ctypes.c_uint64(seed))
        try:
            answer = ("ok", getattr(torch.ops.pyvit_cuda, name)(*args) if kind == "op" else call(library, name, args))
        except Exception as error:  # report every failure to the calling test
            answer = ("error", f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
