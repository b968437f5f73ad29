"""Numbers about a landscape, and about the loss near the model at its centre."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .._progress import progress_bar
from .._typing import Float
from .curvature import Curvature, Product, ascent, eigenpairs, extremes
from .directions import Direction, inner, restrict
from .surface import Landscape

REACH = 2
"""Grid points on either side of the centre that the local quadratic is fitted to."""


@dataclass(frozen=True)
class Estimate:
    """A mean over random draws.

    Attributes:
        mean: The estimate.
        error: Its standard error; NaN of one draw.
        draws: Number of draws.
    """

    mean: float
    error: float
    draws: int


@dataclass(frozen=True)
class Basin:
    """How far one can go from the centre of a landscape before the loss has risen by a threshold.

    Attributes:
        threshold: The rise, in units of the loss.
        radius: Euclidean distance in weight space. If ``steps`` is None, only what is known: it is at least this much.
        steps: Where the threshold is reached first; None if not within the largest ball that the grid holds.
    """

    threshold: float
    radius: float
    steps: tuple[float, ...] | None


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The loss near the centre of a landscape, as a polynomial of the steps.

    Attributes:
        gradient: First derivatives, :math:`d_i^T g`.
        hessian: Second derivatives, :math:`d_i^T H d_j`.
        residual: Root mean square of what the fit leaves, as a share of that of the loss less the centre's; 0 for an
            exact quadratic. Where it is large the derivatives are those of no point.
        points: Number of grid points that were fitted.
    """

    gradient: Float[np.ndarray, "axes"]
    hessian: Float[np.ndarray, "axes axes"]
    residual: float
    points: int


@dataclass(frozen=True, eq=False)
class Spectrum:
    """An estimate of how the eigenvalues of a matrix are distributed.

    Attributes:
        nodes: Places on the real line, ascending.
        weights: The share of the eigenvalues at each; they sum to 1.
    """

    nodes: Float[np.ndarray, "nodes"]
    weights: Float[np.ndarray, "nodes"]

    def smoothed(self, values: Float[np.ndarray, "values"], width: float) -> Float[np.ndarray, "values"]:
        r"""The density at some values: :math:`\sum_k w_k\, \mathcal N(x; \lambda_k, \text{width}^2)`."""
        z = (np.asarray(values)[:, None] - self.nodes) / width
        return np.exp(-(z**2) / 2) @ self.weights / (width * math.sqrt(2 * math.pi))


def basin_radius(landscape: Landscape, threshold: float = 0.1) -> Basin:
    r"""The distance to the nearest point where the loss is higher than at the centre by a threshold.

    .. math::  r = \min \{\lVert s_1 d_1 + s_2 d_2 \rVert : L(s) - L(0) \ge \tau\}

    over the points of the grid's lines, on which the loss is taken to be linear between neighbours. Only as far as the
    grid holds the whole ball; a loss that is not finite is above every threshold, points that were neither measured nor
    predicted say nothing. (Chen et al., arXiv 2505.17646, call the region where a model keeps what it can do a basin.)

    Args:
        landscape: Along one axis or more.
        threshold: :math:`\tau`, positive, in units of the loss.

    Raises:
        ValueError: If the threshold is not positive or the centre has no finite loss.
    """
    if not threshold > 0:
        raise ValueError(f"The threshold of a basin must be positive, got {threshold}.")
    if not math.isfinite(landscape.centre_loss):
        raise ValueError(f"A basin needs a finite loss at the centre, but it is {landscape.centre_loss}.")
    rise = np.where(landscape.evaluated & np.isnan(landscape.loss), np.inf, landscape.loss) - landscape.centre_loss
    places = np.stack(np.meshgrid(*(axis.steps for axis in landscape.axes), indexing="ij"), axis=-1)
    metric = _inner_products(landscape)
    held = _held(landscape, metric)
    crossings = np.concatenate([_crossings(rise, places, axis, threshold) for axis in range(rise.ndim)])
    distances = np.sqrt(np.einsum("pi,ij,pj->p", crossings, metric, crossings).clip(min=0))
    if not len(distances) or distances.min() > held:
        return Basin(threshold, held, None)
    nearest = int(distances.argmin())
    return Basin(threshold, float(distances[nearest]), tuple(map(float, crossings[nearest])))


