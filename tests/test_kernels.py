"""Sums of squared products: the kernel, run by Triton's interpreter, and the chunks against one product per example.

The interpreter must be on before Triton is imported, so one child process runs this file for all cases at once.
"""

import functools
import gc
import itertools
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fisherscope.fisher import kernels
from fisherscope.fisher.kernels import Tile, accumulate_chunked, accumulate_fused, accumulate_products, compact

Problem = tuple[Tensor, Tensor, Tensor, Tensor]

SHAPES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "odd sizes, an empty example": (70, 33, (3, 0, 17, 40, 1)),
    "fewer outputs than a tile": (5, 70, (20, 12)),
    "fewer inputs than a tile": (70, 5, (20, 12)),
    "one row": (33, 16, (1,)),
    "longer than several steps": (20, 20, (35, 16, 130)),
    "many examples, empty ones first, last and in a row": (7, 9, (0, 0, *(2, 0, 1, 3) * 12, 0, 0)),
    "more than one group of tiles": (150, 40, (5, 3)),
    "no row": (6, 7, (0, 0)),
    "no example": (6, 7, ()),
}
ODD = "odd sizes, an empty example"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TILE = Tile(16, 16, 4, 2)


def problem(shape: str, dtype: torch.dtype = torch.float64) -> Problem:
    """A score that holds something already, and the rows of examples of the given lengths."""
    outputs, inputs, lengths = SHAPES[shape]
    draw = torch.Generator().manual_seed(len(shape))
    score = torch.rand(outputs, inputs, generator=draw, dtype=torch.float64)
    left, right = (torch.randn(sum(lengths), size, generator=draw).to(dtype) for size in (outputs, inputs))
    return score.to(torch.promote_types(dtype, torch.float32)), left, right, torch.tensor([0, *lengths]).cumsum(0)


def strided(score: Tensor, left: Tensor, right: Tensor, offsets: Tensor) -> Problem:
    """The same values, none of them contiguous."""
    wide = torch.stack([left, torch.full_like(left, torch.nan)], -1).flatten(1)
    return score.T.clone().T, wide[:, ::2], right.T.clone().T, torch.stack([offsets, -offsets], 1)[:, 0]


