"""The name of the processor; the peak of memory counts what was taken since the last look, and only that."""

import sys

import pytest
import torch

from fisherscope._machine import device_name, forget_peak, peak_memory

CPU = torch.device("cpu")


def test_the_processor_has_a_name():
    assert device_name("cpu") == device_name(CPU) and device_name("cpu").strip()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the life of the process")
def test_a_peak_is_forgotten():
    forget_peak(CPU)
    before = peak_memory(CPU)
    taken = torch.ones(2**26)
    with_tensor = peak_memory(CPU)
    assert with_tensor - before > 0.9 * taken.nbytes
    size = taken.nbytes
    del taken
    assert with_tensor - peak_memory(CPU) < 0.1 * size
    forget_peak(CPU)
    assert with_tensor - peak_memory(CPU) > 0.9 * size
