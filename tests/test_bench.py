"""The benchmark of the train step: what it says is so, and what the step's program must not hold."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import conftest
import jax
import pytest
import tiny

from lmim_jax.distributed import sharding
from lmim_jax.methods import base
from lmim_jax.perf import accelerators, bench_step, flops, profile, program_stats

ROOT = pathlib.Path(__file__).parent.parent

# Where a bfloat16 step may multiply float32, and why.
FLOAT32 = {
    r"vmap\((sj,ijc->isc|ti,isc->tsc)\)": "resizing: pixels need more than 8 bits",
    r"jvp\(LatentDecoder\)/bmd,bvd->bmv": "visual cues: their weights come from constants and decide what follows",
    r"(transpose\()?jvp\(bid,bjd->bij\)\)?": "patch InfoNCE: differences of cosines are divided by tau",
}


def recipe(name, **change):
    """A method's tiny recipe."""
    config = tiny.get_config()
    config.method = tiny.method(name)
    config.method.update(change)
    return config


@pytest.mark.parametrize("name", ["vit_b", *base.names()])
def test_a_bfloat16_step_multiplies_float32_only_where_it_must_and_asks_nothing_of_the_host(name):
    vit_b = importlib.import_module("lmim_jax.configs.vit_b").get_config()
    config = vit_b if name == "vit_b" else recipe(name, dtype="bfloat16")
    config.batch_size = 8
    *_, lowered = bench_step.lower(config, sharding.make_mesh())
    found = program_stats.asked(lowered)
    assert found["products"] > 40
    leaks = [
        where
        for where in found["float32_products"]
        if not any(re.fullmatch(f"{allowed}/dot_general", where) for allowed in FLOAT32)
    ]
    assert not leaks, (
        "products of float32 cost twice to sixteen times those of bfloat16; a new reason goes in FLOAT32"
    )
    assert found["host_transfers"] == 0


def test_the_float32_step_shows_that_products_are_seen():
    *_, lowered = bench_step.lower(recipe("latent_mim"), sharding.make_mesh())
    found = program_stats.asked(lowered)
    assert sum(found["float32_products"].values()) == found["products"]


def test_host_transfers_are_seen():
    def step(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    lowered = jax.jit(step).lower(1.0)
    assert program_stats.asked(lowered)["host_transfers"] == 1
    assert program_stats.made(lowered.compile())["host_transfers"] == 1


def test_figures_of_eight_devices():
    config = recipe("mae", depth=1)
    found = bench_step.measure(config, steps=5, warmup=1)
    seconds = found["seconds_per_step"]
    assert (
        seconds["min"]
        <= seconds["lower_quartile"]
        <= seconds["median"]
        <= seconds["upper_quartile"]
    )
    assert seconds["upper_quartile"] <= seconds["max"] and seconds["steps"] == 5
    method = base.from_config(config.method, total_steps=10, steps_per_epoch=5)
    assert found["gflop_per_image"] == flops.of_method(method).total / 1e9
    assert found["images_per_second"] == pytest.approx(config.batch_size / seconds["median"])
    assert found["mfu"] == pytest.approx(found["teraflops"] / found["peak_teraflops"])
    params = jax.eval_shape(method.init, jax.random.key(0))
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert gradients <= found["made"]["collective_bytes"] < gradients + 1000  # metrics are scalars
    assert json.loads(json.dumps(found)) == found


def test_peaks_are_found_by_name():
    flops = {
        kind: accelerators.of_device(kind).flops
        for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "TPU v5 lite", "TPU v5p")
    }
    assert list(flops.values()) == [989e12, 989e12, 197e12, 459e12]
    assert (
        accelerators.of_device("NVIDIA H100 PCIe")
        is accelerators.of_device("NVIDIA GeForce RTX 3090")
        is None
    )


