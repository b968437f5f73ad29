"""The machine under a run: its name, and the most memory that something took of it."""

import contextlib
import platform
import re
import resource
import sys
from pathlib import Path

import torch


def device_name(device: torch.device | str) -> str:
    """Of the GPU, or of the processor as the system has it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux
        if found := re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def forget_peak(device: torch.device) -> None:
    """Count anew from here; on a CPU only Linux can, elsewhere the peak is that of the life of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # not in every container
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most since :func:`forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
