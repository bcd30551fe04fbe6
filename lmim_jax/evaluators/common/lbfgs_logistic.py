"""Multinomial logistic regression on frozen features, solved to its minimum by L-BFGS.

  mean over images of the cross-entropy  +  l2 / 2 x the sum of squared weights (not biases)

There is neither a learning rate nor a number of epochs to choose. In terms of scikit-learn,
C = 1 / (l2 N). With other losses, it is logistic regression of each of several 0/1 labels, or ridge
regression of numbers, where alpha = l2 N.

Letters: N images, D width of a feature, R coordinates on principal axes, K classes, G strengths of
l2 that are solved for at once, S chunks of images, P unknowns of one problem, M L-BFGS memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from lmim_jax.distributed import sharding
from lmim_jax.utils import array_memory

CHUNK = 16384  # images whose logits are in memory at a time, on each device
MAX_LOGITS = 1024  # classes x strengths that are solved for at the same time
PADDED_SIZES = (16, 64, 256, 1024, 4096)  # small problems are padded to these: few compilations
TOLERANCE = 1e-6  # the minimum is reached at this largest gradient entry, in the units of `fit`
MEMORY = 10  # steps that L-BFGS remembers
SOFTMAX = "softmax"  # loss of an image: the cross-entropy of its class
SIGMOID = "sigmoid"  # the sum of the binary cross-entropies of its labels
SQUARED = "squared"  # half the sum of the squared errors of its labels
EXACT = jax.lax.Precision.HIGHEST  # the line search compares values that differ little


@dataclasses.dataclass(frozen=True)
class Fit:
    """G solutions.

    Attributes:
      weights: float32 [G, D, K].
      biases: float32 [G, K].
      gradient: largest entry of the final gradient, in units in which the curvature is about 1.
      inner_weights: float32 [G, R, K], of the coordinates of a `Problem`.
    """

    weights: Float[np.ndarray, "G D K"]
    biases: Float[np.ndarray, "G K"]
    gradient: Float[np.ndarray, " G"]
    inner_weights: Float[np.ndarray, "G R K"]

    def predict(
        self,
        x: Float[np.ndarray, "N D"],
        mean: Float[np.ndarray, " D"] | float = 0.0,
        deviation: Float[np.ndarray, " D"] | float = 1.0,
    ) -> Int[np.ndarray, "G N"]:
        """Classes of features.

        Args:
          x: features.
          mean: subtracted from them first, as from those of the fit.
          deviation: that they are divided by then.
        """
        found = []
        for start in range(0, len(x), CHUNK):
            rows = (x[start : start + CHUNK] - mean) / deviation
            found.append(self._largest(rows, self.weights))
        return np.concatenate(found, axis=1)

    def classify(
        self, coordinates: Float[np.ndarray, "N R"], rows: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, "G n"]:
        """Classes of some rows of `Problem.coordinates`."""
        found = []
        for start in range(0, len(rows), CHUNK):
            found.append(
                self._largest(coordinates[rows[start : start + CHUNK]], self.inner_weights)
            )
        return np.concatenate(found, axis=1)

    def losses(
        self,
        coordinates: Float[np.ndarray, "N R"],
        rows: Int[np.ndarray, " n"],
        labels: Shaped[np.ndarray, "N ..."],
        loss: str,
    ) -> Float[np.ndarray, " G"]:
        """The mean loss of some rows of `Problem.coordinates`, for each solution."""
        total = np.zeros(len(self.biases))
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            for i, bias in enumerate(self.biases):
                outputs = coordinates[part] @ self.inner_weights[i] + bias
                total[i] += float(_loss_of_images(loss, outputs, labels[part]).sum())
        return total / len(rows)

    def _largest(
        self, x: Float[np.ndarray, "n D"], weights: Float[np.ndarray, "G D K"]
    ) -> Int[np.ndarray, "G n"]:
        classes = []
        for i, bias in enumerate(self.biases):
            classes.append((x @ weights[i] + bias).argmax(axis=1))
        return np.stack(classes)


class Rotated(NamedTuple):
    """Features along their principal axes.

    Attributes:
      coordinates: float32 [N, R].
      axes: float32 [D, R]; None if the features were not rotated.
      mean_squares: mean square of each coordinate, float32 [R].
    """

    coordinates: Float[np.ndarray, "N R"]
    axes: Float[np.ndarray, "D R"] | None
    mean_squares: Float[np.ndarray, " R"]


def mean_and_deviation(
    x: Float[np.ndarray, "N D"],
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Mean and standard deviation of features, to standardize them.

    The deviation of a constant feature is set to 1, so that the standardized feature is 0.
    """
    total = np.zeros(x.shape[1])
    for rows in _row_chunks(x):
        total += rows.sum(axis=0, dtype=np.float64)
    mean = total / len(x)
    squares = np.zeros(x.shape[1])
    for rows in _row_chunks(x):
        squares += np.square(rows - mean).sum(axis=0)
    deviation = np.sqrt(squares / len(x))
    deviation = np.where(deviation > 1e-6, deviation, 1)
    return mean.astype(np.float32), deviation.astype(np.float32)


