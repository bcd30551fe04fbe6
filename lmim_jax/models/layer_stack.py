"""How the blocks of a network are run: what is kept for the backward pass, and whether they are a loop.

A choice of the run and not of the model: it changes neither numbers nor names of parameters. So it is no argument of
modules and methods, but holds for what is traced in its scope, like `jax.default_matmul_precision`.
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp

from lmim_jax.utils.errors import UserError

# What is kept for the backward pass; the rest is computed again. None: all that it needs.
POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of linear layers
    "full": jax.checkpoint_policies.nothing_saveable,  # the input of each block
}
_execution = contextvars.ContextVar("execution", default=("none", False))
_dropping = contextvars.ContextVar("dropping", default=None)


def with_remat_and_scan(function, remat, scan_layers):
    """`function`, with the blocks of all networks in it run so; to be traced (jitted) as a whole.

    Args:
      remat: of POLICIES. scan_layers: equal blocks as one loop, which is compiled once. Their parameters are stacked in
        every step, so it costs a copy of them.
    """
    if remat not in POLICIES:
        raise UserError(f"config.remat={remat!r} is none of: {' | '.join(POLICIES)}")

    @functools.wraps(function)
    def traced(*args):
        token = _execution.set((remat, scan_layers))
        try:
            return function(*args)
        finally:
            _execution.reset(token)

    return traced


@contextlib.contextmanager
def stochastic_depth(key, rate):
    """While a network is traced in this scope, leave branches of its blocks out at random, for each image by itself.

    Attention and MLP of block i of L are left out with probability rate * i / (L - 1) each; what is kept is divided by
    the probability of that. For `blocks.Block` only, which is run one by one then, as for `remat="none"`.
    Rate 0: nothing changes. Source: Huang et al. (ECCV 2016), as in DeiT and MAE.
    """
    token = _dropping.set((key, rate) if rate else None)
    try:
        yield
    finally:
        _dropping.reset(token)


def _kept(depth, batch):
    """For each block, what its two branches are multiplied by: [depth, B, 2] float32."""
    key, rate = _dropping.get()
    share = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    return jax.random.bernoulli(key, share, (depth, batch, 2)) / share


def run_blocks(module, make, depth, x, *context):
    """x [B, T, D] through `depth` blocks, children of a Linen module by the names block00, block01, ...

    Args:
      make: a block by Linen's arguments `name` and `parent`; called as block(x, *context).
    """
    remat, scan_layers = _execution.get()
    names = [f"block{i:02d}" for i in range(depth)]
    watched = module.is_initializing() or module.is_mutable_collection("intermediates")
    if _dropping.get() and not module.is_initializing():
        for name, keep in zip(names, _kept(depth, len(x)), strict=True):
            x = make(name=name)(x, *context, keep=keep)
        return x
    if watched or (remat == "none" and not scan_layers) or not depth:
        for name in names:
            x = make(name=name)(x, *context)
        return x
    block, params = make(parent=None), [module.variables["params"][name] for name in names]
    run = lambda x, params: block.apply({"params": params}, x, *context)
    if remat != "none":
        run = jax.checkpoint(run, policy=POLICIES[remat], prevent_cse=not scan_layers)
    if not scan_layers:
        return functools.reduce(run, params, x)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(lambda x, params: (run(x, params), None), x, stacked)[0]
