"""Running the blocks of a network: rematerialization, loops over layers, stochastic depth.

These are choices of a run and not of a model: they do not change names of parameters, and results
only by rounding, in bfloat16. So they are not arguments of modules and methods, but hold for
everything that is traced in their scope, like `jax.default_matmul_precision`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmim_jax.utils.errors import UserError

# What is saved for the backward pass; the rest is recomputed. None: all that it needs is saved.
POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of linear layers
    "full": jax.checkpoint_policies.nothing_saveable,  # only the input of each block
}


class _Execution(NamedTuple):
    """The arguments of `with_remat_and_scan`."""

    remat: str
    scan_layers: bool


class _StochasticDepth(NamedTuple):
    """The arguments of `stochastic_depth`."""

    key: Array
    rate: float


_DEFAULT_EXECUTION = _Execution(remat="none", scan_layers=False)
_execution = contextvars.ContextVar("execution", default=_DEFAULT_EXECUTION)
_stochastic_depth: contextvars.ContextVar[_StochasticDepth | None] = contextvars.ContextVar(
    "stochastic_depth", default=None
)


def with_remat_and_scan(
    function: Callable[..., Any], remat: str, scan_layers: bool
) -> Callable[..., Any]:
    """Wrap a function so that the blocks of all networks in it run as given.

    Args:
      function: to be traced (jitted) as a whole.
      remat: what is saved for the backward pass, a key of POLICIES.
      scan_layers: run equal blocks as one loop, which is compiled once. It stacks their parameters
        in every step, so it costs a copy of them.

    Raises:
      UserError: `remat` is not a key of POLICIES.
    """
    if remat not in POLICIES:
        raise UserError(f"config.remat={remat!r} must be one of: {', '.join(POLICIES)}")

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        token = _execution.set(_Execution(remat, scan_layers))
        try:
            return function(*args)
        finally:
            _execution.reset(token)

    return wrapped


@contextlib.contextmanager
def stochastic_depth(key: Array, rate: float) -> Iterator[None]:
    """Drop branches of blocks of networks traced in this scope, at random for each image.

    Attention and MLP of block i of L are dropped with probability rate * i / (L - 1) each; what is
    kept is divided by the probability of keeping it. For `blocks.Block` only.

    Args:
      key: random key of the step.
      rate: probability for the last block; 0 changes nothing.

    Source: Huang et al. (ECCV 2016), as in DeiT and MAE.
    """
    token = _stochastic_depth.set(_StochasticDepth(key, rate) if rate else None)
    try:
        yield
    finally:
        _stochastic_depth.reset(token)


def _branch_scales(key: Array, rate: float, depth: int, batch: int) -> Float[Array, "depth B 2"]:
    """Draw what the two branches of every block are multiplied by: 0 or 1 / (keep probability)."""
    keep_probability = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    kept = jax.random.bernoulli(key, keep_probability, (depth, batch, 2))
    return kept / keep_probability


def run_blocks(
    parent: nn.Module,
    make_block: Callable[..., nn.Module],
    depth: int,
    x: Float[Array, "B T D"],
    branch_scales: Float[Array, "B depth 2"] | None = None,
    **inputs: Any,
) -> Float[Array, "B T D"]:
    """Pass x through `depth` blocks, children of `parent` with the names block00, block01, ...

    Args:
      parent: the module whose compact method calls this.
      make_block: makes a block from Linen's arguments `name` and `parent`.
      depth: number of blocks.
      x: tokens.
      branch_scales: what the two branches of every block are multiplied by, for each image; None:
        those of `stochastic_depth`, or else 1.
      **inputs: what every block takes beside x, by name.
    """
    remat, scan_layers = _execution.get()
    drop = _stochastic_depth.get()
    initializing = parent.is_initializing()
    scales: Array | None = None
    if branch_scales is not None:
        scales = jnp.moveaxis(branch_scales, 1, 0)
    elif drop and not initializing:
        scales = _branch_scales(drop.key, drop.rate, depth, len(x))
    names = [f"block{i:02d}" for i in range(depth)]

    # Linen records parameters and intermediates only of blocks that it calls itself.
    recording = initializing or parent.is_mutable_collection("intermediates")
    plain = remat == "none" and not scan_layers
    if recording or plain or depth == 0:
        for i, name in enumerate(names):
            arguments = {**inputs, **_of_block(scales, i)}
            block = make_block(name=name)
            if remat == "none" or initializing:
                x = block(x, **arguments)
            else:
                x = _call_with_remat(block, x, arguments, remat)
        return x

    params = [parent.variables["params"][name] for name in names]
    return _run_functional(make_block(parent=None), params, x, scales, inputs, remat, scan_layers)


def _call_with_remat(block: nn.Module, x: Array, arguments: dict[str, Any], remat: str) -> Array:
    """Call a block, and record what it records; most of it is recomputed in the backward pass."""

    def call(block: nn.Module, x: Array) -> Array:
        return block(x, **arguments)

    return nn.checkpoint(call, policy=POLICIES[remat])(block, x)


def _of_block(scales: Float[Array, "depth B 2"] | None, index: int) -> dict[str, Array]:
    """The argument `branch_scales` of a block, where there are scales."""
    if scales is None:
        return {}
    return {"branch_scales": scales[index]}


def _run_functional(
    block: nn.Module,
    params: list[dict[str, Any]],
    x: Array,
    scales: Float[Array, "depth B 2"] | None,
    inputs: dict[str, Any],
    remat: str,
    scan_layers: bool,
) -> Array:
    """Pass x through one block with each of `params` in turn, recomputed or in a loop."""

    def apply_block(x: Array, block_params: dict[str, Any], own: dict[str, Array]) -> Array:
        return block.apply({"params": block_params}, x, **inputs, **own)

    run = apply_block
    if remat != "none":
        run = jax.checkpoint(apply_block, policy=POLICIES[remat], prevent_cse=not scan_layers)
    if not scan_layers:
        for i, block_params in enumerate(params):
            x = run(x, block_params, _of_block(scales, i))
        return x

    def scan_step(x: Array, of_block: tuple[Any, Any]) -> tuple[Array, None]:
        block_params, own = of_block
        return run(x, block_params, own), None

    stacked = jax.tree.map(_stack, *params)
    own = {} if scales is None else {"branch_scales": scales}
    x, _ = jax.lax.scan(scan_step, x, (stacked, own))
    return x


def _stack(*leaves: Array) -> Array:
    return jnp.stack(leaves)
