"""The curvature of a loss at a model's weights, by products with vectors, and directions made from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._typing import Float
from ..masks import Mask
from ..models import check_head, infer_objective, measuring, row_axis, transposed_parameters
from ..objectives import Batch, LossFunction, Predictions, predict
from .directions import Direction, Subspace, check_option, fitted, gaussian, norm

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Kind = Literal["hessian", "ggn"]
Product = Callable[[np.ndarray], np.ndarray]

NAMES: dict[Kind, str] = {"hessian": "Hessian", "ggn": "GGN"}

KRYLOV = 20
"""Vectors that an iteration for eigenvalues keeps at least; fewer entries than this are solved densely."""

RESTARTS = 100


class Curvature:
    r"""The loss of a model, its gradient and its curvature, along the entries that a mask selects.

    .. math::  L(\theta) = \frac{\sum_n \ell_n(\theta)}{\sum_n T_n}, \qquad
               H = \nabla^2 L, \qquad G = \frac{\sum_n J_n^\top H^{out}_n J_n}{\sum_n T_n}

    with :math:`\ell_n` the loss summed over the :math:`T_n` scored tokens of example n, :math:`J_n` the derivative of
    the model's outputs and :math:`H^{out}_n` that of the loss by the outputs, twice (Schraudolph, Neural Computation
    14, 2002). With a mask P everything is restricted to it: :math:`P H P`. The model is in eval mode, is taken at the
    weights that it has when a method is called, and is left bit-identical. Products are exact, by a second backward
    pass, in the model's dtype; sums over batches are in float64.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        objective: str | LossFunction | None = None,
        mask: Mask | None = None,
        kind: Kind = "hessian",
        strict: bool = False,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: The model.
            batches: Input dicts, as in :func:`fisherscope.estimate_fisher`.
            objective: As in :func:`fisherscope.estimate_fisher`.
            mask: The entries that count; None means all. Parameters that it does not cover rest.
            kind: ``"hessian"``, or ``"ggn"`` for the generalised Gauss-Newton matrix, whose eigenvalues are never
                negative; it is the exact Fisher information of the scored tokens.
            strict: Refuse a mask that was made from other weights, instead of warning.

        Raises:
            ValueError: If the kind is unknown, or the GGN is asked of a loss function, or nothing is selected.
            MaskMismatch: If the mask belongs to another model.
        """
        check_option("kind", kind, get_args(Kind))
        self.model, self.batches, self.kind = model, list(batches), kind
        self.objective = objective or infer_objective(model)
        if callable(self.objective) and kind == "ggn":
            raise ValueError(
                "kind='ggn' needs a named objective, with outputs and a loss of them, but the objective is a function "
                "that returns losses; take kind='hessian'."
            )
        check_head(model, self.objective)
        self.selected = mask.for_model(model, strict=strict) if mask is not None else None
        self.parameters = {name: p for name, p in model.named_parameters() if self._count(name, p)}
        self.size = sum(self._count(name, p) for name, p in self.parameters.items())
        if not self.size:
            raise ValueError("The curvature needs at least one entry, but the mask selects none; select some.")

    def _count(self, name: str, parameter: Tensor) -> int:
        if self.selected is None:
            return parameter.numel()
        return int(self.selected[name].sum()) if name in self.selected else 0

    def loss(self) -> float:
        """L."""
        total, count = 0.0, 0
        with measuring(self.model), torch.no_grad():
            for batch in self.batches:
                losses = predict(self.model, batch, self.objective).losses()
                total, count = total + float(losses.total.double().sum()), count + int(losses.count.sum())
        return total / _at_least_one(count)

    def gradient(self) -> dict[str, Tensor]:
        r""":math:`P \nabla L`, in float64."""
        return self._mean(lambda predictions, parameters: _gradients([_total(predictions)], parameters))

    def times(self, direction: Direction) -> dict[str, Tensor]:
        """:math:`P H P d`, or :math:`P G P d`, in float64; parameters that the direction leaves out rest."""
        product = _hessian_product if self.kind == "hessian" else _ggn_product
        moves = [self._restricted(name, direction.get(name)).to(p) for name, p in self.parameters.items()]
        return self._mean(lambda predictions, parameters: product(predictions, parameters, moves))

    def weights(self) -> dict[str, Tensor]:
        r""":math:`P \theta`, in float64."""
        return {name: self._restricted(name, p.detach()).double() for name, p in self.parameters.items()}

    def pack(self, direction: Direction) -> Float[np.ndarray, "entries"]:
        """The selected entries of a direction as one vector."""

        def chosen(name: str) -> Tensor:
            tensor, mask = self._restricted(name, direction.get(name)), self._mask_of(name)
            return (tensor.flatten() if mask is None else tensor[mask]).double().cpu()

        return torch.cat([chosen(name) for name in self.parameters]).numpy()

    def unpack(self, vector: Float[np.ndarray, "entries"]) -> dict[str, Tensor]:
        """The direction of a vector, in float64; 0 where nothing is selected."""
        counts = [self._count(name, p) for name, p in self.parameters.items()]
        parts = torch.from_numpy(np.asarray(vector, dtype=np.float64)).split(counts)

        def spread(name: str, part: Tensor) -> Tensor:
            parameter, mask = self.parameters[name], self._mask_of(name)
            part = part.to(parameter.device)
            if mask is None:
                return part.view(parameter.shape)
            return torch.zeros_like(parameter, dtype=torch.float64).masked_scatter_(mask, part)

        return {name: spread(name, part) for name, part in zip(self.parameters, parts, strict=True)}

    def product(self, vector: Float[np.ndarray, "entries"]) -> Float[np.ndarray, "entries"]:
        """:meth:`times`, from vector to vector."""
        return self.pack(self.times(self.unpack(vector)))

    @property
    def operator(self) -> "LinearOperator":
        """The same as a symmetric matrix of scipy, over the selected entries; for every method that takes one."""
        return _operator(self.product, self.size)

    def _mask_of(self, name: str) -> Tensor | None:
        return None if self.selected is None else self.selected[name]

    def _restricted(self, name: str, tensor: Tensor | None) -> Tensor:
        mask = self._mask_of(name)
        if tensor is None:
            return torch.zeros_like(self.parameters[name])
        return tensor if mask is None else tensor * mask

    def _mean(self, of_batch: Callable[[Predictions, list[nn.Parameter]], Sequence[Tensor]]) -> dict[str, Tensor]:
        """The sum over batches of something with one tensor per parameter, restricted, by the number of tokens."""
        totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.parameters.items()}
        count = 0
        # the fused kernels of attention have no second derivative
        with measuring(self.model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self.parameters)
            for batch in self.batches:
                predictions = predict(self.model, batch, self.objective)
                count += int(predictions.count.sum())
                parts = of_batch(predictions, list(self.parameters.values()))
                for total, part in zip(totals.values(), parts, strict=True):
                    total += part.detach().double()
        return {name: self._restricted(name, total) / _at_least_one(count) for name, total in totals.items()}


def _at_least_one(count: int) -> int:
    if not count:
        raise ValueError(
            "None of the examples has a scored token (a label that is not -100); check labels and objective."
        )
    return count


def _total(predictions: Predictions) -> Tensor:
    return predictions.losses().total.sum()


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> list[Tensor]:
    """``torch.autograd.grad`` for which nothing is also an answer: 0 where an output does not depend on an input."""
    weights = [torch.ones_like(output) for output in outputs] if weights is None else weights
    pairs = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        list(inputs),
        [weight for _, weight in pairs],
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(found)


def _hessian_product(predictions: Predictions, parameters: Sequence[Tensor], moves: Sequence[Tensor]) -> list[Tensor]:
    slopes = _gradients([_total(predictions)], parameters, create_graph=True)
    return _gradients(slopes, parameters, moves)


def _ggn_product(predictions: Predictions, parameters: Sequence[Tensor], moves: Sequence[Tensor]) -> list[Tensor]:
    outputs = predictions.outputs
    # J^T u is linear in u, so its derivative by u along the move is J times the move
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = _gradients([outputs], parameters, [u], create_graph=True)
    (pushed,) = _gradients(pulled, [u], moves, retain_graph=True)
    free = outputs.detach().requires_grad_()
    (slopes,) = _gradients([_total(replace(predictions, outputs=free))], [free], create_graph=True)
    (bent,) = _gradients([slopes], [free], [pushed])
    return _gradients([outputs], parameters, [bent])


def eigenpairs(
    curvature: Curvature, count: int = 1, *, seed: int = 0, tolerance: float = 1e-3
) -> tuple[Float[np.ndarray, "count"], list[dict[str, Tensor]]]:
    r"""The largest eigenvalues, largest first, and unit eigenvectors.

    .. math::  P H P\, v_k = \lambda_k v_k, \qquad \lambda_1 \ge \lambda_2 \ge \dots

    Largest means algebraically: along them the loss rises most; a large negative eigenvalue is not among them. By the
    implicitly restarted Lanczos method of ARPACK (``scipy.sparse.linalg.eigsh``), which keeps max(20, 2 count + 1)
    vectors of float64 in main memory. The entry of largest magnitude of every eigenvector is positive.

    Args:
        curvature: Of what.
        count: How many.
        seed: Of the vector that the iteration starts from.
        tolerance: Relative accuracy of the eigenvalues.

    Raises:
        ValueError: If there are fewer entries than eigenvalues asked for, or the matrix is 0.
        RuntimeError: If they are not found within 100 restarts.
    """
    start = _start(curvature.size, seed)
    if not curvature.product(start).any():
        raise ValueError(
            "Eigenvectors need a curvature that is not 0 everywhere; take another mask, other data or other directions."
        )
    values, vectors = _largest(curvature.product, start, count, "LA", tolerance)
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    return values, [curvature.unpack(vector) for vector in (vectors * signs).T]


def extremes(curvature: Curvature, *, seed: int = 0, tolerance: float = 1e-2) -> tuple[float, float]:
    """The lowest and the highest eigenvalue, both to the tolerance times the larger magnitude; NaN of a NaN product.

    The end of largest magnitude first, then the other one as the largest of the matrix shifted by it, which is well
    separated where the other end itself is close to 0 (Li et al., arXiv 1712.09913, section 6 do the same).
    """
    start = _start(curvature.size, seed)
    product = curvature.product(start)
    if not np.isfinite(product).all():
        return float("nan"), float("nan")
    if not product.any():  # a matrix of zeros, for which ARPACK has no answer
        return 0.0, 0.0
    end = float(_largest(curvature.product, start, 1, "LM", tolerance)[0][0])
    sign = 1.0 if end >= 0 else -1.0

    def shifted(vector: np.ndarray) -> np.ndarray:
        return abs(end) * vector - sign * curvature.product(vector)

    distance = float(_largest(shifted, start, 1, "LA", tolerance)[0][0])
    low, high = sorted((end, end - sign * distance))
    return low, high


def _operator(product: Product, size: int) -> "LinearOperator":
    from scipy.sparse.linalg import LinearOperator

    def flat(vector: np.ndarray) -> np.ndarray:
        return product(vector.ravel())

    return LinearOperator((size, size), matvec=flat, rmatvec=flat, dtype=np.dtype(np.float64))  # pyright: ignore[reportCallIssue]


def _largest(
    product: Product, start: np.ndarray, count: int, which: Literal["LA", "LM"], tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, largest first (algebraically or in magnitude), and eigenvectors as columns."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    size = len(start)
    if not 1 <= count <= size:
        raise ValueError(f"The number of eigenvalues must be from 1 to {size}, the entries that move; got {count}.")
    if size <= max(KRYLOV, 2 * count + 1):  # the iteration would keep as many vectors as there are
        dense = np.stack([product(unit) for unit in np.eye(size)])
        values, vectors = np.linalg.eigh((dense + dense.T) / 2)
    else:
        limits: dict[str, Any] = {"tol": tolerance, "maxiter": RESTARTS}
        try:
            values, vectors = eigsh(_operator(product, size), k=count, which=which, v0=start, **limits)
        except ArpackNoConvergence as error:
            raise RuntimeError(
                f"The eigenvalues were not found to {tolerance:g} within {RESTARTS} restarts; take a larger tolerance, "
                "or a model in float32 if it is not."
            ) from error
    order = np.argsort(-(values if which == "LA" else np.abs(values)), kind="stable")[:count]
    return values[order], vectors[:, order]


def _start(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


def top_eigenvectors(
    model: nn.Module,
    batches: Iterable[Batch],
    axes: int = 2,
    *,
    kind: Kind = "hessian",
    mask: Mask | None = None,
    objective: str | LossFunction | None = None,
    seed: int = 0,
    tolerance: float = 1e-3,
    strict: bool = False,
) -> Subspace:
    r"""Directions along which the loss curves most: eigenvectors of the largest eigenvalues (:func:`eigenpairs`).

    .. math::  d_k = \lVert P\theta\rVert\, v_k

    They are as long as the weights that move (of length 1 if those are all 0), so that steps are relative to the
    weights, as they are along random directions; the loss is about :math:`L + \tfrac12 s^2 \lVert P\theta\rVert^2
    \lambda_k` near step 0, which grows out of sight long before step 1: scan a small span.

    Args:
        model: The model at step 0.
        batches: What the loss is measured on.
        axes: How many.
        kind: ``"hessian"`` or ``"ggn"``, see :class:`Curvature`.
        mask: The entries that move.
        objective: As in :func:`fisherscope.estimate_fisher`.
        seed: Of the iteration.
        tolerance: Relative accuracy of the eigenvalues.
        strict: Refuse a mask that was made from other weights, instead of warning.

    Raises:
        ValueError: As :class:`Curvature` and :func:`eigenpairs`.
        RuntimeError: If they are not found within 100 restarts.
    """
    curvature = Curvature(model, batches, objective=objective, mask=mask, kind=kind, strict=strict)
    values, vectors = eigenpairs(curvature, axes, seed=seed, tolerance=tolerance)
    length = norm(list(curvature.weights().values())) or 1.0
    directions = tuple(
        {name: (length * tensor).to(curvature.parameters[name].dtype) for name, tensor in vector.items()}
        for vector in vectors
    )
    kinds = tuple(
        f"{_ordinal(number)} {NAMES[kind]} eigenvector, λ = {value:.3g}" for number, value in enumerate(values, start=1)
    )
    return Subspace(directions, kinds)


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"


def steepest(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    adaptive: bool = False,
    mask: Mask | None = None,
    objective: str | LossFunction | None = None,
    strict: bool = False,
) -> Subspace:
    r"""The one direction along which the loss rises fastest, of radius 1: steps are the radius of sharpness.

    .. math::  d = \frac{g}{\lVert g\rVert}, \qquad
               d = \frac{\theta^2 \odot g}{\lVert\, |\theta| \odot g\,\rVert}\ \text{ if adaptive}, \qquad
               g = P \nabla L

    The loss at step :math:`\rho` less that at 0 is the sharpness of radius :math:`\rho` to first order of the ascent
    (SAM, Foret et al., arXiv 2010.01412, equation 2; adaptive: ASAM, Kwon et al., arXiv 2102.11600, without the offset
    of the weights, which leaves it as it is when layers are rescaled against each other).

    Args:
        model: The model at step 0.
        batches: What the loss is measured on.
        adaptive: As above.
        mask: The entries that move.
        objective: As in :func:`fisherscope.estimate_fisher`.
        strict: Refuse a mask that was made from other weights, instead of warning.

    Raises:
        ValueError: As :class:`Curvature`, or if the gradient is 0.
    """
    curvature = Curvature(model, batches, objective=objective, mask=mask, strict=strict)
    found = ascent(curvature, adaptive=adaptive)
    direction = {name: tensor.to(curvature.parameters[name].dtype) for name, tensor in found.items()}
    return Subspace((direction,), (f"steepest ascent{', adaptive' if adaptive else ''}, steps are its radius",))


def ascent(curvature: Curvature, *, adaptive: bool = False) -> dict[str, Tensor]:
    """The direction of :func:`steepest`, in float64.

    Raises:
        ValueError: If the gradient is 0.
    """
    gradient, size = curvature.gradient(), {name: w.abs() for name, w in curvature.weights().items()}
    slope = {name: size[name] * g for name, g in gradient.items()} if adaptive else gradient
    length = norm(list(slope.values()))
    if not length > 0:
        raise ValueError(f"The steepest direction needs a gradient, but its norm is {length:g}; select other entries.")
    return {name: (size[name] * t if adaptive else t) / length for name, t in slope.items()}


def low_rank(model: nn.Module, axes: int = 2, *, rank: int, seed: int = 0) -> Subspace:
    r"""Random directions of low rank in every matrix, as an adapter moves a model, scaled row by row to the weights.

    .. math::  d = D\, B A, \qquad B \in \mathbb R^{m \times r},\ A \in \mathbb R^{r \times n} \text{ Gaussian}

    with D the diagonal matrix that gives every row the norm of the weight's row
    (:func:`fisherscope.landscape.random_directions`), which keeps the rank. Parameters of one dimension rest; of those
    of more than two, all axes but that of the rows count as one. A mask of single entries, in a scan, does not keep the
    rank.

    Args:
        model: The model the directions start from.
        axes: How many directions.
        rank: r; from the size of a matrix on nothing is left of the restriction.
        seed: Of the draw; the same numbers on every device.

    Raises:
        ValueError: If the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    transposed = transposed_parameters(model)

    def product(name: str, weight: Tensor, number: int) -> Tensor:
        if weight.ndim < 2:
            return torch.zeros_like(weight)
        axis = row_axis(name, transposed)
        rows = weight.movedim(axis, 0)
        like = weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))
        b = gaussian(like.expand(len(rows), rank), seed, number, f"{name}, rows")
        a = gaussian(like.expand(rank, rows[0].numel()), seed, number, f"{name}, columns")
        drawn = (b @ a).view(rows.shape).movedim(0, axis)
        scaled = fitted(drawn, weight.to(drawn.dtype), [k for k in range(weight.ndim) if k != axis])
        return scaled.to(weight.dtype).contiguous()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    directions = tuple({name: product(name, w, number) for name, w in weights.items()} for number in range(axes))
    return Subspace(directions, (f"random of rank {rank}, filter-normalised",) * axes)
