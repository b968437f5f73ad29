r"""Sums over examples of squared matrix products: :math:`S \mathrel{+}= \sum_n (L_n^\top R_n)^2`, entry by entry.

The gradient of a weight is such a product for every example, and its score the sum of their squares. Forming the
products of all examples at once takes B x O x I numbers. :func:`accumulate_chunked` forms them in a small buffer, on
any device. Two kernels never write them: tile of the score by tile, they form that of every example's product in
registers, square and add it there, and touch the score once. :func:`accumulate_fused` is one for GPUs, in Triton,
:func:`~.compiled.accumulate_compiled` one for CPUs, in C. :func:`accumulate_products` takes what is fastest.

Triton is imported when a kernel is first built, so everything else works without it.

Shape names: M rows of all examples one after the other (zero rows left out), N examples, O outputs, I inputs.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._typing import Float, Int
from . import compiled

logger = logging.getLogger(__name__)

# Becomes triton.language when a kernel is built: Triton looks names up among the globals of the kernel, and knows its
# compile-time arguments by the name of their annotation.
tl: Any = SimpleNamespace(constexpr=type("constexpr", (), {}))


@dataclass(frozen=True)
class Tile:
    """How one program of the kernel works: its part of the score, its warps, and its steps in flight."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# Two float32 sums per entry live in registers: at most 128 a thread. Two stages go to reading where a step starts.
TILES = (Tile(128, 128, 8, 5), Tile(64, 128, 4, 5), Tile(128, 64, 4, 5), Tile(64, 64, 4, 5), Tile(64, 64, 4, 3))

_ALIGNMENT = 16  # what Triton must know of widths, strides and addresses to copy 16 bytes at a time
_TILE_ROWS_IN_A_GROUP = 8  # neighbouring programs share their rows of left or right in the L2 cache
_SMALL_WORK = {"cpu": 2**22, "cuda": 2**26}  # operations: below it, calls and building matter more
_SCRATCH_BYTES = {"cpu": 2**22, "other": 2**26}  # a few rows of a score stay in the cache


