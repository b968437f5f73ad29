"""The tests of a GPU, on a CUDA device in CPU memory."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device is compiled by g++, which is not here")
@pytest.mark.skipif(torch.version.cuda is not None, reason="the fake device needs a build of torch without CUDA")
def test_the_tests_of_a_gpu_pass_on_the_fake_device() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "fake_cuda", "-p", "no:cacheprovider", "-m", "gpu", "-q"]
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [*command, str(HERE / "test_gpu.py")], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 10 and "skipped" not in done.stdout, done.stdout
