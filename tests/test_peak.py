"""The peak of memory counts what was taken since the last look, and only that."""

import sys

import pytest
import torch

from fisherscope._peak import forget_peak, peak_memory

CPU = torch.device("cpu")


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
