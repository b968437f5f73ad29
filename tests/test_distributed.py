"""Several ranks, on CPU with gloo: the scores of one process, also after a kill and with another number of ranks."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from conftest import IGNORED, Interrupted, Stopping, batched, case
from torch import nn

from fisherscope import distributed
from fisherscope.cli import main
from fisherscope.fisher import estimate_fisher, run
from fisherscope.scores import FisherScores

RANKS = 2

fisher = functools.partial(estimate_fisher, progress=False, halves=True)

MANY = (7, 3, 9, 5, 2, 6, 9, 4, 8, 3, 5, 7, 2, 9, 6, 4, 3, 8, 5, 7, 6)

RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "as many batches as two rounds": ("bert", 6, {}),
    "last round incomplete": ("bert", 3, {}),
    "fewer batches than ranks": ("gpt2", 32, {}),
    "no halves": ("gpt2", 5, {"halves": False}),
    "loop": ("gpt2", 5, {"engine": "loop"}),
    "tokens": ("bert", 6, {"unit": "token", "tokens": 2, "seed": 3}),
    "drawn labels": ("gpt2", 5, {"estimator": "sampled", "draws": 2, "seed": 3}),
    "squared batch mean": ("gpt2", 5, {"estimator": "squared-batch-mean"}),
    "eleven batches": ("llama", 2, {}),
    "until stable": ("bert", 1, {"until_stable": 0.3, "fraction": 0.5}),
}


def scored(name: str, dtype: torch.dtype, **more: Any) -> FisherScores:
    kind, size, settings = RUNS[name]
    made = case(kind, lengths=MANY)
    return fisher(made.model.to(dtype), batched(made.examples, size), **settings, **more)


SHARDED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tied": ("bert", 3, {}),
    "shared by all blocks": ("t5", 3, {}),
    "norms of one plus the weight": ("llama", 4, {"halves": False}),
    "tokens of unequal number": ("bert", 3, {"unit": "token"}),
    "all classes": ("bert-classifier", 3, {"estimator": "exact"}),
    "fewer batches than ranks": ("gpt2", 32, {}),
    "until stable": ("bert", 1, {"until_stable": 0.3, "fraction": 0.5}),
}


def scored_sharded(name: str, model: nn.Module | None = None) -> FisherScores:
    """By a sharded model, if none is given; one of the batches has nothing to score."""
    kind, size, settings = SHARDED[name]
    made = case(kind, lengths=MANY)
    batches = batched(made.examples, size)
    if len(batches) > 2 and kind == "bert":
        batches[2]["labels"].fill_(IGNORED)
    if model is None:
        model = made.model
        distributed.shard(model)
    return fisher(model, batches, **settings)


def facts_of(scores: FisherScores) -> dict[str, Any]:
    """Everything about scores but the numbers, and who computed when."""
    provenance = {k: v for k, v in scores.provenance.items() if k not in ("command", "time")}
    assert scores.quarters is not None
    return {"num_examples": scores.num_examples, "provenance": provenance, "quarters": scores.quarters.num_examples}


def assert_same(found: FisherScores, wanted: FisherScores, relative: float) -> None:
    assert facts_of(found) == facts_of(wanted)
    assert_same_numbers(found, wanted, relative)
    assert found.quarters is not None and wanted.quarters is not None
    history = torch.tensor(wanted.quarters.history)
    torch.testing.assert_close(torch.tensor(found.quarters.history), history, atol=1e-3, rtol=0)


def assert_same_numbers(found: FisherScores, wanted: FisherScores, relative: float) -> None:
    assert found.num_examples == wanted.num_examples
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=relative, atol=relative * float(want.max()))
        if wanted.first_half is not None and found.first_half is not None:
            torch.testing.assert_close(found.first_half[name], wanted.first_half[name], rtol=0, atol=2e-3)
    assert (found.first_half is None) == (wanted.first_half is None)
    assert found.quarters is not None and wanted.quarters is not None
    floor = 1e-6 * float(wanted.quarters.sums.max())  # they are float32, and differences of sums
    torch.testing.assert_close(found.quarters.sums, wanted.quarters.sums, rtol=1e-4, atol=floor)


def start(
    code: str, *arguments: object, world: int = RANKS, module: str = "test_distributed"
) -> list[subprocess.Popen[str]]:
    """The processes that torchrun would start, without torchrun, so that a test can kill them one by one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    command = [sys.executable, "-c", f"import {module} as t; t.{code}", *map(str, arguments)]
    return [
        subprocess.Popen(
            command, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}, text=True, stderr=subprocess.PIPE
        )
        for r in range(world)
    ]


