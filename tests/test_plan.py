"""The planner: figures of a recipe without its devices. Compiling for TPUs is tried where libtpu is."""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from lmim_jax.cli import plan
from lmim_jax.perf import accelerators, aot, hlo
from lmim_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = dict(images=1_281_167, utilization=0.45, decode_rate=900.0, resize_rate=500.0)


def recipe(name="configs.vit_b", **change):
    config = importlib.import_module(name).get_config()
    config.update_from_flattened_dict(change)
    return config


@pytest.fixture(scope="module")
def planned():
    return plan.plan(recipe(), "h200:8", SETTINGS)


def test_gpus_are_planned_from_the_trace(planned):
    assert planned["chips"] == 8
    assert planned["mesh"] == {"data": 8, "fsdp": 1}
    assert planned["images_per_chip"] == 512
    assert planned["feasible"]
    work = planned["flops_per_image"]
    assert work["method"] == work["executed"] == pytest.approx(66.4e9, rel=1e-3)
    assert work["augmentation"] == pytest.approx(
        0.68e9, rel=0.05
    )  # two products: 512 x 512 canvas to 280 x 280
    # gradients, once: 122.1 M numbers of 4 bytes, of which a ring sends 2 x 7/8
    (gradients,) = planned["collectives"]
    assert gradients["size"] == 122_138_880 * 4
    assert gradients["wire_bytes"] == pytest.approx(2 * 7 / 8 * gradients["size"])
    seconds = planned["seconds"]
    assert seconds["compute"] == pytest.approx(
        (work["method"] + work["augmentation"]) * 512 / 989e12
    )
    assert planned["images_per_second"] == pytest.approx(
        8 * 0.45 * 989e12 / work["method"], rel=1e-6
    )
    assert planned["hours"] == pytest.approx(800 * 1_281_167 / planned["images_per_second"] / 3600)
    assert planned["chip_hours"] == 8 * planned["hours"]
    need = planned["input"]
    assert need["device"]["gigabytes_per_second"] == pytest.approx(
        planned["images_per_second"] * 512 * 512 * 3 / 1e9
    )
    assert need["host"]["decode_cores"] == pytest.approx(planned["images_per_second"] / 500)
    json.dumps(planned)


def test_the_table_tells_it(planned):
    told = "\n".join(plan.table(planned))
    parts = (
        "h200:8: 8 chips on 1 host(s), mesh data 8 x fsdp 1",
        "fits",
        "66.4",
        "1 x all-reduce among 8",
        "chip-hours",
    )
    assert all(part in told for part in parts)


def test_what_is_cut_needs_less_and_what_is_computed_again_is_counted():
    two, parts = {"method.depth": 2}, {"mesh.data": 1, "mesh.fsdp": 8}
    whole, cut = (
        aot.analyse(aot.Recipe.of(recipe(**change), 10**6), 8) for change in (two, {**two, **parts})
    )
    saved = whole["memory"]["arguments"] - cut["memory"]["arguments"]
    state = sum(aot.Recipe.of(recipe(**two), 10**6).state_bytes().values())
    assert saved == pytest.approx(7 / 8 * state, rel=0.02)  # all but norms and biases
    assert {one.kind for one in cut["collectives"]} == {"all-gather", "reduce-scatter"}
    full = aot.Recipe.of(recipe("tiny", remat="full"), 100).flops()
    assert 1.1 < full["executed"] / full["method"] < 1.5


def test_a_sweep_recommends_the_fastest_that_fits(monkeypatch):
    def plan_of(config, topology, settings):
        if config.micro_batches > 2:
            raise UserError("not divisible")
        needed = {"none": 20, "dots": 12, "full": 8}[config.remat] / config.micro_batches
        rate = {"none": 100, "dots": 95, "full": 80}[config.remat] - config.micro_batches
        return {
            "memory": {"needed": needed, "limit": 11},
            "feasible": needed <= 11,
            "images_per_second": rate,
        }

    monkeypatch.setattr(plan, "plan", plan_of)
    plans, best = plan.sweep(recipe(), "v5e:4x4", SETTINGS)
    assert len(plan.CHOICES) <= 6
    assert len(plans) == 5
    assert best["change"] == {"micro_batches": 2}