def _crossings(rise: np.ndarray, places: np.ndarray, axis: int, threshold: float) -> np.ndarray:
    """Where the loss passes the threshold between neighbours along one axis: steps, one row per place."""
    size = rise.shape[axis]
    a, b = (np.take(rise, range(start, size - 1 + start), axis).ravel() for start in (0, 1))
    at, to = (np.take(places, range(s, size - 1 + s), axis).reshape(-1, places.shape[-1]) for s in (0, 1))
    passes = (np.minimum(a, b) < threshold) & (np.maximum(a, b) >= threshold)
    a, b, at, to = a[passes], b[passes], at[passes], to[passes]
    with np.errstate(invalid="ignore"):
        share = (threshold - a) / (b - a)
    share = np.where(np.isinf(b), 0.0, np.where(np.isinf(a), 1.0, share))  # next to infinity: at the finite end
    return at + share[:, None] * (to - at)


def _inner_products(landscape: Landscape) -> np.ndarray:
    if landscape.geometry is not None:
        return landscape.geometry.inner
    return np.diag([axis.norm**2 for axis in landscape.axes])


def _held(landscape: Landscape, metric: np.ndarray) -> float:
    """The radius of the largest ball around the centre that the grid holds."""
    heights = 1 / np.sqrt(np.diag(np.linalg.pinv(metric)))  # of step 1 above the span of the other axes
    ends = [min(-axis.steps.min(), axis.steps.max()) for axis in landscape.axes]
    return float(np.min(heights * ends))


def fitted_curvature(landscape: Landscape) -> Quadratic:
    r"""The quadratic that fits the points nearest to the centre, by least squares.

    .. math::  L(s) \approx c + b^\top s + \tfrac12 s^\top A\, s

    over the points within two of the centre along every axis. In units of steps, as :func:`slice_curvature`.

    Args:
        landscape: Along one axis or more.

    Raises:
        ValueError: If there are fewer measured finite points there than coefficients.
    """
    block = np.zeros(landscape.loss.shape, dtype=bool)
    block[tuple(slice(max(c - REACH, 0), c + REACH + 1) for c in landscape.centre)] = True
    index = np.argwhere(block & landscape.evaluated & np.isfinite(landscape.loss))
    steps = np.stack([axis.steps[index[:, k]] for k, axis in enumerate(landscape.axes)], axis=1)
    loss = landscape.loss[tuple(index.T)]
    axes = len(landscape.axes)
    pairs = [(i, j) for i in range(axes) for j in range(i, axes)]
    scale = np.abs(steps).max(axis=0, initial=0)  # for the condition of the fit
    s = steps / np.where(scale > 0, scale, 1)
    columns = [np.ones(len(s)), *s.T, *(s[:, i] * s[:, j] / (2 if i == j else 1) for i, j in pairs)]
    design = np.stack(columns, axis=1)
    if np.linalg.matrix_rank(design) < len(columns):
        raise ValueError(
            f"A quadratic along {axes} axes needs {len(columns)} measured points with finite losses around the centre, "
            f"three along each axis; the {len(s)} there are not enough."
        )
    found = np.linalg.lstsq(design, loss, rcond=None)[0]
    hessian = np.zeros((axes, axes))
    for (i, j), value in zip(pairs, found[axes + 1 :], strict=True):
        hessian[i, j] = hessian[j, i] = value / (scale[i] * scale[j])
    spread = float(np.sqrt(np.mean((loss - landscape.centre_loss) ** 2)))
    left = float(np.sqrt(np.mean((loss - design @ found) ** 2)))
    return Quadratic(found[1 : axes + 1] / scale, hessian, left / spread if spread else 0.0, len(s))


def slice_curvature(
    curvature: Curvature, directions: Sequence[Direction]
) -> Float[np.ndarray, "directions directions"]:
    r"""The second derivatives of the loss along directions, at the model itself: :math:`d_i^\top P H P d_j`.

    What :func:`fitted_curvature` estimates of a landscape along the same directions, with the same mask.

    Args:
        curvature: Of the model.
        directions: One per axis, before or after the mask.
    """
    products = [curvature.times(direction) for direction in directions]
    found = np.array([[inner(direction, product) for product in products] for direction in directions])
    return (found + found.T) / 2