def expected(score: Tensor, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    total = score.double()
    for start, end in itertools.pairwise(offsets.tolist()):
        product = torch.einsum("to,ti->oi", left[start:end].double(), right[start:end].double())
        total = total + product.square()
    return total


def assert_right(found: Tensor, wanted: Tensor, relative: float | None = None) -> None:
    relative = relative or (1e-13 if found.dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=relative * float(wanted.max()))


def after(run: Callable[..., None], given: Problem, **settings: Any) -> Tensor:
    score = given[0].clone(memory_format=torch.preserve_format)
    run(score, *given[1:], **settings)
    return score


def interpreted_cases() -> dict[str, tuple[Problem, Tile]]:
    """Every case for the interpreter, as it comes out in both processes."""
    cases = {f"{shape}, float64": (problem(shape), TILE) for shape in SHAPES}
    cases |= {f"{dtype}": (problem(ODD, dtype), Tile(32, 64, 4, 2)) for dtype in DTYPES}
    cases |= {f"the default tile, {dtype}": (problem(ODD, dtype), kernels.TILES[0]) for dtype in DTYPES[:2]}
    cases["strided"] = (strided(*problem(ODD)), TILE)
    score, left, right, offsets = problem(ODD, torch.float32)
    cases["mixed"] = ((score, left, right.bfloat16(), offsets), TILE)
    cases["float64 score"] = ((score.double(), left, right, offsets), TILE)
    return cases


def run_interpreted(out: Path) -> None:
    assert "triton" not in sys.modules, "the module imports Triton before a kernel is asked for"
    found = {name: after(accumulate_fused, given, tile=tile) for name, (given, tile) in interpreted_cases().items()}
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        found[precision] = after(accumulate_fused, problem(ODD, torch.float32), tile=TILE)
    save_file({name: score.contiguous() for name, score in found.items()}, out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("interpreted") / "scores.safetensors"
    root = str(Path(kernels.__file__).parents[2])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


@pytest.mark.parametrize("name", interpreted_cases())
def test_kernel_in_the_interpreter(name: str, interpreted: dict[str, Tensor]) -> None:
    given = interpreted_cases()[name][0]
    assert_right(interpreted[name], expected(*given), 1e-13 if given[1].dtype == torch.float64 else 2e-6)


def test_kernel_multiplies_as_the_matmul_precision_says(interpreted: dict[str, Tensor]) -> None:
    given = problem(ODD, torch.float32)
    assert_right(interpreted["high"], expected(*given))  # the interpreter has no TF32: only that it runs
    rounded = (given[0], given[1].bfloat16(), given[2].bfloat16(), given[3])
    assert_right(interpreted["medium"], expected(*rounded))
    assert (interpreted["medium"] != interpreted["torch.float32"]).any()


MACHINES = [
    (torch.bfloat16, "highest", 90, "wgmma.mma_async"),
    (torch.float32, "high", 90, "wgmma.mma_async"),
    (torch.float32, "highest", 90, "fma.rn.f32"),
    (torch.float16, "highest", 80, "mma.sync"),
    (torch.float64, "highest", 80, "f64"),
]


@pytest.mark.parametrize(("dtype", "precision", "architecture", "instruction"), MACHINES)
def test_kernel_compiles_for_gpus_that_are_not_here(
    dtype: torch.dtype,
    precision: str,
    architecture: int,
    instruction: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    kernel = kernels._built_kernel()
    rows = torch.empty(1, 1, dtype=dtype)
    factors, products, depth = kernels._multiplication(rows, rows, 128.0)
    tile, wide = kernels.TILES[3], dtype == torch.float64
    constants = {
        "tile_rows": tile.rows, "tile_columns": tile.columns, "depth": depth, "group": 8, "precision": products,
        "sums": kernels.tl.float64 if wide else kernels.tl.float32, "column_stride": 1,
    }  # fmt: skip
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    pointers = {"score": names[torch.float64 if wide else torch.float32], "left": names[factors]}
    pointers |= {"right": names[factors], "starts": "i32", "ends": "i32", "num_steps": "i32"}
    sizes = ("left_width", "right_width", "left_stride", "right_stride")
    signature = {
        name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *sizes)}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    assembly = compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]
    assert instruction in assembly
    assert "cp.async.cg" in assembly or products == "ieee" or factors.itemsize == 4, "copies are not 16 bytes wide"


@pytest.mark.parametrize("max_bytes", [None, 1, 100, 5000, 50_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_of_any_size(shape: str, max_bytes: int | None) -> None:
    given = problem(shape)
    assert_right(after(accumulate_chunked, given, max_bytes=max_bytes), expected(*given))
    assert_right(after(accumulate_chunked, strided(*given), max_bytes=max_bytes), expected(*given))


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_every_dtype(dtype: torch.dtype) -> None:
    given = problem(ODD, dtype)
    assert_right(after(accumulate_chunked, given), expected(*given))
    widened = (given[0].double(), *given[1:])
    assert_right(after(accumulate_chunked, widened), expected(*widened), relative=2e-6)


def test_chunks_keep_to_their_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    empty = torch.empty

    def noted(*sizes: int, **settings: Any) -> Tensor:
        made = empty(*sizes, **settings)
        allocated.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", noted)
    for max_bytes in (8 * 33, 5000, 2 * 70 * 33 * 8):
        after(accumulate_chunked, problem(ODD), max_bytes=max_bytes)
    assert [allocated[0], allocated[2]] == [8 * 33, 2 * 70 * 33 * 8]
    assert 2500 < allocated[1] <= 5000


def test_on_the_cpu_products_are_formed_in_chunks_of_what_needs_grad_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "accumulate_fused", None)
    for shape in SHAPES:
        score, left, right, offsets = problem(shape)
        wanted = expected(score, left, right, offsets)
        accumulate_products(score, left.requires_grad_(), right.requires_grad_(), offsets)
        assert_right(score, wanted)
        assert not score.requires_grad


def test_compacted_rows_are_those_with_a_gradient() -> None:
    left, right = torch.randn(4, 6, 5).double(), torch.randn(4, 6, 3).double()
    left[0, 2:] = left[2] = left[3, ::2] = 0
    left[1, 0, 0] = torch.nan
    rows, inputs, offsets = compact(left, right)
    assert offsets.tolist() == [0, 2, 8, 8, 11]
    assert len(rows) == len(inputs) == 11
    left[1, 0, 0] = 1.0
    score = torch.zeros(5, 3).double()
    accumulate_products(score, *compact(left, right))
    assert_right(score, torch.einsum("nto,nti->noi", left, right).square().sum(0))


@pytest.mark.parametrize("depth", [16, 32])
@pytest.mark.parametrize("shape", [name for name in SHAPES if SHAPES[name][2]])
def test_every_step_has_rows_of_one_example(shape: str, depth: int) -> None:
    offsets = problem(shape)[3]
    starts, ends, count = kernels._steps(offsets, int(offsets[-1]), depth)
    wanted = [(row, end) for start, end in itertools.pairwise(offsets.tolist()) for row in range(start, end, depth)]
    assert list(zip(starts.tolist(), ends.tolist(), strict=True))[: int(count)] == wanted
    assert int(count) == len(wanted) <= len(starts)


def test_steps_follow_offsets_that_change_in_place() -> None:
    offsets = torch.tensor([0, 3, 7])
    before = kernels._step_table(offsets, 7, 16)
    assert kernels._step_table(offsets, 7, 16) is before
    offsets[1] = 5
    assert kernels._step_table(offsets, 7, 16)[1].tolist()[:2] == [5, 7]
    with torch.inference_mode():
        made = torch.tensor([0, 2, 7])
        kernels._step_table(made, 7, 16)
        made[1] = 4
        assert kernels._step_table(made, 7, 16)[1].tolist()[:2] == [4, 7]


@pytest.mark.parametrize(("mean", "depths"), [(1.0, (16, 16)), (19.0, (32, 32)), (33.0, (32, 64)), (500.0, (32, 64))])
def test_a_step_is_no_longer_than_the_examples(
    mean: float, depths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    single, half = torch.empty(1, 1), torch.empty(1, 1).half()
    found = tuple(kernels._multiplication(rows, rows, mean)[2] for rows in (single, half))
    assert found == depths


def test_rows_are_copied_only_where_they_are_not_aligned() -> None:
    good = torch.randn(3, 64)
    assert kernels._aligned(good[:, :32], torch.float32).data_ptr() == good.data_ptr()
    for rows in (good[:, 1:33], good.T[:, :2], good[:, ::2], good[:, :5]):
        made = kernels._aligned(rows, torch.float32)
        assert made.shape[1] % 16 == made.stride(0) % 16 == made.data_ptr() % 16 == 0
        assert (made[:, : rows.shape[1]] == rows).all() and not made[:, rows.shape[1] :].any()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[Tile | None, float | Exception]:
    """What each candidate takes, by its tile (``None``: in chunks), where nothing can be timed."""
    takes: dict[Tile | None, float | Exception] = dict.fromkeys((None, *kernels.TILES), 9.0)

    def milliseconds(candidate: Any, score: Tensor, *rest: Tensor) -> float:
        score += 1.0
        result = takes[candidate.keywords["tile"] if isinstance(candidate, functools.partial) else None]
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(kernels, "_milliseconds", milliseconds)
    monkeypatch.setattr(kernels, "_CHOICES", {})
    kernels._warn_once.cache_clear()
    return takes


def test_the_fastest_that_works_is_chosen_without_touching_the_score(
    timed: dict[Tile | None, float | Exception],
) -> None:
    given = problem(ODD)
    before = given[0].clone()
    timed[kernels.TILES[1]], timed[kernels.TILES[2]] = RuntimeError("out of resources"), 2.0
    chosen = kernels._timed_choice(*given)
    assert isinstance(chosen, functools.partial) and chosen.keywords == {"tile": kernels.TILES[2]}
    timed[None] = 1.0
    assert kernels._timed_choice(*given) is accumulate_chunked
    assert (given[0] == before).all()


def test_a_gpu_without_the_kernel_is_told_once(
    timed: dict[Tile | None, float | Exception], caplog: pytest.LogCaptureFixture
) -> None:
    timed.update(dict.fromkeys(kernels.TILES, RuntimeError("no such chip\nin line 7")))
    with caplog.at_level(logging.WARNING):
        assert kernels._timed_choice(*problem(ODD)) is kernels._timed_choice(*problem(ODD)) is accumulate_chunked
    assert caplog.messages == [
        "The fused kernel does not run on this GPU (no such chip); products are formed in chunks instead."
    ]
    timed[None] = torch.OutOfMemoryError("nothing fits")
    with pytest.raises(torch.OutOfMemoryError, match="nothing fits"):
        kernels._timed_choice(*problem(ODD))


def test_a_kernel_that_failed_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the garbage collector comes."""
    scratch: list[weakref.ref[Tensor]] = []

    def fails(candidate: Any, score: Tensor, *rest: Tensor) -> float:
        scratch.append(weakref.ref(score))
        if isinstance(candidate, functools.partial):
            raise RuntimeError("no such chip")
        return 1.0

    monkeypatch.setattr(kernels, "_milliseconds", fails)
    gc.disable()
    try:
        assert kernels._timed_choice(*problem(ODD)) is accumulate_chunked
        assert scratch[0]() is None
    finally:
        gc.enable()


def test_the_reason_of_a_compiler_is_told_without_the_place(
    timed: dict[Tile | None, float | Exception], caplog: pytest.LogCaptureFixture
) -> None:
    refused = RuntimeError("at 36:18:\nsome code")
    refused.__cause__ = AssertionError("Unsupported lhs dtype fp64")
    timed.update(dict.fromkeys(kernels.TILES, refused))
    with caplog.at_level(logging.WARNING):
        kernels._timed_choice(*problem(ODD))
    assert "(Unsupported lhs dtype fp64)" in caplog.text


def test_work_is_timed_once_for_its_kind(
    timed: dict[Tile | None, float | Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_choice_matters", lambda left: True)
    monkeypatch.setattr(kernels, "_SMALL_WORK", {})
    monkeypatch.setattr(kernels.compiled, "can_take", lambda *given: False)
    timed[None] = 1.0
    given = problem(ODD)
    scores = [after(accumulate_products, given) for _ in range(2)]
    assert len(kernels._CHOICES) == 1
    for score in scores:
        assert_right(score, expected(*given))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    after(accumulate_products, given)
    after(accumulate_products, problem("one row"))
    after(accumulate_products, problem("one row", torch.float32))
    assert len(kernels._CHOICES) == 4


def test_precision_set_by_the_other_interface_of_torch_is_understood() -> None:
    assert kernels._precision() == "highest"
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch.get_float32_matmul_precision refuses from here on
        assert kernels._precision() == "high"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert kernels._precision() == "highest"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_without_triton_everything_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels._built_kernel.cache_clear()
    given = problem(ODD)
    assert_right(after(accumulate_products, given), expected(*given))
    with pytest.raises(ModuleNotFoundError, match="triton"):
        accumulate_fused(*given)
    kernels._built_kernel.cache_clear()


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused() -> None:
    score, left, right, offsets = problem(ODD)
    message = (
        r"^A score of shape \(outputs, inputs\) needs left of shape \(rows, outputs\) and right of shape "
        r"\(rows, inputs\), but they are \(70, 33\), \(61, 33\) and \(61, 70\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        accumulate_products(score, right, left, offsets)
    with pytest.raises(ValueError, match=r"but they are \(70, 33\), \(60, 70\) and \(61, 33\)\.$"):
        accumulate_products(score, left[1:], right, offsets)
    with pytest.raises(
        ValueError, match=r"^Offsets must be one axis of integers, got torch.float64 of shape \(6,\)\.$"
    ):
        accumulate_products(score, left, right, offsets.double())


@pytest.mark.gpu
@pytest.mark.parametrize("tile", kernels.TILES)
@pytest.mark.parametrize(("dtype", "precision", "relative"), [
    (torch.float64, "highest", 1e-12), (torch.float32, "highest", 1e-5), (torch.float32, "high", 3e-3),
    (torch.float32, "medium", 3e-2), (torch.bfloat16, "highest", 1e-5), (torch.float16, "highest", 1e-5),
])  # fmt: skip
def test_kernel_on_cuda(dtype: torch.dtype, precision: str, relative: float, tile: Tile) -> None:
    triton = pytest.importorskip("triton")
    if dtype == torch.float64 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        pytest.skip("this Triton multiplies no float64")
    torch.set_float32_matmul_precision(precision)
    try:
        for shape in SHAPES:
            given = problem(shape, dtype)
            moved = tuple(tensor.cuda() for tensor in given)
            wanted = expected(*given)
            assert_right(after(accumulate_fused, moved, tile=tile).cpu(), wanted, relative)
            assert_right(after(accumulate_chunked, moved).cpu(), wanted, relative)
            strides = tuple(tensor.cuda() for tensor in strided(*given))
            assert_right(after(accumulate_products, strides).cpu(), wanted, relative)
    finally:
        torch.set_float32_matmul_precision("highest")


if __name__ == "__main__":
    run_interpreted(Path(sys.argv[1]))
