"""A part of the GPU check in a process of its own: its result is one line of JSON on stdout.

    gpu_measure.py device | shapes | jpeg | attention | transfer
    gpu_measure.py parity CASE
    gpu_measure.py resume NAME [KEY=VALUE ...]
    gpu_measure.py step | profile | loop [KEY=VALUE ...]
    gpu_measure.py flags FLAG [KEY=VALUE ...]
    gpu_measure.py torch BATCH_SIZE

KEY=VALUE changes the recipe: quickstart for `resume`, and otherwise vit_b. Run from the root of the
code by gpu_check.py, which sets the variables OUT and GPU_CHECK_SIGNALS.
"""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import lmim_jax
from lmim_jax.configs import quickstart, vit_b
from lmim_jax.data import sources
from lmim_jax.models import attention, packed_attention
from lmim_jax.perf import bench_step, bench_train, profile
from lmim_jax.train import workdir
from lmim_jax.utils import xla_flags

TINY = bool(os.environ.get("GPU_CHECK_TINY"))
OUT = pathlib.Path(os.environ.get("OUT", "runs/gpu_check"))
FILES = OUT / "files"
VERSIONS = ("jax", "jaxlib", "flax", "numpy", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
# Queries, keys, heads and head width of vit_b's attention
SHAPES = {
    "target encoder": (177, 177, 12, 64),
    "encoder": (21, 21, 12, 64),
    "decoder, self": (177, 177, 16, 32),
    "decoder, cross": (177, 21, 16, 32),
    "MAE decoder": (197, 197, 16, 32),
}
TINY_VIT = {
    "method.width": 48,
    "method.heads": 3,
    "method.depth": 1,
    "method.decoder_width": 32,
    "method.decoder_heads": 4,
    "method.decoder_depth": 1,
    "method.projector_width": 64,
    "data.canvas": 300,
}
TINY_QUICKSTART = {"batch_size": 16, "method.width": 32, "method.depth": 1}
# Of a run that is killed: steps, steps between checkpoints, step after which it is killed
STEPS, EVERY, KILLED = (12, 4, 6) if TINY else (60, 20, 24)
PHOTOS = 64 if TINY else 4096  # drawn for the loop
PHOTO_SIZE = (500, 375)  # about the mean size in ImageNet
PREPARED = "photos256"  # name of the dataset with short sides of 256 pixels
KILL_TIMEOUT = 300.0  # seconds until the step KILLED must have been reached

Result = dict[str, Any]


def device() -> Result:
    """The card, versions, and what it reaches in large products and copies."""
    versions: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    side = 512 if TINY else 8192
    halves = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    floats = halves.astype(jnp.float32)
    large = jnp.ones(1 << (20 if TINY else 30), jnp.float32)
    product = jax.jit(jnp.matmul)
    exact = jax.jit(functools.partial(jnp.matmul, precision="highest"))
    copy = jax.jit(functools.partial(jnp.add, 1))
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": versions,
        "bfloat16_teraflops": 2 * side**3 / seconds(product, halves, halves) / 1e12,
        "float32_teraflops": 2 * side**3 / seconds(product, floats, floats) / 1e12,
        "float32_highest_teraflops": 2 * side**3 / seconds(exact, floats, floats) / 1e12,
        "copy_gigabytes_per_second": 2 * large.nbytes / seconds(copy, large) / 1e9,
    }


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Median time of a call, after three to warm up."""
    times = []
    for _ in range(6 if TINY else 23):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def shapes() -> Result:
    """Draw the images of quickstart."""
    config = quickstart.get_config()
    config.data.cache = str(FILES / "shapes")
    source = sources.from_config(config.data, "train")
    assert source is not None
    return {"images": len(source)}


def jpeg() -> Result:
    """Draw smooth noise, and save it as JPEGs of the size of ImageNet's."""
    folder = FILES / "jpeg" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(PHOTOS):
        noise = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
        noise.resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg")
    return {"images": PHOTOS}