@torch.no_grad()
def accumulate_products(
    score: Float[Tensor, "O I"], left: Float[Tensor, "M O"], right: Float[Tensor, "M I"], offsets: Int[Tensor, "bounds"]
) -> None:
    r""":math:`S \mathrel{+}= \sum_n (L_n^\top R_n)^2`, in place, the fastest way this device has.

    float32 inputs are multiplied as ``torch.set_float32_matmul_precision`` says: ``"highest"`` in float32, ``"high"``
    in TF32, ``"medium"`` in bfloat16; half-precision inputs stay what they are. Sums are float32 (float64 for float64).
    The kernel for CPUs multiplies float32 in float32 whatever it says.

    On a CPU float32 goes to the compiled kernel, if there is one and the work is not tiny. On CUDA all candidates are
    timed once, on scratch, for every kind of work: shape, dtype, precision, and M and N to the next power of two. Under
    ``torch.use_deterministic_algorithms(True)`` nothing depends on timing.

    Args:
        score: Sum of squares so far; any strides.
        left: Gradients of the outputs, the rows of one example next to each other.
        right: Inputs, row by row those of ``left``.
        offsets: Example n has the rows ``offsets[n]:offsets[n + 1]``, possibly none.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(score, left, right, offsets)
    if len(left) and len(offsets) > 1:
        _fastest(score, left, right, offsets)(score, left, right, offsets)


def compact(
    left: Float[Tensor, "N T O"], right: Float[Tensor, "N T I"]
) -> tuple[Float[Tensor, "M O"], Float[Tensor, "M I"], Int[Tensor, "N+1"]]:
    """The rows of all examples one after the other, without those where ``left`` is zero: padding, unscored positions.

    Returns:
        ``left``, ``right`` and ``offsets`` of :func:`accumulate_products`; views where nothing is left out.
    """
    if bool((left[..., 0] != 0).all()):  # the usual answer without a pass over what may be a vocabulary wide
        offsets = torch.arange(len(left) + 1, device=left.device) * left.shape[1]
        return left.flatten(0, 1), right.flatten(0, 1), offsets
    kept = torch.linalg.vector_norm(left, float("inf"), dim=-1) != 0
    return left[kept], right[kept], F.pad(kept.sum(1).cumsum(0), (1, 0))


Accumulate = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def _check(score: Tensor, left: Tensor, right: Tensor, offsets: Tensor) -> None:
    if score.ndim != 2 or score.shape != (left.shape[-1], right.shape[-1]) or len(left) != len(right):
        raise ValueError(
            "A score of shape (outputs, inputs) needs left of shape (rows, outputs) and right of shape (rows, inputs), "
            f"but they are {tuple(score.shape)}, {tuple(left.shape)} and {tuple(right.shape)}."
        )
    if offsets.ndim != 1 or offsets.is_floating_point():
        raise ValueError(f"Offsets must be one axis of integers, got {offsets.dtype} of shape {tuple(offsets.shape)}.")


_CHOICES: dict[tuple[object, ...], Accumulate] = {}


def _fastest(score: Tensor, left: Tensor, right: Tensor, offsets: Tensor) -> Accumulate:
    if 2 * len(left) * score.numel() < _SMALL_WORK.get(left.device.type, 0):
        return accumulate_chunked
    if compiled.can_take(score, left, right):
        return compiled.accumulate_compiled if compiled.kernel() else accumulate_chunked
    if not _choice_matters(left):
        return accumulate_chunked
    sizes = (*score.shape, len(left).bit_length(), len(offsets).bit_length())
    kind = (left.device, left.dtype, right.dtype, _precision(), *sizes)
    if kind not in _CHOICES:
        _CHOICES[kind] = _timed_choice(score, left, right, offsets)
    return _CHOICES[kind]


def _choice_matters(left: Tensor) -> bool:
    fixed = not left.is_cuda or torch.are_deterministic_algorithms_enabled()
    return not fixed and importlib.util.find_spec("triton") is not None


def _timed_choice(score: Tensor, left: Tensor, right: Tensor, offsets: Tensor) -> Accumulate:
    """The fastest candidate; one that fails, as on a GPU that Triton does not know, is out."""
    candidates: dict[str, Accumulate] = {"in chunks": accumulate_chunked}
    candidates |= {f"by the kernel, {tile}": functools.partial(accumulate_fused, tile=tile) for tile in TILES}
    scratch = torch.zeros_like(score)  # what timing adds must not reach the score
    milliseconds: dict[str, float] = {}
    failures: dict[str, str] = {}  # in words: an error holds the frames that it came through, and their buffers
    for name, candidate in candidates.items():
        try:
            milliseconds[name] = _milliseconds(candidate, scratch, left, right, offsets)
        except Exception as error:  # whatever compilers and drivers raise
            failures[name] = str(error.__cause__ or error).partition("\n")[0]  # Triton's own begins with a place
    if not milliseconds:
        milliseconds["in chunks"] = _milliseconds(accumulate_chunked, scratch, left, right, offsets)  # raises again
    if list(milliseconds) == ["in chunks"]:
        _warn_once(list(failures.values())[-1])
    logger.debug("%s over %d rows: milliseconds %s, failed %s", tuple(score.shape), len(left), milliseconds, failures)
    return candidates[min(milliseconds, key=milliseconds.__getitem__)]


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("The fused kernel does not run on this GPU (%s); products are formed in chunks instead.", reason)


def _milliseconds(run: Accumulate, *arguments: Tensor, repeats: int = 3) -> float:
    run(*arguments)  # compiles, warms up
    with torch.cuda.device_of(arguments[0]):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run(*arguments)
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / repeats


@torch.no_grad()
def accumulate_chunked(
    score: Float[Tensor, "O I"],
    left: Float[Tensor, "M O"],
    right: Float[Tensor, "M I"],
    offsets: Int[Tensor, "bounds"],
    *,
    max_bytes: int | None = None,
) -> None:
    """:func:`accumulate_products` by batched matrix products in a buffer, on any device.

    Args:
        score: As in :func:`accumulate_products`.
        left: Likewise.
        right: Likewise.
        offsets: Likewise.
        max_bytes: Size of the buffer, though never less than one row of one product; by default about one cache.
    """
    dtype = _sum_dtype(left, right)
    outputs, inputs = score.shape
    bounds = offsets.unique_consecutive().tolist()  # an example without rows adds nothing
    if max_bytes is None:
        max_bytes = _SCRATCH_BYTES.get(left.device.type, _SCRATCH_BYTES["other"])
    room = max_bytes // dtype.itemsize
    height = min(max(room // inputs, 1), outputs)
    count = max(room // (height * inputs), 1) if height == outputs else 1
    buffer = torch.empty(min(count, len(bounds) - 1) * height * inputs, dtype=dtype, device=left.device)
    chunks = ((_padded(left, c, dtype), _padded(right, c, dtype)) for c in _chunks(bounds, count))
    parts = chunks if height == outputs else list(chunks)  # one example each, and no copies
    for row in range(0, outputs, height):
        block = score[row : row + height]  # stays in the cache, as the buffer does
        for lefts, rights in parts:
            products = buffer[: len(lefts) * block.numel()].view(len(lefts), *block.shape)
            if len(lefts) == 1:  # a batch of one would be left to a single thread
                torch.mm(lefts[0, :, row : row + height].T, rights[0], out=products[0])
            else:
                torch.bmm(lefts[..., row : row + height].mT, rights, out=products)
            _add_squares(block, products)


def _chunks(bounds: list[int], count: int) -> Iterator[list[int]]:
    for first in range(0, len(bounds) - 1, count):
        yield bounds[first : first + count + 1]


def _padded(rows: Tensor, bounds: list[int], dtype: torch.dtype) -> Float[Tensor, "examples positions width"]:
    """The rows between the bounds by example, filled up with zeros; a view where there is nothing to do."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    longest, part = max(lengths), rows[bounds[0] : bounds[-1]]
    if min(lengths) == longest:
        return part.to(dtype).reshape(len(lengths), longest, -1)
    slots = [example * longest + position for example, length in enumerate(lengths) for position in range(length)]
    filled = part.new_zeros(len(lengths) * longest, part.shape[1], dtype=dtype)
    filled[torch.tensor(slots, device=rows.device)] = part.to(dtype)
    return filled.view(len(lengths), longest, -1)


