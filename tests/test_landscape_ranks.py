"""Landscapes by several ranks, on CPU with gloo: the landscape of one process, also after an interruption."""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import Interrupted, batched, case, contents
from test_distributed import RANKS, finished, start
from torch import Tensor, nn

from fisherscope import distributed
from fisherscope.cli import main
from fisherscope.landscape import Landscape, scan_landscape
from fisherscope.masks import random_fraction

SCANS: dict[str, tuple[str, dict[str, Any]]] = {
    "surface": ("bert", {"points": (5, 3), "metrics": ["accuracy"]}),
    "curve": ("gpt2", {"axes": 1, "points": 7}),
    "volume": ("bert-classifier", {"axes": 3, "points": 3, "match": "norm"}),
    "rows shorter than ranks": ("bert-regressor", {"axes": 1, "points": 3}),
    "replicates": ("gpt2", {"points": 3, "replicates": 2}),
    "clipped": ("bert", {"points": 5, "span": 4.0, "clip": True}),
    "adaptive": ("bert-classifier", {"points": 13, "span": 0.3, "adaptive": 0.02}),
}


def scanned(name: str, **more: Any) -> Landscape:
    kind, settings = SCANS[name]
    made = case(kind, lengths=(7, 3, 9, 5))
    mask = random_fraction(made.model, 0.5, seed=1) if "match" in settings else None
    settings = {"progress": False, "span": 0.5, "mask": mask, **settings, **more}
    return scan_landscape(made.model, batched(made.examples, 2), **settings)


def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Those of a causal language model, as an objective of one's own."""
    return model(**batch).logits.square().sum((1, 2))


def resumable(objective: Any = losses, **settings: Any) -> Landscape:
    made = case("gpt2", lengths=(7, 3, 9, 5))
    options = {"points": 9, "span": 0.5, "adaptive": 0.001, "progress": False, **settings}
    return scan_landscape(made.model, batched(made.examples, 2), objective=objective, **options)


def interrupt_after(points: int, part: Path, settings: dict[str, Any]) -> None:
    """A single process that is stopped after some points, of two batches each."""
    calls = 0

    @functools.wraps(losses)
    def stopping(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2 * points:
            raise Interrupted
        return losses(model, batch)

    with pytest.raises(Interrupted):
        resumable(stopping, checkpoint=part, **settings)
    assert Landscape.load(part).evaluated.sum() == points


@functools.wraps(losses)
def failing(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    if distributed.rank() == 1:
        raise ValueError("This loss cannot be computed.")
    return losses(model, batch)


def all_scans() -> None:
    """On a rank: every scan of the table, one that goes on, and one that fails, in one process group."""
    folder = Path(sys.argv[1])
    with distributed.started("cpu"):
        rank = distributed.rank()
        for name in SCANS:
            scanned(name, checkpoint=folder / f"{name} {rank}.part").save(folder / f"{name} {rank}.h5")
        resumable(checkpoint=folder / "resumed.part").save(folder / f"resumed {rank}.h5")
        resumable(adaptive=None, points=5, checkpoint=folder / "unfinished.part").save(folder / f"rows {rank}.h5")
        resumable(failing, checkpoint=folder / "failed.part")


def different_settings() -> None:
    with distributed.started("cpu"):
        resumable(seed=distributed.rank())


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """The folder with all scans, and how the ranks ended."""
    folder = tmp_path_factory.mktemp("ranks")
    interrupt_after(70, folder / "resumed.part", {})
    interrupt_after(13, folder / "unfinished.part", {"adaptive": None, "points": 5})
    return folder, finished(start("all_scans()", folder, module="test_landscape_ranks"))


@pytest.fixture(scope="module")
def folder(endings: tuple[Path, list[tuple[int, str]]]) -> Path:
    return endings[0]


@pytest.mark.parametrize("name", SCANS)
def test_two_ranks_are_one(folder: Path, tmp_path: Path, name: str) -> None:
    """Bit for bit, on every rank."""
    scanned(name).save(tmp_path / "one.h5")
    wanted = contents(tmp_path / "one.h5")
    for rank in range(RANKS):
        assert contents(folder / f"{name} {rank}.h5") == wanted


def test_the_scans_are_what_they_say(folder: Path) -> None:
    loaded = {name: Landscape.load(folder / f"{name} 0.h5") for name in SCANS}
    assert len(loaded["replicates"].replicates) == 2
    clipped = loaded["clipped"].clipped
    assert clipped is not None and 0 < clipped.sum() < clipped.size
    assert 0 < loaded["adaptive"].evaluated.sum() < loaded["adaptive"].loss.size
    assert loaded["volume"].loss.ndim == 3


@pytest.mark.parametrize("name", SCANS)
def test_only_the_first_rank_keeps_a_checkpoint(folder: Path, name: str) -> None:
    assert (folder / f"{name} 0.part").exists() and not (folder / f"{name} 1.part").exists()


@pytest.mark.parametrize(("name", "settings"), [("resumed", {}), ("rows", {"adaptive": None, "points": 5})])
def test_two_ranks_go_on_after_one(folder: Path, name: str, settings: dict[str, Any]) -> None:
    wanted = resumable(**settings)
    for rank in range(RANKS):
        found = Landscape.load(folder / f"{name} {rank}.h5")
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-6)
        assert np.array_equal(found.evaluated, wanted.evaluated)


def test_one_goes_on_after_two(folder: Path, tmp_path: Path) -> None:
    """All that is left of the file of two ranks, but for its last points."""
    part = tmp_path / "l.part"
    part.write_bytes((folder / "unfinished.part").read_bytes())
    with h5py.File(part, "r+") as file:
        file["evaluated"][3:] = False  # pyright: ignore[reportIndexIssue]
        file["loss"][3:] = np.nan  # pyright: ignore[reportIndexIssue]
    found = resumable(adaptive=None, points=5, checkpoint=part)
    np.testing.assert_allclose(found.loss, Landscape.load(folder / "rows 0.h5").loss, rtol=1e-6)


def test_an_error_on_one_rank_ends_all(endings: tuple[Path, list[tuple[int, str]]]) -> None:
    folder, ((first, error), (second, cause)) = endings
    assert first == second == 1
    assert "ValueError: This loss cannot be computed." in cause
    assert "Rank 0 lost the other processes" in error.strip().splitlines()[-1]
    assert not (folder / "failed.part").exists()


@pytest.mark.slow
def test_ranks_with_different_settings_are_refused() -> None:
    (first, error), (second, cause) = finished(start("different_settings()", module="test_landscape_ranks"))
    assert first == second == 1
    assert "All ranks share one scan, but rank 1 was given another settings seed (0 there, 1 now)." in cause
    assert "Rank 0 lost the other processes" in error


@pytest.mark.slow
@pytest.mark.slow
def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.h5", tmp_path / "two.h5"
    flags = ["--model", "builtin:bert", "--data", "builtin:docs", "--num-examples", "6", "--max-length", "16"]
    flags += ["--batch-size", "2", "--points", "9", "--span", "0.3", "--adaptive", "0.05", "--device", "cpu"]
    assert main(["landscape", *flags, "--out", str(one)]) == 0
    said = capfd.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "-m", "fisherscope"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([*torchrun, "landscape", *flags, "--out", str(two)], env=environment, check=True)
    also_said = capfd.readouterr()
    assert also_said.out.replace(str(two), "FILE") == said.replace(str(one), "FILE")
    assert also_said.err.count("  0%") == 1  # one bar
    assert also_said.err.count("Measured ") == 1
    np.testing.assert_allclose(Landscape.load(two).loss, Landscape.load(one).loss, rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5", "two.h5"]