@pytest.mark.parametrize("name", ["v5e", "v5e:4y4", "h300:8", "v5e:0x4", ""])
def test_unknown_topologies_are_refused(name):
    with pytest.raises(UserError, match="none of: v5e:4x4"):
        accelerators.topology(name)


def test_known_topologies():
    sizes = {
        name: accelerators.topology(name)[2:]
        for name in ("v5e:4x4", "v5p:2x2x4", "v6e:8x8", "h200:8", "h100:8x4")
    }
    assert sizes["v5e:4x4"] == sizes["v5p:2x2x4"] == (16, 4)
    assert (sizes["v6e:8x8"], sizes["h200:8"]) == ((64, 16), (8, 1))
    assert sizes["h100:8x4"] == (32, 4)
    node, cluster = accelerators.topology("h100:8")[1], accelerators.topology("h100:8x4")[1]
    assert accelerators.network_seconds(node, 8, 1e9) < accelerators.network_seconds(
        cluster, 32, 1e9
    )
    assert accelerators.network_seconds(accelerators.topology("h100:1")[1], 1, 0) == 0


def test_without_libtpu_it_says_how_to_get_it():
    hide = "import sys; sys.modules['libtpu'] = None; import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda name, *a: None if name == 'libtpu' else f(name, *a); "
    words = ["plan", "--config=tests/tiny.py", "--topology=v5e:2x2", "--config.batch_size=16"]
    run = f"from lmim_jax.cli.__main__ import main; main({words!r})"
    done = subprocess.run(
        [sys.executable, "-c", hide + run], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "pip install libtpu" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="pip install libtpu to compile for TPUs"
)
def test_the_tool_compiles_for_a_topology_that_is_not_there(tmp_path, full):
    """[only with --faults] A tiny recipe for v5e:2x2, as users call it."""
    if not full:
        pytest.skip("a minute; ./launch/test.sh --faults")
    command = [
        sys.executable,
        "-m",
        "lmim_jax.cli",
        "plan",
        "--config=tests/tiny.py",
        "--topology=v5e:2x2",
    ]
    command += ["--config.batch_size=16", f"--json={tmp_path / 'plan.json'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["from"] == "compiler"
    assert {one["kind"] for one in found["collectives"]} == {"all-reduce"}
    params = jax.eval_shape(aot.Recipe.of(recipe("tiny", batch_size=16), 100).state).params
    moved = sum(one["size"] for one in found["collectives"])
    assert moved >= sum(leaf.size * 4 for leaf in jax.tree.leaves(params))


def test_collectives_are_read_from_the_text():
    text = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
}
%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}
%cond.1 (p: (s32[], f32[4])) -> pred[] {
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %g = (bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4,8]{1,0}) all-gather-start(%y), replica_groups={{0,1},{2,3}}
  %s = f32[2]{0} reduce-scatter(%z), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}, to_apply=%add
  %o = f32[] all-reduce(%q), replica_groups={{0}}, to_apply=%add
}
"""
    found = {
        (one.kind, one.group, one.shapes, one.size, one.times) for one in hlo.collectives(text)
    }
    assert found == {
        ("all-reduce", 4, ("f32[4]",), 16, 5),
        ("all-gather", 2, ("bf16[4,8]",), 64, 1),
        ("reduce-scatter", 4, ("f32[2]",), 32, 1),
    }


def test_too_little_memory_is_read_from_the_compiler_however_it_says_it():
    for message in (
        "Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded hbm capacity by 768.00M.",
        "the total memory required for HLO temporaries (16.50G) exceeds available HBM (15.75G). HLO module: jit_step.",
    ):
        assert aot.too_much(message) == {"needed": 16.5 * 2**30, "limit": 15.75 * 2**30}
    assert aot.too_much("INTERNAL: something else") is None
