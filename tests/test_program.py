"""Programs for GPUs and TPUs that are not there: what is read from them, and that they compile."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from lmim_jax.distributed import sharding
from lmim_jax.models import attention
from lmim_jax.perf import accelerators, aot, bench_program, gpu_targets, hlo, traffic
from lmim_jax.utils import recipes
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.platform import tracing_for

ROOT = pathlib.Path(__file__).parent.parent
BYTES_PER_IMAGE = 99e6  # at most, of the small model: 95.5 MB when this was written
TPU_BYTES_PER_IMAGE = 39e6  # of the one for TPUs: 37 MB
needs_compiler = pytest.mark.skipif(
    not aot.compiles_for_gpu("h100"), reason="pip install '.[plan-gpu]' to compile for GPUs"
)

# Lines of real programs for an H100, shortened
PROGRAM = """HloModule jit_train_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gemm_computation (p.0: bf16[4,8], p.1: bf16[8,2]) -> f32[4,2] {
  %p.0 = bf16[4,8]{1,0} parameter(0)
  %p.1 = bf16[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_add (p.2: f32[4,2]) -> f32[4,2] {
  %p.2 = f32[4,2]{1,0} parameter(0)
  ROOT %twice = f32[4,2]{1,0} add(%p.2, %p.2)
}

%body (state: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %state = (s32[], f32[4,2]{1,0}) parameter(0)
  %in = f32[4,2]{1,0} get-tuple-element(%state), index=1
  %loop_add_fusion = f32[4,2]{1,0} fusion(%in), kind=kLoop, calls=%fused_add, metadata={op_name="jit(train_step)/jvp(ViT)/block07/mlp/add"}
  ROOT %out = (s32[], f32[4,2]{1,0}) tuple(%in, %loop_add_fusion)
}

%condition (state.1: (s32[], f32[4,2])) -> pred[] {
  ROOT %state.1 = pred[] parameter(0)
}

ENTRY %main (x: bf16[4,8], w: bf16[8,2], q: bf16[2,6,1,8], y: f32[4,4]) -> f32[4,2] {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,2]{1,0} parameter(1)
  %q = bf16[2,6,1,8]{3,2,1,0} parameter(2)
  %y = f32[4,4]{1,0} parameter(3)
  %gemm_fusion_dot.1 = f32[4,2]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm_computation, metadata={op_name="jit(train_step)/shard_map/jvp(ViT)/block00/mlp/fc1/dot_general"}, backend_config={"fusion_backend_config":{"block_level_fusion_config":{"num_warps":"2"},"kind":"__triton_nested_gemm_fusion"}}
  %custom-call.1 = (f32[4,4]{1,0}, s8[33554432]{0}) custom-call(%y, %y), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/jvp(bid,bjd->bij)/dot_general"}, backend_config={"gemm_backend_config":{"alpha_real":1}}
  %fmha.1 = (bf16[2,1,6,8]{3,1,2,0}, f32[2,1,6]{2,1,0}, u8[256]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,6,1,8]{3,2,1,0}}, metadata={op_name="jit(train_step)/jvp(ViT)/block00/attn/dot_product_attention_fwd"}
  %free = f32[8]{0} bitcast(%gemm_fusion_dot.1)
  %all-reduce-start.1 = f32[8]{0} all-reduce-start(%free), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %all-reduce-done.1 = f32[8]{0} all-reduce-done(%all-reduce-start.1)
  %copy.1 = f32[4,2]{0,1} copy(%gemm_fusion_dot.1), metadata={op_name="jit(train_step)/jvp(ViT)/block11/mlp/add"}
  %start = (s32[], f32[4,2]{1,0}) tuple(%copy.1)
  %while.1 = (s32[], f32[4,2]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[4,2]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_kernels_are_read_from_the_text():
    found = traffic.summarize(PROGRAM)
    assert found["kernels"] == 4 + 5  # a loop of five iterations
    assert found["products"] == {"Triton": 1, "cuBLAS": 1, "cuDNN": 1}
    assert found["float32_products"] == {"jvp(bid,bjd->bij)/dot_general": 1}
    gemm = 4 * 8 * 2 + 8 * 2 * 2 + 4 * 2 * 4
    cublas = 2 * 4 * 4 * 4  # one operand, given twice, and the result without the workspace
    fused = 2 * 96 * 2 + 12 * 4
    assert found["product_bytes"] == gemm + cublas + fused
    assert found["bytes"] == gemm + cublas + fused + (1 + 5) * 2 * 32
    assert found["parts"][0] == {
        "where": "jvp(ViT)/block*/attn/dot_product_attention_fwd",
        "kernels": 1,
        "bytes": fused,
    }
    assert found["parts"][1] == {
        "where": "jvp(ViT)/block*/mlp/add",
        "kernels": 6,
        "bytes": 6 * 2 * 32,
    }


# Lines of a real program for a v5e, shortened
TPU_PROGRAM = """HloModule jit_train_step, is_scheduled=true

%async_computation (p.0: bf16[256,176,512]) -> bf16[64,176,512] {
  %p.0 = bf16[256,176,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice.1 = bf16[64,176,512]{2,1,0:T(8,128)(2,1)S(1)} slice(%p.0), slice={[0:64], [0:176], [0:512]}
}

%fused_computation (p.1: bf16[256,177,64]) -> f32[177] {
  %p.1 = bf16[256,177,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %sum = f32[177]{0:T(256)} negate(%p.1)
}

ENTRY %main (x: bf16[256,176,512], y: bf16[256,177,64]) -> f32[177] {
  %x = bf16[256,176,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[256,177,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %slice-start = ((bf16[256,176,512]{2,1,0:T(8,128)(2,1)}), bf16[64,176,512]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) async-start(%x), calls=%async_computation
  %slice-done = bf16[64,176,512]{2,1,0:T(8,128)(2,1)S(1)} async-done(%slice-start)
  %custom-call.1 = bf16[128,176,512]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%slice-done, %slice-done), custom_call_target="ConcatBitcast"
  %copy-start.1 = (bf16[256,176,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[256,176,512]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x), backend_config={"dma_priority":1}
  %copy-done.1 = bf16[256,176,512]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %attention_forward.1 = bf16[256,176,512]{2,1,0:T(8,128)(2,1)} custom-call(%copy-done.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(train_step)/shard_map/jvp(ViT)/block01/attn/attention_forward/pallas_call"}
  ROOT %fusion.1 = f32[177]{0:T(256)} fusion(%y), kind=kLoop, calls=%fused_computation
}
"""  # noqa: E501


def test_traffic_of_a_tpu_is_that_of_whole_tiles_outside_the_chip():
    found = traffic.summarize(TPU_PROGRAM)
    assert found["kernels"] == 4
    assert found["products"] == {"Pallas": 1}
    whole = 256 * 176 * 512 * 2
    sizes = {
        "slice": whole // 4,  # what is read of a large array
        "copy": whole,
        "kernel": whole,  # it reads from memory on the chip
        "fusion": 256 * 184 * 128 * 2 + 256 * 4,  # 177 x 64 in tiles of 8 x 128
    }
    assert found["bytes"] == sum(sizes.values())
    assert found["parts"][-1]["where"] == "jvp(ViT)/block*/attn/attention_forward/pallas_call"


def test_the_estimate_is_the_sum_of_the_model():
    chip = accelerators.CHIPS["h100"]
    program = {"bytes": 3.7e12, "product_bytes": 2e12, "kernels": 500_000}
    seconds = traffic.estimate_seconds(chip, 650e12, program)
    assert seconds == pytest.approx({"products": 1, "traffic": 1, "kernel_starts": 1})


# Of asynchronous collectives in programs for several H100s, shortened
COLLECTIVES = """HloModule jit_train_step
%add (a: f32[], b: f32[]) -> f32[] {
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %all-gather-start = ((f32[4]{0}, bf16[24,16]{1,0}), (f32[8]{0}, bf16[48,16]{1,0})) all-gather-start(%p.0, %wrapped_convert), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}, use_global_device_ids=true
  %all-gather-done = (f32[8]{0}, bf16[48,16]{1,0}) all-gather-done(%all-gather-start)
  %all-reduce-start = f32[9]{0} all-reduce-start(%wrapped_concatenate), channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %all-reduce-start.1 = ((f32[768]{0}, f32[768,3]{1,0}), (f32[768]{0}, f32[768,3]{1,0})) all-reduce-start(%g.0, %g.1), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %all-reduce-start.2 = (f32[5]{0}, f32[6]{0}) all-reduce-start(%g.2, %g.3), channel_id=3, replica_groups={{0,2},{1,3}}, to_apply=%add
  %reduce-scatter-start = ((f32[16]{0}, f32[16,8]{1,0}), (f32[8]{0}, f32[8,8]{1,0})) reduce-scatter-start(%g.4, /*index=1*/%g.5), channel_id=4, replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
  %reduce-scatter-done = (f32[8]{0}, f32[8,8]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  %collective-permute-start = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%g.6), source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_asynchronous_collectives_are_counted_once():
    found = {(one.kind, one.group, one.shapes, one.size) for one in hlo.collectives(COLLECTIVES)}
    assert found == {
        ("all-gather", 2, ("f32[8]", "bf16[48,16]"), 8 * 4 + 48 * 16 * 2),
        ("all-reduce", 4, ("f32[9]",), 36),
        ("all-reduce", 4, ("f32[768]", "f32[768,3]"), 4 * 768 * 4),
        ("all-reduce", 2, ("f32[5]", "f32[6]"), 44),
        ("reduce-scatter", 2, ("f32[8]", "f32[8,8]"), 4 * (16 + 16 * 8)),  # the whole arrays
        ("collective-permute", 2, ("f32[3]",), 12),
    }


@pytest.mark.parametrize("kind", sorted(gpu_targets.TARGETS))
def test_cudnn_is_that_of_the_target_inside_the_scope(kind):
    real = fused_attention_stablehlo.check_cudnn_version
    with aot.cudnn_for(kind):
        assert fused_attention_stablehlo.check_cudnn_version() == 91000
        hopper = fused_attention_stablehlo.check_compute_capability("9.0")
        assert hopper == (kind != "a100")
        assert not fused_attention_stablehlo.is_cuda_compute_capability_equal("10.3")
    assert fused_attention_stablehlo.check_cudnn_version is real


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(aot, "compiles_for_gpu", lambda kind: False)
    with pytest.raises(UserError, match=r"--device=h100: .*pip install '.\[plan-gpu\]'"):
        bench_program.measure(recipe("quickstart"), "h100")


def recipe(name, **change):
    config = importlib.import_module(f"lmim_jax.configs.{name}").get_config()
    config.update_from_flattened_dict(change)
    return config


def lmim(*words):
    """Run a command as users do."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lmim_jax.cli", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@needs_compiler
def test_the_traffic_of_a_small_model(tmp_path):
    """ViT-B with one block in each network, 64 images: what optimizations have reached stays."""
    shrink = ["depth=1", "decoder_depth=1", "projector_depth=1"]
    done = lmim(
        "bench",
        "--what=program",
        "--device=h100",
        "--config=vit_b",
        "--config.batch_size=64",
        f"--program_text={tmp_path}/new/step.hlo",
        *(f"--config.method.{change}" for change in shrink),
    )
    assert "ENTRY" in (tmp_path / "new/step.hlo").read_text()
    found = json.loads(done.stdout)
    assert 20e6 < found["bytes_per_image"] < BYTES_PER_IMAGE
    fused = [part for part in found["parts"] if part["where"].endswith("pallas_call")]
    assert sum(part["kernels"] for part in fused) == 2 * 3 + 1  # target, encoder and decoder
    assert set(found["products"]) == {"cuBLAS"}
    assert not any("attn" in where for where in found["float32_products"])
    memory = found["memory"]
    assert memory["needed"] >= memory["arguments"] > 64 * 512 * 512 * 3
    assert found["seconds"]["step"] > 0
    assert "MB an image" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="pip install libtpu")
def test_the_traffic_of_a_small_model_on_a_tpu():
    """As for a GPU, with a smaller model, as that compiler takes longer."""
    shrink = ["depth=1", "decoder_depth=1", "projector_depth=1", "width=384", "heads=6"]
    done = lmim(
        "bench",
        "--what=program",
        "--device=v5e",
        "--config=vit_b",
        "--config.batch_size=64",
        *(f"--config.method.{change}" for change in shrink),
    )
    found = json.loads(done.stdout)
    assert 20e6 < found["bytes_per_image"] < TPU_BYTES_PER_IMAGE
    assert found["products"]["Pallas"] == 2 * 3 + 1  # of target, encoder and decoder
    assert set(found["seconds"]) == {"products", "traffic"}
    assert "at the data sheet's rates" in done.stderr


@needs_compiler
@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_plan_for_gpus_is_compiled(fsdp, tmp_path):
    lmim(
        "plan",
        "--config=tests/tiny.py",
        "--topology=h200:2x2",
        "--config.batch_size=16",
        f"--config.mesh.fsdp={fsdp}",
        "--config.mesh.min_size=16",
        f"--json={tmp_path / 'plan.json'}",
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["from"] == "compiler"
    assert found["mesh"] == {"data": 4 // fsdp, "fsdp": fsdp}
    assert found["memory"]["limit"] == 0.75 * 141e9
    assert not found["estimable"]  # so little work in a step
    kind = {1: "all-reduce", 4: "reduce-scatter"}[fsdp]
    sizes = [one["size"] for one in found["collectives"] if one["kind"] == kind]
    config = importlib.import_module("tiny").get_config()
    params = aot.build_for_images(config, images=100).abstract_state().params
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert sum(sizes) == pytest.approx(gradients, rel=0.05)


RECIPES = recipes.training_names()


def shallow(name):
    """A recipe with one layer in each network, in bfloat16."""
    config = recipe(name)
    config.batch_size = 8
    for key in config.method:
        if key.endswith("depth") and config.method[key]:
            config.method[key] = 1
    config.method.update(attention="auto", dtype="bfloat16")
    return config


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_compiles_for_a_gpu(name):
    config = shallow(name)
    found = aot.compile_for_gpu(config, images=1000, topology="h100:1")
    assert sum(found.program["products"].values()) > 20
    rows, columns = config.method.grid
    if rows * columns >= 2 * attention.FUSED_TOKENS:
        assert found.program["products"].get("cuDNN", 0) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_lowers_for_a_tpu(name):
    parts = aot.build_for_images(shallow(name), images=1000)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with tracing_for("tpu"):
        step, arguments = aot.abstract_step(parts, mesh)
        lowered = step.trace(*arguments).lower(lowering_platforms=("tpu",))
    assert "stablehlo.dot_general" in lowered.as_text()
