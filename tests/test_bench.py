"""The benchmarks, and what the program of the train step must not contain."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import conftest
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from lmim_jax.configs import small
from lmim_jax.distributed import sharding
from lmim_jax.methods import base
from lmim_jax.perf import accelerators, bench_input, bench_step, flops, profile, program_stats
from lmim_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent

# Where a bfloat16 step may multiply float32, and why.
FLOAT32 = {
    r"vmap\((tj,ijc->itc|si,itc->stc)\)": "resizing: pixels need more than 8 bits",
    # Their weights come from constants, and small changes in them have large effects
    r"jvp\(LatentDecoder\)/bmd,bvd->bmv": "visual cues",
    # Differences of cosines are divided by tau
    r"(transpose\()?jvp\(bid,bjd->bij\)\)?": "patch InfoNCE",
    r"(transpose\()?jvp\(bo,go->bg\)\)?": "contrast of images",
    r"jvp\((ViT|CrossPredictor)\)": "angles of rotary embeddings",
    r"transpose\(jvp\(GridDecoder\)\)/conv": "sums over a kernel's elements, on CPUs only",
}


def recipe(name, **change):
    """The tiny recipe of a method."""
    config = tiny.get_config()
    config.method = tiny.method(name)
    config.method.update(change)
    return config


def may_be_float32(where):
    """Whether a product with this name stack is listed in FLOAT32."""
    return any(re.fullmatch(f"{allowed}/dot_general", where) for allowed in FLOAT32)


@pytest.mark.parametrize("name", ["vit_b", *base.names()])
def test_a_bfloat16_step_multiplies_float32_only_where_it_must_and_needs_no_host(name):
    vit_b = importlib.import_module("lmim_jax.configs.vit_b").get_config()
    config = vit_b if name == "vit_b" else recipe(name, dtype="bfloat16")
    config.batch_size = 8
    _, lowered = bench_step.lower(config, sharding.make_mesh())
    found = program_stats.lowered_stats(lowered)
    assert found["products"] > 40
    leaks = [where for where in found["float32_products"] if not may_be_float32(where)]
    assert not leaks, (
        "float32 products cost 2 to 16 times as much as bfloat16 ones; add a new reason to FLOAT32"
    )
    assert found["host_transfers"] == 0


def test_the_float32_step_shows_that_products_are_seen():
    _, lowered = bench_step.lower(recipe("latent_mim"), sharding.make_mesh())
    found = program_stats.lowered_stats(lowered)
    assert sum(found["float32_products"].values()) == found["products"]


def test_host_transfers_are_seen():
    def step(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    lowered = jax.jit(step).lower(1.0)
    assert program_stats.lowered_stats(lowered)["host_transfers"] == 1
    assert program_stats.compiled_stats(lowered.compile())["host_transfers"] == 1


def test_metrics_of_eight_devices():
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
    assert found["gflop_per_image"] == flops.count_method(method).total / 1e9
    assert found["images_per_second"] == pytest.approx(config.batch_size / seconds["median"])
    assert found["mfu"] == pytest.approx(found["teraflops"] / found["peak_teraflops"])
    params = jax.eval_shape(method.init, jax.random.key(0))
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    collective_bytes = found["compiled_stats"]["collective_bytes"]
    assert gradients <= collective_bytes < gradients + 1000  # metrics are scalars
    assert json.loads(json.dumps(found)) == found


def test_steps_in_a_row_take_a_batch_each():
    step = bench_step.BenchmarkStep(recipe("mae", depth=1))
    batches = iter([bench_step.random_batch(step.parts, step.mesh) for _ in range(5)])
    seconds = step.timed_in_a_row(3, lambda: next(batches), skip=2)
    assert len(seconds) == 3 and min(seconds) > 0
    assert next(batches, None) is None
    assert len(step.timed_in_a_row(2)) == 2


def test_an_accelerator_is_timed_in_a_row(monkeypatch):
    monkeypatch.setattr(
        bench_step.BenchmarkStep, "timed_in_a_row", lambda step, steps: [0.5] * steps
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = bench_step.measure(recipe("mae", depth=1), steps=4, warmup=1)
    assert found["seconds_per_step"]["median"] == 0.5
    assert found["seconds_per_step"]["steps"] == 4


@pytest.mark.parametrize(
    ("device_kind", "flops_per_second"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_peaks_are_found_by_name(device_kind, flops_per_second):
    assert accelerators.find_chip(device_kind).flops == flops_per_second


@pytest.mark.parametrize(
    "device_kind",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA GeForce RTX 3090",
    ],
)
def test_devices_that_are_not_in_the_table(device_kind):
    assert accelerators.find_chip(device_kind) is None


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
    assert fusion.name == "fusion.1"
    assert fusion.calls == "fused_computation"
    assert fusion.where == "jit(step)/f"
    assert {one.computation for one in program} == {"fused_computation", "main.1"}
    products = [one.name for one in program if profile.is_product(one, program)]
    assert products == ["dot.1", "fusion.1", "custom-call.3"]


class FakeStep:
    """In place of a compiled step: takes as many seconds as its config says."""

    def __init__(self, config):
        self.config = config

    def timed(self):
        return self.config.seconds

    def metrics(self, seconds, matrix_seconds):
        assert len(matrix_seconds) == len(seconds)
        return list(seconds)


def test_a_comparison_says_how_much_faster_the_second_is(monkeypatch):
    monkeypatch.setattr(bench_step, "BenchmarkStep", FakeStep)
    slow = ConfigDict({"batch_size": 8, "seconds": 1.0})
    fast = ConfigDict({"batch_size": 16, "seconds": 0.5})
    found = bench_step.compare(slow, fast, steps=3)
    assert found["ratio"]["median"] == 4.0
    assert found["first"] == [1.0] * 3
    assert found["second"] == [0.5] * 3


SMALL = ["--config.method.depth=1", "--config.method.projector_depth=1"]
BATCH_BYTES = 8 * 40 * 40 * 3  # of the canvases of tests/tiny.py
TIMEOUT = 600


def bench(flags):
    """Start the command as users call it, on one device."""
    command = [sys.executable, "-m", "lmim_jax.cli", "bench", "--config=tests/tiny.py"]
    return subprocess.Popen(
        command + flags,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": conftest.FAST, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--what=step", "--compare=configs/none.py"], "no such file"),
        (
            ["--what=step", "--compare=tests/tiny.py", "--compare.methd.tau=1"],
            "unknown config key compare.methd.tau",
        ),
        (["--what=train", "--compare=tests/tiny.py"], "--compare is for --what=step"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    process = bench(flags)
    _, log = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, log
    assert "Traceback" not in log
    last_line = log.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line


@pytest.mark.slow
def test_the_step_with_a_profile(tmp_path):
    """The state is donated: there is no second copy of it."""
    process = bench(["--what=step", f"--profile={tmp_path}"] + SMALL)
    output, log = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, log
    found = json.loads(output)
    assert found["seconds_per_step"]["steps"] == 20
    assert found["peak_teraflops"] > 0
    assert found["compile_seconds"] > 0
    compiled = found["compiled_stats"]
    memory = compiled["memory"]
    assert memory["outputs"] - memory["aliased"] < 4096  # metrics and pointers
    assert memory["aliased"] > 0.9 * memory["arguments"] - BATCH_BYTES  # all but the batch
    assert compiled["host_transfers"] == 0
    assert compiled["collectives"] == 0
    assert found["lowered_stats"]["host_transfers"] == 0
    assert pathlib.Path(found["profile"]["trace"]).is_file()
    slowest = [one["milliseconds"] for one in found["profile"]["operations"]]
    assert len(slowest) == 10
    assert slowest == sorted(slowest, reverse=True)
    assert 0 < found["profile"]["product_share"] < 1
    assert "ms a step" in log
    assert "matrix products" in log


GPU_TRACE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 4000000 stats { metadata_id: 1 str_value: "fusion.7" } }
    events { metadata_id: 2 duration_ps: 9000000 }
    events { metadata_id: 3 duration_ps: 6000000 }
    events { metadata_id: 3 duration_ps: 2000000 }
  }
  lines {
    name: "XLA Ops"
    events { metadata_id: 2 duration_ps: 9000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN" } }
  event_metadata { key: 3 value { id: 3 name: "add_fusion_3" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes {
  name: "/host:CPU"
  lines {
    name: "python"
    events { metadata_id: 1 duration_ps: 70000000 stats { metadata_id: 1 str_value: "fusion.7" } }
  }
  event_metadata { key: 1 value { id: 1 name: "launch" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
"""
GPU_PROGRAM = """
ENTRY %main (x: f32[2]) -> f32[2] {
  %fusion.7 = f32[2]{0} fusion(%x), kind=kLoop, calls=%a, metadata={op_name="jit(train_step)/add"}
  %add_fusion.3 = f32[2]{0} fusion(%x), kind=kLoop, calls=%b, metadata={op_name="jit(train_step)/b"}
}
"""