def prepared() -> Result:
    """Prepare the images of the loop with short sides of 256 pixels."""
    images = os.environ.get("IMAGES") or str(FILES / "jpeg")
    command = [sys.executable, "-m", "lmim_jax.cli", "prepare", images, f"--out={FILES}"]
    _run([*command, f"--name={PREPARED}", "--shrink=256"])
    return {"megabytes": sum(file.stat().st_size for file in (FILES / PREPARED).rglob("*")) / 1e6}


def parity(case: str) -> Result:
    """Compare with the stored numbers of the official code: tests/test_reference.py."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
    command += ["-k", case, "tests/test_reference.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    counts = re.findall(r"(\d+) (passed|failed|error)", done.stdout)
    result: Result = {kind: int(count) for count, kind in counts}
    if done.returncode:
        sys.exit(f"{result} of tests/test_reference.py -k {case}")
    return result


def resume(name: str, changes: Sequence[str]) -> Result:
    """Train, and train again with a kill in between: whether weights and losses are the same bits.

    Args:
      name: of the folder of both runs.
      changes: KEY=VALUE.
    """
    folder = FILES / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    recipe = folder / "recipe.py"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(
        "from ml_collections import ConfigDict\n\n"
        "from lmim_jax.configs import quickstart\n\n\n"
        "def get_config():\n"
        "    config = quickstart.get_config()\n"
        "    config.evaluators = ConfigDict()\n"
        "    return config\n"
    )
    options = {"data.cache": FILES / "shapes", "total_steps": STEPS, "checkpoint_every": EVERY}
    options |= {"log_every": 2, "method.depth": 1, "method.decoder_depth": 1}  # compile quickly
    if TINY:
        options |= TINY_QUICKSTART
    command = [sys.executable, "main.py", f"--config={recipe}"]
    command += [f"--config.{key}={value}" for key, value in options.items()]
    command += [f"--config.{change}" for change in changes]
    whole = folder / "whole"
    killed = folder / "killed"
    _train(command, whole)
    killed.mkdir()
    for kernels in whole.glob("gpu_kernels*"):  # the choice of kernels belongs to a run
        shutil.copy(kernels, killed)
    victim = subprocess.Popen([*command, f"--workdir={killed}"], stdout=sys.stderr)
    deadline = time.monotonic() + KILL_TIMEOUT
    while _last_step(killed) < KILLED and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    after = _last_step(killed)
    _train(command, killed)
    expected = _content(whole)
    found = _content(killed)
    result = {"equal": found == expected, "killed_after_step": after, "steps": STEPS, **found}
    if found != expected:
        sys.exit(f"a resumed run differs from an uninterrupted one: {expected} {found}")
    return result


def _train(command: Sequence[str], folder: pathlib.Path) -> None:
    _run([*command, f"--workdir={folder}"])


def _run(command: Sequence[str]) -> str:
    """Run a command; what it writes to stdout. If it fails, exit with its last line of stderr."""
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        sys.exit("".join(done.stderr.strip().splitlines()[-1:]))
    return done.stdout


def _losses(folder: pathlib.Path) -> dict[int, float]:
    """{step: loss} as logged."""
    losses = {}
    path = folder / "metrics.jsonl"
    if path.exists():
        for line in path.read_text().splitlines():
            with_step = json.loads(line) if line.endswith("}") else {}
            if "loss" in with_step:
                losses[with_step["step"]] = with_step["loss"]
    return losses


def _last_step(folder: pathlib.Path) -> int:
    return max(_losses(folder), default=0)


def _content(folder: pathlib.Path) -> Result:
    """A checksum of the last weights of a run, and of its losses; and the last loss."""
    checksum = hashlib.sha256()
    for weights in ("online", "target"):
        for leaf in jax.tree.leaves(lmim_jax.load(folder, weights).params):
            checksum.update(np.asarray(leaf).tobytes())
    losses = _losses(folder)
    checksum_of_losses = hashlib.sha256(json.dumps(sorted(losses.items())).encode())
    return {
        "weights": checksum.hexdigest()[:16],
        "losses": checksum_of_losses.hexdigest()[:16],
        "last_loss": losses[max(losses)],
    }


def attention_variants() -> Result:
    """Time and error of every implementation, forward and with gradients.

    Errors are relative to plain products in float32 at highest precision.
    """
    rows = []
    batch_size = 2 if TINY else 256
    for name, (tokens, context, heads, width) in SHAPES.items():
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = []
        for key, length in zip(keys, (tokens, context, context, tokens), strict=True):
            shape = (batch_size, length, heads, width)
            arrays.append(jax.random.normal(key, shape, jnp.bfloat16))
        few = [array[:2].astype(jnp.float32) for array in arrays]
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(functools.partial(_with_gradients, _own("xla")))(*few)
        functions = {"plain": _own("xla"), "jax": _of_jax, "cudnn": _own("cudnn")}
        if not TINY:
            functions["packed"] = _packed
        for kind, function in functions.items():
            row: Result = {"shape": name, "attention": kind}
            try:
                both = jax.jit(functools.partial(_with_gradients, function))
                found = both(*arrays)
                row["forward_us"] = round(1e6 * seconds(jax.jit(function), *arrays[:3]))
                row["both_us"] = round(1e6 * seconds(both, *arrays))
                row["errors"] = [_error(a[:2], b) for a, b in zip(found, expected, strict=True)]
            except Exception as error:  # whatever a library refuses is a result
                row["error"] = str(error).splitlines()[0][:200]
            rows.append(row)
    return {"batch_size": batch_size, "rows": rows}


def _own(implementation: str) -> Callable[..., jax.Array]:
    return functools.partial(attention.attend, implementation=implementation)


def _packed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """This package's kernel; a layer makes its arrays as they are here."""
    arrays = tuple(array.reshape(*array.shape[:2], -1) for array in (query, key, value))
    places = ((0, 0), (1, 0), (2, 0))
    return packed_attention.attend(arrays, places, query.shape[2]).reshape(query.shape)


