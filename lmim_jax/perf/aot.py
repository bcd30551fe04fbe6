"""The train step of a recipe without its data and its devices: compiled for TPUs that are not there, or only traced."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lmim_jax.data.augment import device
from lmim_jax.distributed import sharding
from lmim_jax.methods import base as methods
from lmim_jax.models.layer_stack import with_remat_and_scan
from lmim_jax.optim import adamw
from lmim_jax.perf import flops, hlo
from lmim_jax.train import state, step
from lmim_jax.utils.errors import UserError

INSTALL = "planning for TPUs needs their compiler, which runs without a TPU: pip install libtpu"
# Several programs may use the library, and there is no machine to ask about: it is told of one, and not to warn
LIBTPU = dict(
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_MIN_LOG_LEVEL="3",
    TPU_STDERR_LOG_LEVEL="3",
)
LIBTPU |= dict(
    TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", TPU_ACCELERATOR_TYPE="v5litepod-4"
)
LIBTPU |= dict(TPU_HOST_BOUNDS="1,1,1")
SIZE = r"([\d.]+)([MG])"
TOO_MUCH = (
    rf"Used {SIZE} of {SIZE} hbm",
    rf"\({SIZE}\) exceeds available HBM \({SIZE}\)",
)  # how libtpu says it


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
        augmentation = device.from_config(
            config.augment, image_size=method.image_size, eval_size=method.feature_size
        )
        warmup = config.optimizer.warmup_epochs / config.epochs * total
        optimizer, _ = adamw.from_config(config.optimizer, warmup_steps=warmup, total_steps=total)
        return cls(config, method, augmentation, optimizer)

    def state(self):
        """The abstract state."""
        return jax.eval_shape(lambda: state.init(self.method, self.optimizer, jax.random.key(0)))

    def batch(self, size):
        """An abstract batch, as the loader gives it."""
        data = self.config.data
        shapes = {
            "image": ((data.canvas, data.canvas, data.channels), "uint8"),
            "size": ((2,), "int32"),
        }
        if data.resize_on == "host":
            shapes = {"image": ((*self.method.image_size, data.channels), "uint8")}
        shapes["label"] = (), "int32"
        return {
            name: jax.ShapeDtypeStruct((size, *shape), kind)
            for name, (shape, kind) in shapes.items()
        }

    def shardings(self, mesh):
        """Of the state."""
        return sharding.state_sharding(
            self.state(), mesh, self.config.mesh.rules, self.config.mesh.min_size
        )

    def jitted(self, mesh):
        """The train step, as train.py jits it, and its arguments, abstract."""
        shardings = self.shardings(mesh)
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        rows = {
            name: place(x, sharding.batch_sharding(mesh))
            for name, x in self.batch(self.config.batch_size).items()
        }
        function = step.jit_step(
            self.config, self.method, self.augmentation, self.optimizer, mesh, shardings
        )
        return function, (jax.tree.map(place, self.state(), shardings), rows)

    def loss(self, images):
        """(function of parameters and the rest, abstract parameters, abstract rest): the loss of so many images."""
        method, abstract = self.method, self.state()
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))
        views = jax.eval_shape(method.sample, jax.random.key(0), keys)
        pixels = jax.ShapeDtypeStruct((images, *method.image_size, method.channels), jnp.float32)
        value = lambda params, *rest: method.loss_fn(params, *rest)[0]
        run = with_remat_and_scan(value, self.config.remat, self.config.scan_layers)
        return run, abstract.params, (abstract.target, pixels, views, abstract.step)

    def flops(self):
        """Per image: of the method; of what runs, with what is computed again; of the augmentation."""
        run, params, rest = self.loss(1)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        total = lambda *traced: sum(map(sum, flops.by_part(*traced).values()))
        return {
            "method": flops.of_method(self.method).total,
            "executed": total(jax.value_and_grad(run), params, *rest),
            "augmentation": total(self.augmentation, keys, self.batch(1)),
        }

    def saved_bytes(self):
        """What the backward pass keeps: (bytes for one image, bytes for each further one), weights left out."""

        def saved(images):
            run, params, rest = self.loss(images)
            kept = jax.eval_shape(
                lambda params, *rest: jax.vjp(lambda p: run(p, *rest), params)[1], params, *rest
            )
            weights = {leaf.shape for leaf in jax.tree.leaves(params)}
            return sum(
                x.size * x.dtype.itemsize for x in jax.tree.leaves(kept) if x.shape not in weights
            )

        one, two = saved(1), saved(2)
        return one, two - one

    def state_bytes(self):
        """{part: bytes} of the whole state."""
        abstract = self.state()
        return {name: _bytes(getattr(abstract, name)) for name in ("params", "target", "opt_state")}


def _bytes(tree):
    """Of arrays or shapes; scalars do not count."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)


