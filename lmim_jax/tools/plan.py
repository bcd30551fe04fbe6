"""What a recipe needs on a TPU slice or on GPUs, without having any.

    python -m lmim_jax.tools.plan --config=configs/vit_b.py --topology=v5e:4x4 [--sweep] [--json=FILE] [--config.KEY=VALUE]

TPUs (v5e, v5p, v6e): the train step is compiled for the real topology by libtpu, which needs no TPU; memory, FLOPs and
messages are the compiler's. It takes minutes. GPUs (h200:8, h100:8x4 = GPUs of a node x nodes, a100, b200): from the
traced program alone. Times are floors from the figures in lmim_jax/chips.py; nothing is measured.
"""

import dataclasses
import importlib.util
import logging
import os
import re
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lmim_jax import flops, hlo, optim, sharding, state, step
from lmim_jax.data import augment
from lmim_jax.errors import UserError
from lmim_jax.methods import base as methods
from lmim_jax.models.stack import run_as

log = logging.getLogger("lmim_jax.tools.plan")

INSTALL = "tools.plan compiles for TPUs with libtpu, which is not installed: pip install libtpu"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is planned: the parts of a training run that do not depend on the data."""

    config: ConfigDict
    method: object
    augmentation: object
    optimizer: object

    @classmethod
    def of(cls, config, images):
        """From a config, for so many training images."""
        per_epoch = max(images // config.batch_size, 1)
        total = config.total_steps or config.epochs * per_epoch
        method = methods.from_config(config.method, total_steps=total, steps_per_epoch=per_epoch)
        augmentation = augment.from_config(config.augment, image_size=method.image_size, eval_size=method.feature_size)
        warmup = config.optimizer.warmup_epochs / config.epochs * total
        optimizer, _ = optim.from_config(config.optimizer, warmup_steps=warmup, total_steps=total)
        return cls(config, method, augmentation, optimizer)

    def state(self):
        """The abstract state."""
        return jax.eval_shape(lambda: state.init(self.method, self.optimizer, jax.random.key(0)))

    def batch(self, size):
        """An abstract batch."""
        canvas = (self.config.data.canvas,) * 2 + (self.config.data.channels,)
        shapes = {"image": ((*canvas,), "uint8"), "size": ((2,), "int32"), "label": ((), "int32")}
        return {name: jax.ShapeDtypeStruct((size, *shape), kind) for name, (shape, kind) in shapes.items()}

    def shardings(self, mesh):
        """Of the state."""
        return sharding.of_state(self.state(), mesh, self.config.mesh.rules, self.config.mesh.min_size)

    def jitted(self, mesh):
        """The train step, as train.py jits it, and its arguments, abstract."""
        config, shardings = self.config, self.shardings(mesh)
        skip = config.on_nonfinite == "skip"
        parts = self.method, self.augmentation, self.optimizer, mesh, config.micro_batches, skip, shardings
        function = jax.jit(
            run_as(step.make_train_step(*parts), config.remat, config.scan_layers),
            donate_argnums=0,
            in_shardings=(shardings, sharding.of_batch(mesh)),
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        return function, (self.state(), self.batch(config.batch_size))

    def augmentation_flops(self):
        """Per image: crop and resize are matrix products, too."""
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        return sum(map(sum, flops.by_part(self.augmentation, keys, self.batch(1)).values()))


def compile_for_tpu(recipe, topology):
    """{"memory", "collectives", ...} of the train step compiled by libtpu for a topology such as v5e:4x4."""
    from jax.experimental import topologies

    if not importlib.util.find_spec("libtpu"):
        raise UserError(INSTALL)
    # Several programs may use the library; there is no metadata server to ask
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="", TPU_MIN_LOG_LEVEL="3"
    )
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except Exception as error:
        raise UserError(f"libtpu knows no topology {topology}: {error}") from error
    mesh, began = sharding.make_mesh(recipe.config.mesh.data, recipe.config.mesh.fsdp, devices), time.perf_counter()
    sharding.check_batch(recipe.config.batch_size, recipe.config.micro_batches, mesh.size)
    function, arguments = recipe.jitted(mesh)
    try:
        compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm", str(error))
        if not used:
            raise
        gigabytes = lambda number, unit: float(number) * (2**30 if unit == "G" else 2**20)
        found = {"arguments": None, "temporaries": None, "needed": gigabytes(*used.groups()[:2])}
        return {"mesh": dict(mesh.shape), "memory": found | {"limit": gigabytes(*used.groups()[2:])}, "collectives": []}
    sizes, counted = compiled.memory_analysis(), compiled.cost_analysis()
    memory = {"arguments": sizes.argument_size_in_bytes, "temporaries": sizes.temp_size_in_bytes}
    memory |= {"needed": sum(memory.values()) + sizes.output_size_in_bytes - sizes.alias_size_in_bytes}
    loops = recipe.config.micro_batches > 1 or recipe.config.scan_layers  # of which XLA counts one round
    return {
        "mesh": dict(mesh.shape),
        "memory": memory,
        "collectives": hlo.collectives(compiled.as_text()),
        "compiled_flops": None if loops else counted["flops"] * mesh.size / recipe.config.batch_size,
        "bytes": None if loops else counted["bytes accessed"],
        "compile_seconds": time.perf_counter() - began,
    }


def analyse(recipe, count):
    """The same from the traced program, for so many GPUs; what the compiler adds is not in it."""
    config = recipe.config
    mesh = _abstract_mesh(config, count)
    sharding.check_batch(config.batch_size, config.micro_batches, count)
    abstract, placed = recipe.state(), recipe.shardings(mesh)
    size = lambda leaf: leaf.size * jnp.dtype(leaf.dtype).itemsize if leaf.ndim else 8
    parts = lambda tree, where: sum(map(size, jax.tree.leaves(jax.tree.map(_part, tree, where))))
    whole, cut = sum(map(size, jax.tree.leaves(abstract.params))), parts(abstract.params, placed.params)
    images = config.batch_size // count
    saved = [_saved_bytes(recipe, n) for n in (1, 2)]
    activations = saved[0] + (saved[1] - saved[0]) * (images // config.micro_batches - 1)
    batch = sum(map(size, jax.tree.leaves(recipe.batch(images))))
    gathered = sum(map(size, jax.tree.leaves((abstract.params, abstract.target)))) if mesh.shape["fsdp"] > 1 else 0
    memory = {"arguments": parts(abstract, placed) + batch}
    memory["temporaries"] = whole * (2 if config.micro_batches > 1 else 1) + gathered + activations
    memory["needed"] = sum(memory.values())
    fsdp, moved = mesh.shape["fsdp"], []
    if fsdp > 1:
        moved += [hlo.Collective("all-gather", fsdp, ("state",), gathered, 1)]
        moved += [hlo.Collective("reduce-scatter", fsdp, ("gradients",), whole, 1)]
    if mesh.shape["data"] > 1:
        moved += [hlo.Collective("all-reduce", mesh.shape["data"], ("gradients",), cut, 1)]
    return {"mesh": dict(mesh.shape), "memory": memory, "collectives": moved, "compiled_flops": None, "bytes": None}


def _abstract_mesh(config, count):
    data, fsdp = sharding.mesh_sizes(config.mesh.data, config.mesh.fsdp, count)
    return jax.sharding.AbstractMesh((data, fsdp), sharding.AXES)


def _part(leaf, placed):
    return jax.ShapeDtypeStruct(placed.shard_shape(leaf.shape), leaf.dtype)


def _saved_bytes(recipe, images):
    """Bytes that the backward pass of so many images keeps, parameters left out."""
    method = recipe.method
    abstract = recipe.state()
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
    views = jax.eval_shape(method.sample, jax.random.key(0), keys)
    pixels = jax.ShapeDtypeStruct((images, *method.image_size, method.channels), jnp.float32)

    def kept(params, target, pixels, views, at):
        loss = lambda params: method.loss(params, target, pixels, views, at)[0]
        return jax.vjp(run_as(loss, recipe.config.remat, recipe.config.scan_layers), params)[1]

    arguments = abstract.params, abstract.target, pixels, views, abstract.step
    residuals = jax.tree.leaves(jax.eval_shape(kept, *arguments))
    weights = {leaf.shape for leaf in jax.tree.leaves(abstract.params)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals if leaf.shape not in weights)
