"""Another process that loads saved denoisers and runs them: one that never imported ldpruner, and one that did."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import caches  # noqa: F401  what calls may hold
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

LIBRARY = {"portable": "diffusers", "plugin": "ldpruner"}  # what the other process imports before it loads


class Loader:
    """A process that outlives single loads, as importing diffusers takes longer than a load."""

    def __init__(self, form: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, LIBRARY[form]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def outputs(self, folder: Path, call: Any) -> list[Tensor]:
        """What the denoiser in `folder` gives for the call. Raises `AssertionError` with the other process's error."""
        leaves, spec = tree_flatten((call.args, call.kwargs))
        tensors = {str(place): leaf.contiguous() for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        save_file(tensors, folder.with_suffix(".call.safetensors"))
        plain = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        order = {"folder": str(folder), "leaves": plain, "spec": treespec_dumps(spec)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert not answer["error"], answer["error"]
        made = load_file(folder.with_suffix(".made.safetensors"))
        return [made[str(place)] for place in range(len(made))]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _serve() -> None:
    torch.set_num_threads(1)
    importlib.import_module(sys.argv[1])
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever diffusers prints does not get among the answers
    for line in sys.stdin:
        error = ""
        try:
            _load_and_run(json.loads(line))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps({"error": error}), file=answers, flush=True)


def _load_and_run(order: dict[str, Any]) -> None:
    from diffusers import AutoModel

    folder = Path(order["folder"])
    has_code = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loaded = AutoModel.from_pretrained(str(folder), trust_remote_code=has_code)
    # A file's tensors begin anywhere in memory, those of PyTorch at multiples of 64 bytes: on some processors last bits differ.
    denoiser = copy.deepcopy(loaded)
    tensors = {place: leaf.clone() for place, leaf in load_file(folder.with_suffix(".call.safetensors")).items()}
    leaves = [tensors.get(str(place), leaf) for place, leaf in enumerate(order["leaves"])]
    args, kwargs = tree_unflatten(leaves, treespec_loads(order["spec"]))
    with torch.no_grad():
        made = [leaf for leaf in tree_flatten(denoiser(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
    save_file({str(place): tensor.contiguous() for place, tensor in enumerate(made)}, folder.with_suffix(".made.safetensors"))


if __name__ == "__main__":
    _serve()