def compile_for_tpu(recipe, topology):
    """{"memory", "collectives", ...} of the train step compiled by libtpu for a topology such as v5e:4x4."""
    from jax.experimental import topologies

    if not importlib.util.find_spec("libtpu"):
        raise UserError(INSTALL)
    os.environ.update(LIBTPU)
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except Exception as error:
        raise UserError(f"libtpu knows no topology {topology}: {error}") from error
    mesh, began = (
        sharding.make_mesh(recipe.config.mesh.data, recipe.config.mesh.fsdp, devices),
        time.perf_counter(),
    )
    sharding.check_batch(recipe.config.batch_size, recipe.config.micro_batches, mesh.size)
    function, arguments = recipe.jitted(mesh)
    try:
        compiled, text = _compile(function.lower(*arguments))
    except jax.errors.JaxRuntimeError as error:
        if not (found := too_much(str(error))):
            raise
        return {
            "mesh": dict(mesh.shape),
            "memory": found,
            "compile_seconds": time.perf_counter() - began,
        }
    sizes, counted = compiled.memory_analysis(), compiled.cost_analysis()
    memory = {"arguments": sizes.argument_size_in_bytes, "temporaries": sizes.temp_size_in_bytes}
    memory["needed"] = sum(memory.values()) + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    loops = (
        recipe.config.micro_batches > 1 or recipe.config.scan_layers
    )  # of which XLA counts one round
    images = recipe.config.batch_size // mesh.size
    return {
        "mesh": dict(mesh.shape),
        "memory": memory,
        "collectives": hlo.collectives(text),
        "compiled_flops_per_image": None if loops else counted["flops"] / images,
        "compile_seconds": time.perf_counter() - began,
    }


def too_much(message):
    """{"needed", "limit"} in bytes, where libtpu says that memory does not suffice (needed: at least); else None."""
    used = next(filter(None, (re.search(words, message) for words in TOO_MUCH)), None)
    gigabytes = lambda number, unit: float(number) * (2**30 if unit == "G" else 2**20)
    return used and {
        "needed": gigabytes(*used.groups()[:2]),
        "limit": gigabytes(*used.groups()[2:]),
    }


def _compile(lowered):
    """(compiled program, its text), the text written by libtpu: jaxlib's reader does not know all of its operations."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (written,) = pathlib.Path(folder).glob("*train_step*.after_optimizations.txt")
        return compiled, written.read_text()


def analyse(recipe, count):
    """The same from the traced program, for so many GPUs; what the compiler adds is not in it."""
    config = recipe.config
    sizes = sharding.mesh_sizes(config.mesh.data, config.mesh.fsdp, count)
    mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
    sharding.check_batch(config.batch_size, config.micro_batches, count)
    abstract, placed, fsdp = recipe.state(), recipe.shardings(mesh), mesh.shape["fsdp"]
    cut = lambda tree, where: _bytes(jax.tree.map(_part, tree, where))
    whole, images = _bytes(abstract.params), config.batch_size // count
    gathered = whole + _bytes(abstract.target) if fsdp > 1 else 0
    first, further = recipe.saved_bytes()
    memory = {"arguments": cut(abstract, placed) + _bytes(recipe.batch(images))}
    memory["temporaries"] = (
        whole * (2 if config.micro_batches > 1 else 1) + gathered
    )  # gradients; copies of the whole
    memory["temporaries"] += first + further * (images // config.micro_batches - 1)
    memory["needed"] = sum(memory.values())
    moved = [hlo.Collective("all-gather", fsdp, ("parameters and target",), gathered, 1)]
    moved += [hlo.Collective("reduce-scatter", fsdp, ("gradients",), whole, 1)]
    part = cut(abstract.params, placed.params)
    moved += [hlo.Collective("all-reduce", mesh.shape["data"], ("gradients",), part, 1)]
    return {
        "mesh": dict(mesh.shape),
        "memory": memory,
        "collectives": [one for one in moved if one.group > 1],
    }


def _part(leaf, placed):
    """The shape of one device's part."""
    return jax.ShapeDtypeStruct(placed.shard_shape(leaf.shape), leaf.dtype) if leaf.ndim else leaf