def sharpness(curvature: Curvature, *, radius: float = 0.05, adaptive: bool = False) -> float:
    r"""How much the loss rises where it is steepest, a radius away.

    .. math::  S = L\!\left(\theta + \rho \frac{g}{\lVert g\rVert}\right) - L(\theta), \qquad
               S = L\!\left(\theta + \rho \frac{\theta^2 \odot g}{\lVert\,|\theta| \odot g\,\rVert}\right) - L(\theta)
               \ \text{ if adaptive}

    the worst case over a ball to first order (Foret et al., arXiv 2010.01412, equation 2); the adaptive one, over an
    ellipsoid scaled by the weights, is the same for every scaling of layers that leaves the function unchanged (Kwon et
    al., arXiv 2102.11600). Describes a model; it does not reliably predict how well it generalises (Andriushchenko et
    al., arXiv 2302.07011).

    Args:
        curvature: Of the model, the data and the mask; its kind does not matter.
        radius: :math:`\rho`.
        adaptive: As above.

    Raises:
        ValueError: If the gradient is 0.
    """
    return _rise(curvature, ascent(curvature, adaptive=adaptive), radius, curvature.loss())


def _rise(curvature: Curvature, direction: Direction, step: float, start: float) -> float:
    with displaced(curvature.model, [direction], [step]):
        return curvature.loss() - start


@contextmanager
def displaced(model: nn.Module, directions: Sequence[Direction], steps: Sequence[float]) -> Iterator[None]:
    """The model moved along directions for the length of a block, and bit-identical afterwards."""
    parameters = dict(model.named_parameters())
    moving = {name for direction in directions for name in direction}
    kept = {name: parameters[name].detach().clone() for name in moving}
    try:
        with torch.no_grad():
            for name, weight in kept.items():
                moved = weight.to(torch.promote_types(weight.dtype, torch.float32))  # rounded once, at the end
                for step, direction in zip(steps, directions, strict=True):
                    if name in direction:
                        moved = moved + step * direction[name].to(moved)
                parameters[name].copy_(moved)
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                parameters[name].copy_(weight)


def average_sharpness(
    curvature: Curvature, *, size: float = 0.05, adaptive: bool = False, draws: int = 16, seed: int = 0
) -> Estimate:
    r"""How much the loss rises on average over Gaussian moves of a given size.

    .. math::  \mathbb E\, L(\theta + \sigma z) - L(\theta), \qquad
               z_i \sim \mathcal N(0, \lVert P\theta\rVert^2 / n), \qquad
               z_i \sim \mathcal N(0, \theta_i^2)\ \text{ if adaptive}

    for the n entries that the mask selects, so that both move the weights by :math:`\sigma \lVert P\theta\rVert` on
    average (root mean square): :math:`\sigma` is the size relative to the weights, as are the steps of a
    landscape (Andriushchenko et al., arXiv 2302.07011, average-case sharpness).

    Args:
        curvature: Of the model, the data and the mask; its kind does not matter.
        size: :math:`\sigma`.
        adaptive: As above.
        draws: Number of moves.
        seed: Of the moves; the same numbers on every device.

    Raises:
        ValueError: If ``draws`` is below 2.
    """
    if draws < 2:
        raise ValueError(f"An average with a standard error needs at least 2 draws, got {draws}.")
    start, weights = curvature.loss(), curvature.pack(curvature.weights())
    scale = (
        np.abs(weights) if adaptive else np.full(curvature.size, np.linalg.norm(weights) / math.sqrt(curvature.size))
    )

    def rise(draw: int) -> float:
        return _rise(curvature, curvature.unpack(scale * _random(seed, draw).standard_normal(len(scale))), size, start)

    return _estimate([rise(draw) for draw in range(draws)])


def _random(seed: int, draw: int) -> np.random.Generator:
    return np.random.default_rng([seed, draw])


def _estimate(values: Sequence[float]) -> Estimate:
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(np.mean(values)), float(error), len(values))


def top_eigenvalues(curvature: Curvature, count: int = 1, *, seed: int = 0, tolerance: float = 1e-3) -> list[float]:
    """The largest eigenvalues, largest first; see :func:`fisherscope.landscape.curvature.eigenpairs`."""
    return list(map(float, eigenpairs(curvature, count, seed=seed, tolerance=tolerance)[0]))