def test_kernels_of_a_gpu_are_named_by_their_instruction_or_themselves(tmp_path):
    """Kernels in a CUDA graph do not tell their instruction; XLA's own have its name."""
    trace = jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU_TRACE)
    path = tmp_path / "gpu.xplane.pb"
    path.write_bytes(trace)
    found = profile._sum_operations(path, program_stats.instructions(GPU_PROGRAM), steps=2)
    assert [one["name"] for one in found] == [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN",
        "add_fusion.3",
        "fusion.7",
    ]
    assert [one["milliseconds"] for one in found] == pytest.approx([0.0045, 0.004, 0.002])
    assert [one["times"] for one in found] == [0.5, 1, 0.5]
    assert [one["product"] for one in found] == [True, False, False]
    assert found[1]["where"] == "jit(train_step)/b"
    assert found[0]["opcode"] == profile.KERNEL


def test_a_trace_without_operations_is_refused(tmp_path):
    trace = jax.profiler.ProfileData.text_proto_to_serialized_xspace('planes { name: "/host:CPU" }')
    path = tmp_path / "empty.xplane.pb"
    path.write_bytes(trace)
    with pytest.raises(UserError, match="does not name the operations"):
        profile._sum_operations(path, [], steps=1)


def write_images(folder, suffix, pixels):
    folder.mkdir(parents=True)
    for number in range(8):
        path = folder / f"{number}{suffix}"
        if suffix == ".npy":
            np.save(path, pixels)
        else:
            Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("kind", ["colors", "samples", "modalities"])