def _of_jax(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def _with_gradients(
    function: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, ...]:
    """The output, and the gradients of query, key and value."""
    output, backward = jax.vjp(function, query, key, value)
    return (output, *backward(gradient))


def _error(found: jax.Array, expected: jax.Array) -> float:
    difference = jnp.linalg.norm(found.astype(jnp.float32) - expected)
    return float(f"{float(difference / jnp.linalg.norm(expected)):.2e}")


def transfer() -> Result:
    """How fast the images of a batch reach the device: whole, in parts by threads, page-locked."""
    canvas = vit_b.get_config().data.canvas
    shape = (8 if TINY else 256, canvas, canvas, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    target = jax.devices()[0]
    put = functools.partial(jax.device_put, device=jax.sharding.SingleDeviceSharding(target))
    rows: list[Result] = []
    for count in (1, 2, 4, 8):
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            parts = np.array_split(images, count)
            elapsed = seconds(lambda pool, parts: list(pool.map(put, parts)), pool, parts)
        rows.append({"parts": count, "gigabytes_per_second": images.nbytes / elapsed / 1e9})
    for memory in target.addressable_memories():
        if memory.kind == "pinned_host":
            locked = jax.sharding.SingleDeviceSharding(target, memory_kind=memory.kind)
            lock = functools.partial(jax.device_put, device=locked)
            rate = images.nbytes / seconds(lock, images) / 1e9
            rows.append({"from": "numpy", "to": memory.kind, "gigabytes_per_second": rate})
            rate = images.nbytes / seconds(put, lock(images)) / 1e9
            rows.append({"from": memory.kind, "to": "device", "gigabytes_per_second": rate})
    return {"megabytes": images.nbytes / 1e6, "rows": rows}


def step(changes: Sequence[str]) -> Result:
    """Time the step on random images."""
    _, measured = _measure_step(_vit(changes))
    return _summary(measured)


def step_with_flag(flag: str, changes: Sequence[str]) -> Result:
    """Time the step with another flag of XLA.

    Args:
      flag: such as "--xla_gpu_enable_cublaslt=true".
      changes: KEY=VALUE.
    """
    if xla_flags.unknown_to_xla([flag]):
        return {"unknown_to_xla": flag}
    xla_flags.add("XLA_FLAGS", [flag])
    return step(changes)


def profile_step(changes: Sequence[str]) -> Result:
    """Time the step, and list the operations that take the longest."""
    made, measured = _measure_step(_vit(changes))
    found = profile.record(made, OUT / "profile", steps=3, rows=10)
    rows = []
    for operation in found["operations"]:
        short = {key: operation[key] for key in ("name", "times", "where")}
        rows.append({"milliseconds": round(operation["milliseconds"], 3), **short})
    share = {"product_share": round(found["product_share"], 3)}
    return {**_summary(measured), **share, "rows": rows}


def loop(changes: Sequence[str]) -> Result:
    """Time the training loop with its input, and the step alone, in turn."""
    config = _vit(changes)
    if config.data.source == "tfds":
        config.data.update(name=PREPARED, dir=str(FILES), test_split="")
    else:
        config.data.path = os.environ.get("IMAGES") or str(FILES / "jpeg")
    with tempfile.TemporaryDirectory() as folder:
        _log(workdir.set_xla_flags(config, folder))
        _, measured = bench_train.measure_loop(
            config, steps=2 if TINY else 10, rounds=2, on_compiled=wait_for_the_device
        )
    train = measured["train"]
    speed = {
        "loop_images_per_second": train["images_per_second"],
        "ratio": train["ratio"],
        "input_images_per_second": train["input_images_per_second"],
    }
    return {**_summary(measured), **speed}


def _vit(changes: Sequence[str]) -> ConfigDict:
    """The recipe vit_b with changes."""
    config = vit_b.get_config()
    values: dict[str, Any] = {}
    if TINY:
        values |= TINY_VIT
    for change in changes:
        key, _, text = change.partition("=")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    if TINY:
        values["batch_size"] = 8
    config.update_from_flattened_dict(values)
    return config


def _measure_step(config: ConfigDict) -> tuple[bench_step.BenchmarkStep, Result]:
    with tempfile.TemporaryDirectory() as folder:
        _log(workdir.set_xla_flags(config, folder))  # as training does
        return bench_step.measure_with_step(
            config, steps=3 if TINY else 20, on_compiled=wait_for_the_device
        )


def _log(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _summary(measured: Result) -> Result:
    """What is kept of the metrics of a step."""
    keys = ("device", "batch_size", "images_per_second", "teraflops", "mfu", "peak_memory")
    result = {key: measured[key] for key in (*keys, "trace_seconds", "compile_seconds")}
    result["milliseconds"] = 1e3 * measured["seconds_per_step"]["median"]
    stats = measured["compiled_stats"]
    result |= {"fusions": stats["fusions"], "memory": stats["memory"]}
    return result


def wait_for_the_device() -> None:
    """Say that the program is compiled, and wait until no other process uses the device."""
    prefix = os.environ.get("GPU_CHECK_SIGNALS")
    if prefix is None:
        return
    pathlib.Path(f"{prefix}ready").touch()
    while not pathlib.Path(f"{prefix}go").exists():
        time.sleep(0.02)


def torch_step(batch_size: str) -> Result:
    """A plain PyTorch step of the same sizes beside it; see torch_step.py."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name("torch_step.py"))]
    command += ["vit_b", f"--batch_size={8 if TINY else batch_size}"]
    command += ["--device=cpu", "--steps=1"] if TINY else ["--device=cuda"]
    return json.loads(_run(command).splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    """Measure, and print the result."""
    name, *others = arguments
    with_changes = {"step": step, "profile": profile_step, "loop": loop}
    with_one = {"parity": parity, "torch": torch_step}
    alone = {
        "device": device,
        "shapes": shapes,
        "jpeg": jpeg,
        "prepared": prepared,
        "attention": attention_variants,
        "transfer": transfer,
    }
    if name in with_changes:
        result = with_changes[name](others)
    elif name in with_one:
        result = with_one[name](others[0])
    elif name == "flags":
        result = step_with_flag(others[0], others[1:])
    elif name == "resume":
        result = resume(others[0], others[1:])
    else:
        result = alone[name]()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
