"""The kernel for CPUs against one product per example, and the engine on top of it against the loop."""

import configparser
import functools
import logging
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import batched, case
from test_kernels import ODD, SHAPES, Problem, after, assert_right, expected, problem, strided
from torch import Tensor

from fisherscope.fisher import compiled, hooks_engine, kernels, loop_engine
from fisherscope.fisher.compiled import accumulate_compiled
from fisherscope.fisher.kernels import accumulate_products

needs_compiler = pytest.mark.skipif(compiled.kernel() is None, reason="needs a C compiler and AVX2 or AVX-512")


def single(shape: str) -> Problem:
    return problem(shape, torch.float32)


@pytest.fixture
def rebuilt() -> Iterator[None]:
    """The kernel is built anew in the test, and anew after it."""
    compiled.kernel.cache_clear()
    yield
    compiled.kernel.cache_clear()


@needs_compiler
@pytest.mark.parametrize("shape", [name for name in SHAPES if sum(SHAPES[name][2])])
def test_kernel_forms_the_sums(shape: str) -> None:
    given = single(shape)
    assert_right(after(accumulate_compiled, given), expected(*given))
    assert_right(after(accumulate_compiled, strided(*given)), expected(*given))
    score, left, right, offsets = given
    leaves = (score, left.requires_grad_(), right.requires_grad_(), offsets.int())
    assert_right(after(accumulate_compiled, leaves), expected(*given).detach())


@needs_compiler
def test_more_rows_than_are_packed_at_once_and_threads_that_share_them() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 900, 0, 1100, 50, 2500, 1, 2047, 2, 300])
    offsets = lengths.cumsum(0)
    left, right = (torch.randn(int(offsets[-1]), size, generator=draw) for size in (101, 77))
    given = torch.rand(101, 77, generator=draw), left, right, offsets
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(after(accumulate_compiled, given))
    finally:
        torch.set_num_threads(before)
    assert_right(found[0], expected(*given), relative=1e-5)  # sums of up to 2,500 products
    assert all((one == found[0]).all() for one in found)


@needs_compiler
@pytest.mark.usefixtures("rebuilt")
def test_kernel_for_processors_with_shorter_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled.kernel()
    monkeypatch.setenv("CC", "cc -mno-avx512f")
    compiled.kernel.cache_clear()
    assert compiled.kernel() not in (None, whole)
    for shape in (ODD, "longer than several steps"):
        assert_right(after(accumulate_compiled, single(shape)), expected(*single(shape)))


@pytest.mark.usefixtures("rebuilt")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "cc -mno-avx2 -mno-avx512f", "false", "cc 'not closed"])
def test_without_a_kernel_products_are_formed_in_chunks(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(kernels, "_SMALL_WORK", {})
    with caplog.at_level(logging.INFO):
        assert compiled.kernel() is compiled.kernel() is None
    assert len(caplog.messages) == 1 and "a C compiler" in caplog.messages[0]
    assert_right(after(accumulate_products, single(ODD)), expected(*single(ODD)))
    message = r"^The kernel for CPUs needs AVX2 or AVX-512 and a C compiler: the command in CC, or else cc\.$"
    with pytest.raises(RuntimeError, match=message):
        accumulate_compiled(*single(ODD))


@pytest.mark.usefixtures("rebuilt")
def test_without_a_folder_to_build_in_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    assert compiled.kernel() is None


@needs_compiler
@pytest.mark.parametrize("offsets", [[0, 30, 62], [-1, 30, 61], [0, 40, 30, 61]])
def test_offsets_that_leave_the_rows_are_refused(offsets: list[int]) -> None:
    score, left, right, _ = single(ODD)
    before = score.clone()
    with pytest.raises(ValueError, match=r"^Offsets must go up from 0 to 61 rows at most, got \["):
        accumulate_compiled(score, left, right, torch.tensor(offsets))
    assert (score == before).all()


@needs_compiler
def test_callers_in_several_threads_do_not_mix() -> None:
    given = [single(shape) for shape in SHAPES if sum(SHAPES[shape][2])] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(functools.partial(after, accumulate_compiled), given))
    for score, one in zip(found, given, strict=True):
        assert_right(score, expected(*one))


@needs_compiler
def test_only_plain_float32_of_some_size_goes_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(compiled, "accumulate_compiled", lambda score, *rest: calls.append(score.numel()))
    score, left, right, offsets = single(ODD)
    accumulate_products(score, left, right, offsets)
    assert not calls  # too little
    monkeypatch.setattr(kernels, "_SMALL_WORK", {})
    for refused in (
        (score.double(), left, right, offsets),
        (score, left.bfloat16(), right, offsets),
        (torch.zeros(70, 66)[:, ::2], left, right, offsets),
    ):
        accumulate_products(*refused)
    assert not calls
    accumulate_products(score, left, right, offsets)
    assert calls == [score.numel()]


@needs_compiler
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_scores_by_the_kernel_are_those_of_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, ...]] = []

    @functools.wraps(accumulate_compiled)
    def counted(score: Tensor, *rest: Tensor) -> None:
        used.append(tuple(score.shape))
        accumulate_compiled(score, *rest)

    monkeypatch.setattr(kernels, "_SMALL_WORK", {})
    monkeypatch.setattr(compiled, "accumulate_compiled", counted)
    given = case(name)
    model = given.model.float()
    (batch,) = batched(given.examples, len(given.examples))
    sums = [{n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2)]
    for engine, into in zip((hooks_engine, loop_engine), sums, strict=True):
        engine(model, given.objective)(batch, into)
    assert used
    for n, wanted in sums[1].items():
        torch.testing.assert_close(sums[0][n], wanted, rtol=0, atol=1e-4 * float(wanted.max()) + 1e-12, msg=n)


def test_the_source_of_the_kernel_is_installed_with_the_package() -> None:
    root = Path(compiled.__file__).parents[2]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    patterns = setup["options.package_data"]["fisherscope.fisher"].split(",")
    assert any(compiled._SOURCE in compiled._SOURCE.parent.glob(pattern.strip()) for pattern in patterns)