def _add_squares(score: Tensor, products: Tensor) -> None:
    if len(products) == 1 and products.dtype == score.dtype:
        score.addcmul_(products[0], products[0])  # one pass over the cache-sized block
    else:
        score.add_(products.square_().sum(0))


def _sum_dtype(left: Tensor, right: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (torch.float32, left.dtype, right.dtype))


@torch.no_grad()
def accumulate_fused(
    score: Float[Tensor, "O I"],
    left: Float[Tensor, "M O"],
    right: Float[Tensor, "M I"],
    offsets: Int[Tensor, "bounds"],
    *,
    tile: Tile = TILES[0],
) -> None:
    """:func:`accumulate_products` by the Triton kernel: CUDA tensors, or any under ``TRITON_INTERPRET=1``.

    Args:
        score: As in :func:`accumulate_products`.
        left: Likewise.
        right: Likewise.
        offsets: Likewise.
        tile: The part of the score that one program owns.

    Raises:
        ModuleNotFoundError: If Triton is not installed.
    """
    if not len(left) or len(offsets) < 2:
        return
    kernel = _built_kernel()
    dtype, precision, depth = _multiplication(left, right, len(left) / (len(offsets) - 1))
    left, right = _aligned(left, dtype), _aligned(right, dtype)
    if dtype == torch.bfloat16 and type(kernel).__name__ == "InterpretedFunction":
        left, right = left.float(), right.float()  # it multiplies the bits: triton-lang/triton issue 11584
    steps = _step_table(offsets.to(left.device), len(left), depth)
    tiles = -(-score.shape[0] // tile.rows) * -(-score.shape[1] // tile.columns)
    with torch.cuda.device_of(left):
        kernel[(tiles,)](
            score, left, right, *steps, *score.shape, left.shape[1], right.shape[1],
            left.stride(0), right.stride(0), *score.stride(),
            tile_rows=tile.rows, tile_columns=tile.columns, depth=depth, group=_TILE_ROWS_IN_A_GROUP,
            precision=precision, sums=tl.float64 if dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch.backends, as Transformers does, and torch refuses to translate
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def _multiplication(left: Tensor, right: Tensor, mean_length: float) -> tuple[torch.dtype, str, int]:
    """Dtype of the factors, Triton's name of the precision, and rows per step: no more than examples usually have."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    precision = _precision()
    if dtype == torch.float32 and precision == "medium":
        dtype = torch.bfloat16
    tensor_cores = dtype.itemsize == 2 or (dtype == torch.float32 and precision == "high")
    most = 128 // dtype.itemsize if tensor_cores else 16
    depth = next(size for size in (16, 32, 64) if size >= min(mean_length, most))
    return dtype, "tf32" if tensor_cores else "ieee", depth


def _aligned(rows: Tensor, dtype: torch.dtype) -> Float[Tensor, "M width"]:
    """The same rows where 16-byte copies can read them: a copy with zero columns at the end unless they already are."""
    sizes = (rows.shape[1], rows.stride(0), rows.data_ptr())
    if rows.dtype == dtype and rows.stride(1) == 1 and not any(size % _ALIGNMENT for size in sizes):
        return rows
    width = -(-rows.shape[1] // _ALIGNMENT) * _ALIGNMENT
    copy = rows.new_empty(len(rows), width, dtype=dtype)
    copy[:, : rows.shape[1]] = rows
    copy[:, rows.shape[1] :] = 0
    return copy


Steps = tuple[Int[Tensor, "steps"], Int[Tensor, "steps"], Int[Tensor, ""]]


def _steps(offsets: Tensor, num_rows: int, depth: int) -> Steps:
    """First row of every step, first row after its example, and how many steps there are; nothing waits for the GPU.

    A step is up to ``depth`` rows of one example. How many there are depends on the lengths, so the table is as long as
    it could get, and what follows the last step is never read.
    """
    begins, ends = offsets[:-1], offsets[1:]
    steps = (ends - begins + depth - 1) // depth
    through = steps.cumsum(0)
    shift = begins - (through - steps) * depth
    numbers = torch.arange(num_rows // depth + len(begins), device=offsets.device)
    example = torch.searchsorted(through, numbers, right=True).clamp_(max=len(begins) - 1)
    starts = shift[example] + numbers * depth
    return starts.int(), ends[example].int(), through[-1].int()


def _step_table(offsets: Tensor, num_rows: int, depth: int) -> Steps:
    if offsets.is_inference():  # has no version
        return _steps(offsets, num_rows, depth)
    return _kept_steps(offsets, offsets._version, num_rows, depth)


@functools.lru_cache(maxsize=8)
def _kept_steps(offsets: Tensor, version: int, num_rows: int, depth: int) -> Steps:
    """The layers of a model mostly share their offsets: the same tensor, its content told by its version."""
    return _steps(offsets, num_rows, depth)


@functools.cache
def _built_kernel() -> Any:
    global tl
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    return triton.jit(inspect.unwrap(_add_squared_products))  # Triton reads the source: not of what checks its types


def _add_squared_products(
    score, left, right, starts, ends, num_steps,  # no annotations: Triton would take them for code
    num_rows, num_columns, left_width, right_width, left_stride, right_stride, row_stride, column_stride,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, depth: tl.constexpr, group: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
    precision: tl.constexpr, sums: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
) -> None:  # fmt: skip
    tiles_down = (num_rows + tile_rows - 1) // tile_rows
    tiles_across = (num_columns + tile_columns - 1) // tile_columns
    in_group = tl.program_id(0) % (group * tiles_across)
    above = tl.program_id(0) // (group * tiles_across) * group
    group_height = tl.minimum(tiles_down - above, group)
    first_row = (above + in_group % group_height) * tile_rows
    first_column = in_group // group_height * tile_columns

    row = tl.arange(0, tile_rows)
    column = tl.arange(0, tile_columns)
    position = tl.arange(0, depth)
    left_inside = (first_row + row < left_width)[None, :]
    right_inside = (first_column + column < right_width)[None, :]
    left_cell = position[:, None] * left_stride + row[None, :]
    right_cell = position[:, None] * right_stride + column[None, :]
    left += first_row
    right += first_column

    # One loop over the steps of all examples, not one within another: so the copies of the next example's rows are
    # under way while this one's are multiplied.
    product = tl.zeros((tile_rows, tile_columns), dtype=sums)
    total = tl.zeros((tile_rows, tile_columns), dtype=sums)
    for step in range(tl.load(num_steps)):
        start = tl.load(starts + step)
        end = tl.load(ends + step)
        inside = (start + position < end)[:, None]
        first = start.to(tl.int64)  # rows times width can exceed 32 bits; offsets within a tile cannot
        left_part = tl.load(left + first * left_stride + left_cell, mask=inside & left_inside, other=0.0)
        right_part = tl.load(right + first * right_stride + right_cell, mask=inside & right_inside, other=0.0)
        product = tl.dot(tl.trans(left_part), right_part, product, input_precision=precision, out_dtype=sums)
        if start + depth >= end:
            total += product * product
            product = tl.zeros((tile_rows, tile_columns), dtype=sums)

    score += first_row.to(tl.int64) * row_stride + first_column.to(tl.int64) * column_stride
    cell = score + row[:, None] * row_stride + column[None, :] * column_stride
    within = (first_row + row < num_rows)[:, None] & (first_column + column < num_columns)[None, :]
    tl.store(cell, tl.load(cell, mask=within) + total, mask=within)
