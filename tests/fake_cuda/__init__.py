"""A CUDA device in CPU memory: ``PYTHONPATH=tests pytest -p fake_cuda`` runs tests on it; device.cpp says how."""

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("device.cpp")

DRIVER = {
    "_cuda_getDevice": 0,
    "_cuda_setDevice": None,
    "_cuda_synchronize": None,
    "_cuda_emptyCache": None,
    "_cuda_memoryStats": {},
    "_cuda_resetPeakMemoryStats": None,
}
"""What the functions give that ``torch._C`` lacks in a build without CUDA."""

DEVICE = {
    "is_available": True,
    "device_count": 1,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
    "_get_device_properties": SimpleNamespace(name="fake CUDA device", major=8, minor=0),
    "mem_get_info": (2**33, 2**33),
}
"""And those of ``torch.cuda`` that ask a device."""


def _load() -> None:
    """Build the device and load it; torch must not be there yet."""
    if "torch" in sys.modules:
        raise ImportError("fake_cuda must be imported before torch, which was imported already")
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch = Path(found.origin).parent
    if (torch / "lib/libtorch_cuda.so").exists():
        raise ImportError("fake_cuda needs a build of torch without CUDA, but this one has it; install that for CPUs")
    libraries = torch / "lib"
    with tempfile.TemporaryDirectory() as folder:
        device = Path(folder, "device.so")
        command = ["g++", "-std=c++20", "-fPIC", "-shared", f"-I{torch / 'include'}", SOURCE, "-o", device]
        linked = [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
        subprocess.run([*command, *linked], check=True)
        ctypes.CDLL(str(device))


def _always(answer: object) -> Callable[..., object]:
    return lambda *_, **__: answer


def _moved(storage: Any, device: Any, non_blocking: bool = False) -> Any:
    import torch

    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).to(device).untyped_storage()


def _answer() -> None:
    import torch

    for module, answers in ((torch._C, DRIVER), (torch.cuda, DEVICE)):
        for name, answer in answers.items():
            setattr(module, name, _always(answer))
    torch.cuda.random.device_count = torch.cuda.device_count
    torch.storage._to = _moved
    torch.cuda._initialized = True
    torch.cuda.default_generators = (torch.Generator("cuda"),)


_load()
_answer()