def standardize(
    x: Float[np.ndarray, "N D"], mean: Float[np.ndarray, " D"], deviation: Float[np.ndarray, " D"]
) -> None:
    """Subtract a mean from features and divide them by a deviation, in place."""
    x -= mean
    x /= deviation


def _row_chunks(x: Float[np.ndarray, "N D"]) -> Iterator[Float[np.ndarray, "n D"]]:
    for start in range(0, len(x), CHUNK):
        yield x[start : start + CHUNK]


class Chunks(NamedTuple):
    """Images on the devices, in S chunks of so many rows.

    Attributes:
      x: float32 [S, rows, R], zeros where there is no image.
      labels: int32 [S, rows]; float32 [S, rows, K] for labels that are no classes.
    """

    x: Array
    labels: Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """Features on the devices, to solve for several strengths of l2 and choices of images.

    Attributes:
      coordinates: float32 [N, R], features along their principal axes.
      axes: float32 [D, R]; None if the features were not rotated.
      mean_squares: of the coordinates, float32 [R].
      parts: all images: whole chunks, and what is left.
      num_classes: K.
      mesh: see `fit`.
      loss: SOFTMAX, SIGMOID or SQUARED.
    """

    coordinates: Float[np.ndarray, "N R"]
    axes: Float[np.ndarray, "D R"] | None
    mean_squares: Float[np.ndarray, " R"]
    parts: tuple[Chunks, ...]
    num_classes: int
    mesh: Mesh | None
    loss: str = SOFTMAX

    def solve(
        self, l2: Sequence[float], iterations: int, chosen: Bool[np.ndarray, " N"] | None = None
    ) -> Fit:
        """Solve for each strength.

        Args:
          l2: G strengths.
          iterations: the largest number of L-BFGS iterations.
          chosen: which images count; None: all.
        """
        strengths = np.asarray(l2, np.float32)
        # The curvature of the cross-entropy is about 1 / K of the variance; these units make it 1
        flatness = _flatness(self.loss, self.num_classes)
        units = np.sqrt(self.mean_squares[None] / flatness + strengths[:, None])
        count = len(self.coordinates)
        if chosen is None:
            chosen = np.ones(count, bool)
        share = chosen.astype(np.float32) / np.float32(chosen.sum())
        shares = []
        start = 0
        for part in self.parts:
            chunks, rows = part.labels.shape[:2]
            shares.append(_place(share[start : start + chunks * rows], (chunks, rows), self.mesh))
            start += chunks * rows
        at_once = max(1, min(len(strengths), MAX_LOGITS // self.num_classes))
        solve = _jit_solve(self.num_classes, iterations, at_once, self.mesh, self.loss)
        inner, biases, gradient = jax.device_get(
            solve(parts=self.parts, shares=tuple(shares), l2=strengths, units=units)
        )
        weights = inner
        if self.axes is not None:
            weights = self.axes @ inner
        return Fit(weights, biases, gradient, inner)


def fit(
    x: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, " N"],
    num_classes: int,
    l2: Sequence[float],
    iterations: int,
    mesh: Mesh | None = None,
) -> Fit:
    """Solve for each strength.

    Args:
      x: features, the same on all processes.
      labels: their classes.
      num_classes: K.
      l2: G strengths.
      iterations: the largest number of L-BFGS iterations.
      mesh: divide the images over its devices; None: each process solves the same on one device.
    """
    copied = array_memory.copy(np.asarray(x, np.float32))
    return prepare(copied, labels, num_classes, mesh).solve(l2, iterations)


def prepare(
    x: Float[np.ndarray, "N D"],
    labels: Shaped[np.ndarray, "N ..."],
    num_classes: int,
    mesh: Mesh | None,
    loss: str = SOFTMAX,
) -> Problem:
    """Rotate features and place them on the devices; see `fit`.

    With the loss SIGMOID or SQUARED, labels are [N, K].

    `x` is overwritten, and stays in use on CPUs: there is no second array of its size on the host.
    """
    rotated = rotate_to_principal_axes(x)
    coordinates = rotated.coordinates
    labels = np.asarray(labels, np.int32 if loss == SOFTMAX else np.float32)
    devices = mesh.size if mesh else 1
    chunk = CHUNK * devices
    chunks = len(x) // chunk
    end = chunks * chunk
    parts = []
    if chunks:
        x_part = _place(coordinates[:end], (chunks, chunk), mesh)
        parts.append(Chunks(x_part, _place(labels[:end], (chunks, chunk), mesh)))
    if end < len(x):
        shape = (1, _padded_size(len(x) - end, devices))
        x_part = _place(coordinates[end:], shape, mesh)
        parts.append(Chunks(x_part, _place(labels[end:], shape, mesh)))
    return Problem(
        coordinates, rotated.axes, rotated.mean_squares, tuple(parts), num_classes, mesh, loss
    )


def _flatness(loss: str, num_classes: int) -> int:
    """The variance of a feature / the curvature of the loss, about."""
    return {SOFTMAX: num_classes, SIGMOID: 4, SQUARED: 1}[loss]


def _loss_of_images(
    loss: str, logits: Float[Array, "n K"], labels: Shaped[Array, "n ..."]
) -> Float[Array, " n"]:
    """The loss of each image."""
    if loss == SIGMOID:
        return optax.sigmoid_binary_cross_entropy(logits, labels).sum(axis=-1)
    if loss == SQUARED:
        return jnp.square(logits - labels).sum(axis=-1) / 2
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _place(
    array: Shaped[np.ndarray, "n ..."], shape: tuple[int, int], mesh: Mesh | None
) -> Shaped[Array, "S rows ..."]:
    """An array in chunks of this shape on the devices, padded with zeros."""
    missing = shape[0] * shape[1] - len(array)
    if missing:
        padding = [(0, 0)] * array.ndim
        padding[0] = (0, missing)
        array = np.pad(array, padding)
    array = array.reshape(*shape, *array.shape[1:])
    if mesh is None:
        return jax.device_put(array)
    return sharding.place_array(array, NamedSharding(mesh, PartitionSpec(None, sharding.AXES)))


def _padded_size(count: int, devices: int) -> int:
    """Number of rows for so many images: a multiple of the devices, for few compilations."""
    rows = -(-count // devices) * devices
    for size in PADDED_SIZES:
        if size >= rows and size % devices == 0:
            return size
    return rows


def rotate_to_principal_axes(x: Float[np.ndarray, "N D"]) -> Rotated:
    """Features in the coordinates of their principal axes.

    A rotation changes neither the minimum nor the penalty, and with fewer images than dimensions
    the weights lie in the span of the images. But along these axes the curvature of the loss is
    known, so that far fewer iterations are needed. R is one of PADDED_SIZES, or D. Features are
    not rotated if neither N nor D is small enough for a decomposition within seconds. With at least
    as many images as dimensions, they are rotated in place.
    """
    count, width = x.shape
    rank = count
    for size in PADDED_SIZES:
        if size >= count:
            rank = size
            break
    if min(rank, width) > PADDED_SIZES[-1]:
        return Rotated(x, None, np.ones(width, np.float32))  # of standardized features
    if rank >= width:
        squares, axes = _principal_axes(x)
        for rows in _row_chunks(x):
            rows[:] = rows @ axes
        return Rotated(x, axes, squares)
    span = np.linalg.qr(x.T)[0]
    inside = x @ span
    squares, axes = _principal_axes(inside)
    missing = rank - len(squares)
    return Rotated(
        coordinates=np.pad(inside @ axes, ((0, 0), (0, missing))),
        axes=np.pad(span @ axes, ((0, 0), (0, missing))),
        mean_squares=np.pad(squares, (0, missing)),
    )


def _principal_axes(
    x: Float[np.ndarray, "N D"],
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Mean squares along the principal axes, and the axes in columns, float32."""
    products = np.zeros((x.shape[1], x.shape[1]))
    for rows in _row_chunks(x):
        products += rows.T @ rows
    squares, axes = np.linalg.eigh(products / len(x))
    return np.maximum(squares, 0).astype(np.float32), axes.astype(np.float32)


@functools.lru_cache(maxsize=8)
def _jit_solve(
    num_classes: int, iterations: int, at_once: int, mesh: Mesh | None, kind: str
) -> Callable[..., tuple[Array, Array, Array]]:
    """Jitted (parts, shares, l2 [G], units [G, R]) -> inner weights, biases and gradient of a Fit.

    `shares` are the shares of the images in the mean, [S, rows] for each part: 0 for padding.
    `at_once` strengths are solved for at the same time; `kind` is the loss.
    """
    flatness = _flatness(kind, num_classes)

    def split(theta: Array, units: Array) -> tuple[Array, Array]:
        """Unknowns [P] -> weights [R, K] and biases [K]."""
        weights = theta[:-num_classes].reshape(-1, num_classes) / units[:, None]
        return weights, theta[-num_classes:] * flatness**0.5

    def solve(parts: tuple[Chunks, ...], shares: tuple[Array, ...], l2: Array, units: Array) -> Any:
        def loss(theta: Array, l2: Array, units: Array) -> Array:
            weights, biases = split(theta, units)

            def add_chunk(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
                x, labels, share = chunk
                logits = jnp.matmul(x, weights, precision=EXACT) + biases[None]
                entropy = _loss_of_images(kind, logits, labels)
                return total + jnp.vdot(share, entropy, precision=EXACT), None

            cross_entropy = 0.0
            for part, share in zip(parts, shares, strict=True):
                chunks = (part.x, part.labels, share)
                cross_entropy, _ = jax.lax.scan(jax.checkpoint(add_chunk), cross_entropy, chunks)
            return cross_entropy + l2 / 2 * _dot(weights, weights)

        def solve_one(case: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            l2, units = case

            def loss_of_unknowns(theta: Array) -> Array:
                return loss(theta, l2, units)

            size = (units.size + 1) * num_classes
            value_and_grad = jax.value_and_grad(loss_of_unknowns)
            theta, gradient = minimize_lbfgs(value_and_grad, size, iterations)
            weights, biases = split(theta, units)
            return weights, biases, gradient

        if at_once == len(l2):
            return jax.vmap(solve_one)((l2, units))
        return jax.lax.map(solve_one, (l2, units), batch_size=at_once)

    return jax.jit(solve, out_shardings=sharding.replicated(mesh) if mesh else None)


class _State(NamedTuple):
    """The state of L-BFGS: the current point, the direction of search, and the last changes."""

    theta: Float[Array, " P"]
    value: Float[Array, ""]
    grad: Float[Array, " P"]
    direction: Float[Array, " P"]
    length: Float[Array, ""]
    steps: Float[Array, "M P"]
    changes: Float[Array, "M P"]
    iteration: Int[Array, ""]


def minimize_lbfgs(
    value_and_grad: Callable[[Float[Array, " P"]], tuple[Array, Array]], size: int, iterations: int
) -> tuple[Float[Array, " P"], Float[Array, ""]]:
    """Minimize a smooth convex function by L-BFGS, starting at 0.

    Each iteration evaluates the function once. The new point is accepted if the value decreases
    sufficiently (Armijo), or else half the step length is tried: the function is compiled once.
    (optax.lbfgs contains several copies of it, and takes 2.5 times as long to compile.)

    Args:
      value_and_grad: the function with its gradient.
      size: P, number of unknowns.
      iterations: the largest number of iterations.

    Returns:
      The argument, and the largest entry of its gradient.
    """

    def unfinished(state: _State) -> Array:
        return (jnp.abs(state.grad).max() > TOLERANCE) & (state.iteration < iterations)

    def iterate(state: _State) -> _State:
        theta = state.theta + state.length * state.direction
        value, grad = value_and_grad(theta)
        limit = state.value + 1e-4 * state.length * _dot(state.grad, state.direction)
        # Smaller differences than the last term are lost in float32
        accepted = value <= limit + 1e-7 * jnp.abs(state.value)
        step = theta - state.theta
        change = grad - state.grad
        curved = _dot(step, change) > 1e-12 * _dot(change, change)
        steps = jnp.where(curved, _push(state.steps, step), state.steps)
        changes = jnp.where(curved, _push(state.changes, change), state.changes)
        moved = _State(
            theta=theta,
            value=value,
            grad=grad,
            direction=_direction(grad, steps, changes),
            length=jnp.ones_like(state.length),
            steps=steps,
            changes=changes,
            iteration=state.iteration + 1,
        )
        shortened = state._replace(length=state.length / 2, iteration=state.iteration + 1)

        def select(a: Array, b: Array) -> Array:
            return jnp.where(accepted, a, b)

        return jax.tree.map(select, moved, shortened)

    theta = jnp.zeros(size)
    value, grad = value_and_grad(theta)
    start = _State(
        theta=theta,
        value=value,
        grad=grad,
        direction=-grad,
        length=jnp.float32(1),
        steps=jnp.zeros((MEMORY, size)),
        changes=jnp.zeros((MEMORY, size)),
        iteration=jnp.int32(0),
    )
    end = jax.lax.while_loop(unfinished, iterate, start)
    return end.theta, jnp.abs(end.grad).max()


def _dot(a: Array, b: Array) -> Array:
    return jnp.vdot(a, b, precision=EXACT)


def _push(memory: Float[Array, "M P"], row: Float[Array, " P"]) -> Float[Array, "M P"]:
    """Add a row at the front and drop the last one."""
    return jnp.concatenate([row[None], memory[:-1]])


def _direction(
    grad: Float[Array, " P"], steps: Float[Array, "M P"], changes: Float[Array, "M P"]
) -> Float[Array, " P"]:
    """-H grad by the two-loop recursion, with H from the last steps and changes of the gradient.

    Args:
      grad: the gradient.
      steps: the last changes of the argument, newest first; 0: unused.
      changes: the changes of the gradient.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.4.
    """
    curvature = jax.vmap(_dot)(steps, changes)
    rho = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)

    def first_loop(q: Array, memory: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        step, change, rho = memory
        alpha = rho * _dot(step, q)
        return q - alpha * change, alpha

    def second_loop(q: Array, memory: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        step, change, rho, alpha = memory
        return q + (alpha - rho * _dot(change, q)) * step, None

    q, alpha = jax.lax.scan(first_loop, grad, (steps, changes, rho))
    newest = jnp.maximum(_dot(changes[0], changes[0]), 1e-30)
    scale = jnp.where(rho[0] > 0, curvature[0] / newest, 1)
    memory = (steps, changes, rho, alpha)
    q, _ = jax.lax.scan(second_loop, scale * q, memory, reverse=True)
    return -q
