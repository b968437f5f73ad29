"""What goes wrong around a scan: one clear sentence, the model as it was, and nothing lost or left behind."""

import errno
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import Interrupted, untouched
from torch import Tensor, nn

from fisherscope.landscape import Landscape, scan_landscape
from fisherscope.masks import Mask, MaskMismatch, random_fraction

scan_quietly = functools.partial(scan_landscape, progress=False)

BATCHES = [{"offset": torch.tensor([1.0, 2.0])}, {"offset": torch.tensor([6.0])}]


def squares(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return sum(p.square().sum() for p in model.parameters()) + batch["offset"]


def linear() -> nn.Linear:
    return nn.Linear(3, 2)


def along(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), value)}


def too_few(predictions: Any) -> Tensor:
    return torch.zeros(1)


def one_number(predictions: Any) -> Tensor:
    return torch.zeros(())


def per_example(predictions: Any) -> Tensor:
    return predictions.outputs[:, 0]


NOTHING = Mask({"weight": torch.zeros(2, 3, dtype=torch.bool), "bias": torch.ones(2, dtype=torch.bool)})

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one point": ({"points": 1}, "points must be odd and at least 3, got 1."),
    "one point on one axis": ({"points": (3, 1)}, "points must be odd and at least 3, got 1."),
    "one point between ends": ({"points": 1, "span": [(-1.0, 1.0)] * 2}, "points must be at least 3, got 1."),
    "no points": ({"points": 0}, "points must be odd, so that step 0 is on the grid, got 0; take 3."),
    "too many counts": ({"points": (3, 3, 3)}, "points must be one number or one per axis (2), got [3, 3, 3]."),
    "no span": ({"span": 0.0}, "span must be a positive number, got 0.0."),
    "negative span": ({"span": -1.0}, "span must be a positive number, got -1.0."),
    "infinite span": ({"span": math.inf}, "span must be a positive number, got inf."),
    "span that is nan": ({"span": math.nan}, "span must be a positive number, got nan."),
    "one pair for two axes": (
        {"span": (-1.0, 1.0)},
        "span must be one number, or a pair (lowest, highest) per axis (2), got (-1.0, 1.0).",
    ),
    "ends on one side": (
        {"span": [(1.0, 2.0), (0.0, 1.0)]},
        "span must go from a number up to 0 to one from 0, got (1, 2).",
    ),
    "ends that are one": (
        {"span": [(0.0, 0.0), (0.0, 1.0)]},
        "span must go from a number up to 0 to one from 0, got (0, 0).",
    ),
    "an end that is nan": (
        {"span": [(math.nan, 1.0), (0.0, 1.0)]},
        "span must go from a number up to 0 to one from 0, got (nan, 1).",
    ),
    "four axes": ({"axes": 4}, "axes must be 1, 2 or 3, got 4."),
    "no batches": ({"batches": []}, "A landscape needs at least one batch, but there is none; check the data."),
    "unknown metric": (
        {"metrics": ["nope"], "objective": "classification"},
        "A metric of classification is one of accuracy, f1, matthews, or a function of predictions; got 'nope'.",
    ),
    "metric of labels for a loss function": (
        {"metrics": ["accuracy"]},
        "A metric of squares is a function of predictions; got 'accuracy'.",
    ),
    "metric of numbers for classes": (
        {"metrics": ["pearson"], "objective": "classification"},
        "A metric of classification is one of accuracy, f1, matthews, or a function of predictions; got 'pearson'.",
    ),
    "metric with a wrong shape": (
        {"metrics": [too_few]},
        "The metric too_few must give one value per example, shape [2]; got shape [1].",
    ),
    "metric without a shape": (
        {"metrics": [one_number]},
        "The metric one_number must give one value per example, shape [2]; got shape [].",
    ),
    "two metrics of one name": (
        {"metrics": [per_example, per_example]},
        "Every metric needs a name of its own, without '/'; rename the function 'per_example'.",
    ),
    "directions of size 0": (
        {"directions": [along(1.0), along(0.0)]},
        "Nothing moves along axis 1: the direction is 0, or the mask selects only entries where it is; select others, "
        "or let biases and norms move with one_dimensional='scale'.",
    ),
    "a direction that is not finite": (
        {"directions": [along(1.0), along(math.nan)]},
        "A direction needs finite values, but 'weight' holds others; make it again.",
    ),
    "match without a mask": (
        {"match": "norm"},
        "match='norm' is about the size of masked directions; give a mask, or leave it out.",
    ),
    "Fisher match without scores": (
        {"match": "fisher", "mask": ~NOTHING},
        "match='fisher' needs scores; give them, or take match='norm'.",
    ),
    "unknown match": (
        {"match": "count", "mask": ~NOTHING},
        "match must be 'none' or 'norm' or 'fisher', got 'count'.",
    ),
    "match of nothing": (
        {"match": "norm", "mask": NOTHING},
        "A direction of size 0 cannot be matched by norm; select entries that move.",
    ),
    "match of directions that were made for the mask": (
        {"match": "norm", "mask": ~NOTHING, "directions": [along(1.0), along(2.0)]},
        "match='norm' compares masked directions with whole ones, but these were made for the mask; leave it out.",
    ),
    "clip of what is no language model": (
        {"clip": True},
        "clip is about losses beyond guessing a token, but the objective is squares; leave it out.",
    ),
    "mask of another model": (
        {"mask": random_fraction(nn.Linear(4, 2), 0.5, seed=0)},
        "The mask does not fit this model: 'weight' has shape (2, 4) there but (2, 3) in the model.",
    ),
    "no replicates": (
        {"replicates": 0},
        "replicates must be at least 1, and only random directions have several; got 0.",
    ),
    "replicates of given directions": (
        {"replicates": 2, "directions": [along(1.0), along(2.0)]},
        "replicates must be at least 1, and only random directions have several; got 2 of given directions, which are "
        "only one.",
    ),
    "axes in a line": (
        {"directions": [along(1.0), along(2.0)], "orthogonal": True},
        "Direction 1 lies in the span of the earlier ones; take another.",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence_and_nothing_is_left(case: str, tmp_path: Path):
    changes, sentence = REFUSED[case]
    options = {"objective": squares, "points": 3, "batches": BATCHES} | changes
    model = linear()
    with untouched(model), pytest.raises(ValueError) as error:
        scan_quietly(model, options.pop("batches"), checkpoint=tmp_path / "landscape.h5.part", **options)
    assert str(error.value) == sentence
    assert isinstance(error.value, MaskMismatch) == (case == "mask of another model")
    assert list(tmp_path.iterdir()) == []


def test_points_measured_before_a_refusal_stay(tmp_path: Path):
    """A loss function that stops fitting half-way."""
    calls = []

    def shrinking(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        return squares(model, batch)[: None if len(calls) < 9 else 0]

    model, part = linear(), tmp_path / "landscape.h5.part"
    with untouched(model), pytest.raises(ValueError, match="one loss per example"):
        scan_quietly(model, BATCHES, objective=shrinking, points=3, checkpoint=part)
    found = Landscape.load(part)
    assert found.evaluated.sum() == 4
    assert np.isfinite(found.loss[found.evaluated]).all()


FULL = """
import os, resource, sys
import numpy as np
from pathlib import Path
from fisherscope.landscape.surface import Axis, Landscape, Point, journals
folder, limit, measured = Path(sys.argv[1]), int(sys.argv[3]), 0
def empty():
    axes = (Axis("axis0", np.linspace(-1, 1, 51), 1.0, 1),)
    values = {"examples": np.full((51, 1000), np.nan), "counts": np.ones(1000, dtype=int)}
    return Landscape(axes, np.full(51, np.nan), np.zeros(51, dtype=bool), **values)
def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    if sys.argv[2] == "save":
        fill()
        empty().save(folder / "landscape.h5")
    with journals(folder / "landscape.h5.part", empty()) as (log,):
        for number in range(51):
            if number == 10:
                fill()
            log.record((number,), Point(float(number), examples=np.ones(1000)))
            log.flush()
except OSError as error:
    print(error, flush=True)
os._exit(0)  # HDF5 may crash when it cleans up after a file that it could not close
"""


def full_disk(folder: Path, what: str, limit: int) -> str:
    """What is said when no file may be longer than a limit, which is what a full disk comes to."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", FULL, str(folder), what, str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("limit", [100, 100_000])
def test_full_disk_when_saving(limit: int, tmp_path: Path):
    said = full_disk(tmp_path, "save", limit)
    reason = os.strerror(errno.EFBIG)
    assert said == f"{tmp_path / 'landscape.h5'} cannot be written ({reason}); mend that, and repeat the command.\n"
    assert list(tmp_path.iterdir()) == []


def test_points_of_a_long_row_reach_the_file_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fisherscope.landscape.scan.SECONDS_BETWEEN_FLUSHES", 0.0)
    part, seen = tmp_path / "landscape.h5.part", []

    def watching(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        copied = shutil.copy(part, tmp_path / "copy.h5")  # what another process would find
        seen.append(int(Landscape.load(copied).evaluated.sum()))
        return squares(model, batch)

    scan_quietly(linear(), BATCHES[:1], objective=watching, axes=1, points=5, checkpoint=part)
    assert seen[-5:] == [0, 1, 2, 3, 4]


def test_full_disk_while_measuring_keeps_the_points_so_far(tmp_path: Path):
    said = full_disk(tmp_path, "measure", 90_000)
    assert said.startswith(f"{tmp_path / 'landscape.h5.part'} cannot be written (") and said.count("\n") == 1
    kept = Landscape.load(tmp_path / "landscape.h5.part")
    assert kept.evaluated.sum() == 10
    assert kept.loss[kept.evaluated].tolist() == list(range(10))
    assert (kept.examples[kept.evaluated] == 1).all()


@pytest.mark.parametrize("call", [1, 3])
def test_full_disk_leaves_the_model_as_it_was(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right, calls = h5py.File.flush, []

    def flush(file: h5py.File) -> None:
        calls.append(1)
        if len(calls) > 1 + 2 * call:  # one for the empty file, two per row
            raise OSError(errno.ENOSPC, "No space left on device")
        right(file)

    monkeypatch.setattr(h5py.File, "flush", flush)
    model, part = linear(), tmp_path / "landscape.h5.part"
    with untouched(model), pytest.raises(OSError, match=r"cannot be written \(No space left on device\)"):
        scan_quietly(model, BATCHES, objective=squares, points=(5, 3), checkpoint=part)
    monkeypatch.setattr(h5py.File, "flush", right)
    kept = Landscape.load(part)
    assert 3 * call <= kept.evaluated.sum() < 15
    whole = scan_quietly(model, BATCHES, objective=squares, points=(5, 3))
    assert np.array_equal(kept.loss[kept.evaluated], whole.loss[kept.evaluated])
    assert np.array_equal(
        scan_quietly(model, BATCHES, objective=squares, points=(5, 3), checkpoint=part).loss, whole.loss
    )


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process has the file open for writing."""
    script = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "open\n"
            yield
        finally:
            process.send_signal(signal.SIGKILL)


def test_second_process_on_one_file_is_refused_and_nothing_is_lost(tmp_path: Path):
    part, calls = tmp_path / "landscape.h5.part", []

    def stopping(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == 9:
            raise Interrupted
        return squares(model, batch)

    model = linear()
    options: dict[str, Any] = {"objective": stopping, "points": 3, "checkpoint": part}
    with pytest.raises(Interrupted):
        scan_quietly(model, BATCHES, **options)
    sentence = f"{part} is in use by another process; wait for it to end, or give another file."
    with held(part):
        with untouched(model), pytest.raises(BlockingIOError) as error:
            scan_quietly(model, BATCHES, **options)
        assert str(error.value) == sentence
        assert Landscape.load(part).evaluated.sum() == 4  # to look at meanwhile
    assert Landscape.load(part).evaluated.sum() == 4
    assert scan_quietly(model, BATCHES, **options).evaluated.all()


def test_folder_for_the_checkpoint_is_made(tmp_path: Path):
    part = tmp_path / "new" / "landscape.h5.part"
    scan_quietly(linear(), BATCHES, objective=squares, points=3, checkpoint=part)
    assert Landscape.load(part).evaluated.all()


def test_checkpoint_that_is_no_landscape_is_left_alone(tmp_path: Path):
    part = tmp_path / "landscape.h5.part"
    part.write_text("mine")
    with pytest.raises(ValueError, match="is no HDF5 file"):
        scan_quietly(linear(), BATCHES, objective=squares, points=3, checkpoint=part)
    assert part.read_text() == "mine"
