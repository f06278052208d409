"""Where a figure was taken: device, threads, dtype and versions, and how much memory the process takes."""

from __future__ import annotations

import gc
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ldpruner.operators.timing import device_of, give_back


def environment(denoiser: nn.Module) -> dict[str, Any]:
    """Where and with what a time was taken."""
    device = device_of(denoiser)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(next(denoiser.parameters()).dtype).removeprefix("torch."),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "diffusers", "ldpruner")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    except OSError:
        names = set()
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    return int(psutil.Process().memory_info().rss)


def release_memory() -> None:
    """Give back to the system what was freed, so that it does not count as in use."""
    gc.collect()
    give_back()


def reset_peak(device: torch.device) -> bool:
    """Begin to watch for the highest use of memory anew; False where this system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: forget the highest resident size
    except OSError:
        return False
    return True


def peak_since_reset(device: torch.device) -> int:
    """The most memory in use since `reset_peak`: allocated on a CUDA device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    highest = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(highest.split()[1]) * 1024