def test_input_is_compared_with_pillow_where_pillow_reads_it(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_input, "SETUPS", ((1, 0),))
    pixels = np.full((20, 20, 3), 100, np.uint8)
    config = tiny.get_config()
    if kind == "modalities":
        config = small.get_config("interactive_mim,rgb_thermal")
        write_images(tmp_path / "thermal", ".png", pixels[..., 0])
        write_images(tmp_path / "rgb", ".png", pixels)
    elif kind == "samples":
        write_images(tmp_path / "train", ".npy", pixels)
    else:
        write_images(tmp_path / "train", ".png", pixels)
    config.data.path = str(tmp_path)
    measured = bench_input.measure(config, images=8, repeats=1)
    compared = kind == "colors"
    assert ("decode by Pillow" in measured["stages"]) == compared
    assert (bench_input.BASELINE in measured["whole"]) == compared
    assert (measured["ratio"] is not None) == compared
    assert ("no baseline" in bench_input.table(measured)) != compared


@pytest.mark.slow
def test_the_whole_loop(images):
    data = [f"--config.data.path={images}", "--config.data.resize_on=host"]
    process = bench(["--what=train", "--steps=4"] + data + SMALL)
    output, log = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, log
    found = json.loads(output)["train"]
    assert found["seconds_per_step"]["steps"] == 12
    assert found["ratio"] > 0
    assert found["images_per_second"] > 0
    assert "whole loop" in log
    assert re.search(r"input +[\d.e+]+ images/s by itself", log)