def trace(curvature: Curvature, *, tolerance: float = 0.05, draws: int = 100, seed: int = 0) -> Estimate:
    r"""The sum of the eigenvalues, by random signs (Hutchinson, Communications in Statistics 18, 1989).

    .. math::  \operatorname{tr} H = \mathbb E\, z^\top H z, \qquad z_i = \pm 1, \qquad
               \operatorname{Var} = 2 \left(\lVert H\rVert_F^2 - \sum_i H_{ii}^2\right)

    until the standard error is below the tolerance times the mean, from the tenth draw on. A running mean that hardly
    changes says nothing; its standard error does.

    Args:
        curvature: Of what.
        tolerance: As above, relative.
        draws: At most, at least 2; then the error is what it is.
        seed: Of the signs.

    Raises:
        ValueError: If ``draws`` is below 2.
    """
    if draws < 2:
        raise ValueError(f"A trace with a standard error needs at least 2 draws, got {draws}.")
    values: list[float] = []
    for draw in range(draws):
        signs = _signs(curvature.size, seed, draw)
        values.append(float(signs @ curvature.product(signs)))
        if len(values) >= 10 and _estimate(values).error <= tolerance * abs(_estimate(values).mean):
            break
    return _estimate(values)


def _signs(size: int, seed: int, draw: int) -> np.ndarray:
    return _random(seed, draw).integers(0, 2, size) * 2.0 - 1.0


def spectral_density(curvature: Curvature, *, steps: int = 30, draws: int = 1, seed: int = 0) -> Spectrum:
    r"""How the eigenvalues are distributed, by stochastic Lanczos quadrature.

    .. math::  \phi(x) = \frac1n \sum_i \delta(x - \lambda_i) \approx
               \frac1K \sum_k \sum_j \tau_{kj}^2\, \delta(x - \theta_{kj})

    with :math:`\theta_{kj}` the eigenvalues of the tridiagonal matrix of m Lanczos steps from random signs number k,
    and :math:`\tau_{kj}` the first entries of its eigenvectors (Golub and Welsch, Mathematics of Computation 23, 1969;
    Ubaru et al., SIAM Journal on Matrix Analysis and Applications 38, 2017). Every vector is made orthogonal to all
    earlier ones, twice: rounding would repeat eigenvalues; ``steps`` vectors of float64 are kept in main memory. With
    as many steps as entries the eigenvalues are exact.

    Args:
        curvature: Of what.
        steps: m, the products with vectors per draw; no more than there are entries.
        draws: K.
        seed: Of the signs.

    Raises:
        ValueError: If ``steps`` or ``draws`` is below 1.
    """
    if steps < 1 or draws < 1:
        raise ValueError(f"steps and draws must be at least 1, got {steps} and {draws}.")
    count, size = min(steps, curvature.size), curvature.size
    found = [_quadrature(curvature.product, _signs(size, seed, draw), count) for draw in range(draws)]
    nodes = np.concatenate([nodes for nodes, _ in found])
    weights = np.concatenate([weights for _, weights in found]) / draws
    order = np.argsort(nodes, kind="stable")
    return Spectrum(nodes[order], weights[order])