def finished(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and standard error of every rank."""
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        kill(processes)
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def all_runs() -> None:
    """On a rank: every run of the table, one that goes on, and one that fails, in one process group."""
    folder = Path(sys.argv[1])
    with distributed.started("cpu"):
        for name in RUNS:
            for dtype in (torch.float64, torch.float32):
                scored(name, dtype).save(folder / f"{name} {dtype} {distributed.rank()}.h5")
        one_by_one(checkpoint=folder / "resumed.part").save(folder / f"resumed {distributed.rank()}.h5")
        all_sharded_runs(folder)
        made = case("bert-regressor")
        batches = batched(made.examples, 2)
        batches[3]["labels"] = batches[3]["labels"] * float("nan")  # of rank 1
        fisher(made.model, batches, checkpoint=folder / "failed.part")


def all_sharded_runs(folder: Path) -> None:
    for name in SHARDED:
        scores = scored_sharded(name)
        scores.save(folder / f"sharded {name}.h5")
        whole = sum(score.numel() for score in scores.values())
        held = sum(score.to_local().numel() for score in scores.values())  # pyright: ignore
        assert abs(held - whole / RANKS) < 0.05 * whole, (held, whole)
    made = case("bert", lengths=MANY)
    model, batches = made.model.float(), batched(made.examples, 1)
    distributed.shard(model)
    with pytest.raises(ValueError, match="Sharded parameters have only the fast engine"):
        fisher(model, batches, engine="loop")
    fisher(model, batches, checkpoint=folder / "sharded.part").save(folder / "sharded resumed.h5")
    sharded_loop()


class SineOfWeight(nn.Module):
    """Has no batched rule: what is made of the parameter alone is changed in place, and not by a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.weight * 2).sin_()


def sharded_loop() -> None:
    model = SineOfWeight()
    distributed.shard(model)
    with pytest.raises(ValueError, match="need a batched rule, but 1 have none, for example 'weight'"):
        fisher(model, [{"x": torch.randn(4, 3)}], objective=lambda m, b: m(b["x"]).square().sum(1))


FLAGS = ["--model", "builtin:bert", "--data", "builtin:docs", "--num-examples", "21", "--max-length", "16"]
FLAGS += ["--batch-size", "2", "--device", "cpu"]


def one_by_one(**settings: Any) -> FisherScores:
    made = case("bert", lengths=MANY)
    return fisher(made.model.float(), batched(made.examples, 1), **settings)


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    """The folder with all runs, and how the ranks ended."""
    folder = tmp_path_factory.mktemp("ranks")
    interrupt_before(7, folder / "resumed.part")
    interrupt_before(9, folder / "sharded.part")
    return folder, finished(start("all_runs()", folder))


@pytest.fixture(scope="module")
def folder(endings: tuple[Path, list[tuple[int, str]]]) -> Path:
    return endings[0]