def test_hlo_is_read():
    text = """HloModule jit_step, is_scheduled=true

%fused_computation (p: f32[2]) -> f32[2] {
  %copy.9 = f32[2]{0} copy(%p)
  ROOT %dot.1 = f32[2]{0} dot(%copy.9, %copy.9), metadata={op_name="jit(step)/a/dot_general"}
}

ENTRY %main.1 (x: f32[2]) -> (f32[2], f32[2]) {
  %x = f32[2]{0:T(256)} parameter(0)
  %fusion.1 = (f32[2]{0:T(256)}, /*index=1*/f32[2]{0}) fusion(%x), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(step)/f"}
  %copy.1 = f32[2]{0} copy(%x)
  ROOT %custom-call.3 = f32[2]{0} custom-call(%x), custom_call_target="__cublas$gemm"
}
"""  # noqa: E501
    program = program_stats.instructions(text)
    assert [one.opcode for one in program] == [
        "copy",
        "dot",
        "parameter",
        "fusion",
        "copy",
        "custom-call",
    ]
    fusion = program[3]
    assert (fusion.name, fusion.calls, fusion.where) == (
        "fusion.1",
        "fused_computation",
        "jit(step)/f",
    )
    assert {one.computation for one in program} == {"fused_computation", "main.1"}
    assert [profile.is_product(one, program) for one in program] == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]


def test_a_comparison_says_how_much_faster_the_second_is(monkeypatch):
    class Fake:
        def __init__(self, config):
            self.config = config

        def timed(self):
            return self.config.seconds

        def figures(self, seconds, products):
            assert len(products) == len(seconds)
            return list(seconds)

    from ml_collections import ConfigDict

    monkeypatch.setattr(bench_step, "Step", Fake)
    slow, fast = (
        ConfigDict(dict(batch_size=8, seconds=1.0)),
        ConfigDict(dict(batch_size=16, seconds=0.5)),
    )
    found = bench_step.compare(slow, fast, steps=3)
    assert found["ratio"]["median"] == 4.0
    assert (found["first"], found["second"]) == ([1.0] * 3, [0.5] * 3)


def bench(*flags):
    """The command as users call it, on one device."""
    environment = {**os.environ, "XLA_FLAGS": conftest.FAST, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    call = [sys.executable, "-m", "lmim_jax.cli", "bench", "--config=tests/tiny.py", *flags]
    return subprocess.Popen(call, cwd=ROOT, env=environment, **pipes)


def test_the_commands(images, tmp_path):
    """The step with a profile, the whole loop, and mistakes; the state is donated: no second copy of it is made."""
    small = "--config.method.depth=1", "--config.method.projector_depth=1"
    step = bench("--what=step", f"--profile={tmp_path}", *small)
    host = "--config.data.resize_on=host"
    train = bench("--what=train", f"--config.data.path={images}", host, "--steps=4", *small)
    bad = {
        "no such file": bench("--what=step", "--compare=configs/none.py"),
        "unknown config key compare.methd.tau": bench(
            "--what=step", "--compare=tests/tiny.py", "--compare.methd.tau=1"
        ),
        "--compare is for --what=step": bench("--what=train", "--compare=tests/tiny.py"),
    }
    for message, process in bad.items():
        _, told = process.communicate(timeout=600)
        assert process.returncode == 2, told
        assert "Traceback" not in told
        assert message in told.splitlines()[-1] and told.splitlines()[-1].startswith("error: "), (
            told
        )

    out, told = step.communicate(timeout=600)
    assert step.returncode == 0, told
    found = json.loads(out)
    made, seconds = found["made"], found["seconds_per_step"]
    assert seconds["steps"] == 20 and found["peak_teraflops"] > 0 and found["compile_seconds"] > 0
    assert made["memory"]["outputs"] - made["memory"]["aliased"] < 4096  # metrics and pointers
    assert (
        made["memory"]["aliased"] > 0.9 * made["memory"]["arguments"] - 8 * 40 * 40 * 3
    )  # all but the batch
    assert made["host_transfers"] == found["asked"]["host_transfers"] == made["collectives"] == 0
    assert pathlib.Path(found["profile"]["trace"]).is_file()
    slowest = [one["milliseconds"] for one in found["profile"]["operations"]]
    assert len(slowest) == 10 and slowest == sorted(slowest, reverse=True)
    assert 0 < found["profile"]["product_share"] < 1
    assert "ms a step" in told and "matrix products" in told

    out, told = train.communicate(timeout=600)
    assert train.returncode == 0, told
    found = json.loads(out)["train"]
    assert found["seconds_per_step"]["steps"] == 12
    assert found["ratio"] > 0 and found["images_per_second"] > 0
    assert "whole loop" in told