def _quadrature(product: Product, start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss quadrature for the spectral measure of a unit vector along the start."""
    from scipy.linalg import eigh_tridiagonal

    basis = np.zeros((steps, len(start)))
    basis[0] = start / np.linalg.norm(start)
    diagonal, beside = [], []
    for k in range(steps):
        rest = product(basis[k])
        diagonal.append(float(basis[k] @ rest))
        for _ in range(2):
            rest = rest - basis[: k + 1].T @ (basis[: k + 1] @ rest)
        left = float(np.linalg.norm(rest))
        if k + 1 == steps or left <= 1e-10 * max(map(abs, [*diagonal, *beside])):  # the space is invariant: exact
            break
        beside.append(left)
        basis[k + 1] = rest / left
    nodes, vectors = eigh_tridiagonal(diagonal, beside)
    return nodes, vectors[0] ** 2


def eigenvalue_ratio_map(
    curvature: Curvature,
    landscape: Landscape,
    directions: Sequence[Direction],
    *,
    tolerance: float = 1e-2,
    seed: int = 0,
    progress: bool = True,
) -> Float[np.ndarray, "*grid"]:
    r"""How far from convex the loss is, at every point of a landscape.

    .. math::  \left| \frac{\lambda_{\min}(P H P)}{\lambda_{\max}(P H P)} \right|

    close to 0 where negative curvature does not matter (Li et al., arXiv 1712.09913, section 6). Slow: some fifty
    products with the Hessian per point. A metric of the landscape: ``replace(landscape, metrics={**landscape.metrics,
    "eigenvalue ratio": found})``.

    Args:
        curvature: Of the model at step 0, with the data, the objective and the mask of the landscape.
        landscape: What gives the grid; points whose loss is not finite are NaN.
        directions: Those of the landscape, before or after the mask.
        tolerance: Accuracy of both eigenvalues, relative to the one of larger magnitude.
        seed: Of the iteration.
        progress: Show a bar with the expected time to the end.

    Raises:
        ValueError: If the directions are not those of the landscape.
        RuntimeError: If the eigenvalues are not found.
    """
    moves = [restrict(direction, curvature.selected) for direction in directions]
    products = np.array([[inner(a, b) for b in moves] for a in moves])
    if not np.allclose(products, _inner_products(landscape), rtol=1e-4, atol=1e-4 * float(np.abs(products).max())):
        raise ValueError(
            "The directions must be those that the landscape was measured along, but their norms or angles differ; "
            "give the same directions and the same mask."
        )
    ratios = np.full(landscape.loss.shape, np.nan)
    finite = np.argwhere(np.isfinite(landscape.loss))
    with progress_bar(len(finite), "Eigenvalues", "point", shown=progress) as bar:
        for index in map(tuple, finite):
            steps = [float(axis.steps[i]) for axis, i in zip(landscape.axes, index, strict=True)]
            with displaced(curvature.model, moves, steps):
                low, high = extremes(curvature, seed=seed, tolerance=tolerance)
            ratios[index] = abs(low / high) if high else math.nan
            bar.update()
    return ratios


def measure_landscape(landscape: Landscape, *, threshold: float = 0.1) -> dict[str, Any]:
    """What a landscape alone tells, as JSON: ``"basin"`` (:func:`basin_radius`) and ``"quadratic"``.

    Args:
        landscape: With a finite loss at the centre; ``"quadratic"`` (:func:`fitted_curvature`) is None where too few
            points around it were measured.
        threshold: Of the basin.
    """
    try:
        quadratic = asdict(fitted_curvature(landscape))
    except ValueError:
        quadratic = None
    return _plain({"basin": asdict(basin_radius(landscape, threshold)), "quadratic": quadratic})


def measure_model(
    curvature: Curvature,
    directions: Sequence[Direction] = (),
    *,
    eigenvalues: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """What the loss near a model tells, as JSON, with the defaults of the functions of this module.

    ``"sharpness"`` and ``"average_sharpness"`` (each ``"plain"`` and ``"adaptive"``), ``"eigenvalues"``, ``"trace"``,
    ``"spectrum"``, ``"slice_curvature"`` if there are directions, and ``"entries"``, ``"loss"`` and ``"curvature"``
    (the kind). Up to some two hundred products with the matrix, each as dear as two or three gradients of all batches.

    Args:
        curvature: Of the model, the data and the mask.
        directions: Those of a landscape.
        eigenvalues: How many.
        seed: Of all draws.
        progress: Show a bar that moves with every measure.
    """
    both = {"plain": False, "adaptive": True}
    measures: dict[str, Callable[[], Any]] = {
        "loss": curvature.loss,
        "sharpness": lambda: {name: sharpness(curvature, adaptive=adaptive) for name, adaptive in both.items()},
        "average_sharpness": lambda: {
            name: asdict(average_sharpness(curvature, adaptive=adaptive, seed=seed)) for name, adaptive in both.items()
        },
        "eigenvalues": lambda: top_eigenvalues(curvature, eigenvalues, seed=seed),
        "trace": lambda: asdict(trace(curvature, seed=seed)),
        "spectrum": lambda: asdict(spectral_density(curvature, seed=seed)),
    }
    if directions:
        measures["slice_curvature"] = lambda: slice_curvature(curvature, directions)
    found: dict[str, Any] = {"entries": curvature.size, "curvature": curvature.kind}
    with progress_bar(len(measures), "Measures", "measure", shown=progress) as bar:
        for name, measure in measures.items():
            found[name] = measure()
            bar.update()
    return _plain(found)


def _plain(value: Any) -> Any:
    """Lists for arrays and tuples, None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