def interrupt_before(number: int, part: Path) -> None:
    """A single process that is stopped in front of a batch."""
    made = case("bert", lengths=MANY)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(run, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        fisher(made.model.float(), Stopping(batched(made.examples, 1), number), checkpoint=part)
    assert batches_done(part) == number


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(folder: Path, name: str, dtype: torch.dtype, relative: float) -> None:
    wanted = scored(name, dtype)
    for rank in range(RANKS):
        assert_same(FisherScores.load(folder / f"{name} {dtype} {rank}.h5"), wanted, relative)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_is_one(folder: Path, name: str) -> None:
    wanted = scored_sharded(name, case(SHARDED[name][0]).model)
    assert_same(FisherScores.load(folder / f"sharded {name}.h5"), wanted, 1e-12)


def test_sharded_ranks_go_on_after_one(folder: Path) -> None:
    assert_same(FisherScores.load(folder / "sharded resumed.h5"), one_by_one(), 1e-6)
    assert_same_numbers(FisherScores.load(folder / "sharded.part"), one_by_one(), 1e-6)


def test_one_process_cannot_shard() -> None:
    with pytest.raises(ValueError, match="there is only one; start the command with torchrun"):
        distributed.shard(nn.Linear(2, 2))


def test_the_runs_are_what_they_say(folder: Path) -> None:
    loaded = {name: FisherScores.load(folder / f"{name} {torch.float64} 0.h5") for name in RUNS}
    assert loaded["until stable"].num_examples < len(MANY)  # stopped before the end
    assert loaded["eleven batches"].quarters.history  # pyright: ignore[reportOptionalMemberAccess]
    assert {n for n, s in loaded.items() if s.num_examples == len(MANY)} >= {"last round incomplete", "loop"}


def test_two_ranks_go_on_after_one(folder: Path) -> None:
    wanted = one_by_one()
    for rank in range(RANKS):
        assert_same(FisherScores.load(folder / f"resumed {rank}.h5"), wanted, 1e-6)
    assert_same_numbers(FisherScores.load(folder / "resumed.part"), wanted, 1e-6)


def test_an_error_on_one_rank_ends_all(endings: tuple[Path, list[tuple[int, str]]]) -> None:
    folder, ((first, error), (second, cause)) = endings
    assert first == second == 1
    assert "Every example needs a finite loss, but example 0 of a batch has nan" in cause
    assert "Rank 0 lost the other processes" in error.strip().splitlines()[-1]
    assert not (folder / "failed.part").exists()


class Slow(Stopping):
    """Batches that take their time."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.2)
            yield batch


def run_slowly() -> None:
    run.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    made = case("bert", lengths=MANY)
    with distributed.started("cpu"):
        fisher(made.model.float(), Slow(batched(made.examples, 1)), checkpoint=sys.argv[1])


def batches_done(path: Path) -> int:
    try:
        with h5py.File(path) as file:
            return int(file.attrs["progress"][0])  # pyright: ignore
    except OSError:
        return 0


def wait_for(ready: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 100
    while not ready():
        assert all(process.poll() is None for process in processes), "a rank ended before it could be killed"
        assert time.monotonic() < until, "no progress"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of which first one rank was killed and then, had it lived on, the other."""
    path = tmp_path_factory.mktemp("killed") / "scores.h5.part"
    processes = start("run_slowly()", path)
    try:
        wait_for(lambda: batches_done(path) >= 6, processes)
        processes[1].send_signal(signal.SIGKILL)
        status, error = finished(processes)[0]
    finally:
        kill(processes)
    assert status == 1 and "Rank 0 lost the other processes" in error
    assert not list(path.parent.glob("*.h5"))
    return path


@pytest.mark.slow
def test_kill_one_of_two_and_go_on_with_one(killed: Path) -> None:
    assert 6 <= batches_done(killed) < len(MANY)
    assert_same(one_by_one(checkpoint=killed), one_by_one(), 1e-6)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], sharded: bool) -> None:
    one, two = tmp_path / "one.h5", tmp_path / "two.h5"
    assert main(["fisher", *FLAGS, "--out", str(one)]) == 0
    said = capfd.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "-m", "fisherscope"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    flags = [*FLAGS, *(["--shard"] if sharded else []), "--out", str(two)]
    subprocess.run([*torchrun, "fisher", *flags], env=environment, check=True)
    also_said = capfd.readouterr()
    after = [text.splitlines()[text[: text.index("FisherScores(")].count("\n") + 1 :] for text in (also_said.out, said)]
    assert after[0] == after[1] != []  # the stability
    assert f"{two}: FisherScores(" in also_said.out
    assert also_said.err.count("  0%") == 1  # one bar
    assert_same(FisherScores.load(two), FisherScores.load(one), 1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5", "two.h5"]


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ValueError, match="4 processes and 2 GPUs; give torchrun --nproc_per_node 2"),
        distributed.started(),
    ):
        pass
