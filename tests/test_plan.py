"""The planner: estimates for a recipe without its devices."""

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from lmim_jax.cli import plan
from lmim_jax.perf import accelerators, aot, hlo
from lmim_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = dict(
    compile=False, images=1_281_167, utilization=0.45, decode_rate=900.0, resize_rate=500.0
)


def recipe(name="lmim_jax.configs.vit_b", **change):
    config = importlib.import_module(name).get_config()
    config.update_from_flattened_dict(change)
    return config


@pytest.fixture(scope="module")
def planned():
    return plan.plan(recipe(), "h200:8", SETTINGS)


@pytest.mark.slow
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


def test_the_table_is_complete(planned):
    text = "\n".join(plan.table(planned))
    parts = (
        "h200:8: 8 chips on 1 host(s), mesh data 8 x fsdp 1",
        "fits",
        "66.4",
        "1 x all-reduce among 8",
        "chip-hours",
        "(the 75% of 141.00 GB that jax takes)",
        "3 batches ahead 1.21 GB",
        "512 images of the collapse metrics 0.04 GB",
        "collapse metrics of 512 images, and evaluation; of that, the search of neighbors 0.03 GB",
        "features of the training images 3.94 GB",
        "from the traced program, not compiled",
    )
    for part in parts:
        assert part in text


def test_what_stays_on_the_devices_is_counted(planned):
    memory = planned["memory"]
    assert memory["collapse_images"] == 512 * 224 * 224 * 3 * 4 / 8
    parts = ("arguments", "temporaries", "batches_ahead", "collapse_images")
    assert memory["needed"] == sum(memory[name] for name in parts)


def test_how_to_get_the_compiled_program_is_said(planned, monkeypatch):
    monkeypatch.setattr(aot, "compiles_for_gpu", lambda kind: False)
    assert "pip install '.[plan-gpu]'" in "\n".join(plan.table(planned))
    blackwell = "\n".join(plan.table({**planned, "topology": "b200:8"}))
    assert "b200 is not described" in blackwell


def test_memory_is_what_jax_leaves(monkeypatch):
    config = recipe(**{"batch_size": 8, "method.depth": 1, "method.decoder_depth": 1})
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.002")
    text = "\n".join(plan.table(plan.plan(config, "h100:1", SETTINGS)))
    assert "DOES NOT FIT" in text
    assert "it fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in text
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(UserError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=most must be a number"):
        plan.plan(config, "h100:1", SETTINGS)


def test_speeds_of_tiny_models_are_left_out():
    planned = plan.plan(recipe("tiny", batch_size=8), "h200:8", SETTINGS)
    text = "\n".join(plan.table(planned))
    assert "not estimated" in text
    assert "images/s" not in text


def parts_of(config, images=10**6):
    return aot.build_for_images(config, images)


def test_sharded_states_need_less_and_recomputation_is_counted():
    replicated = parts_of(recipe(**{"method.depth": 2}))
    sharded = parts_of(recipe(**{"method.depth": 2, "mesh.data": 1, "mesh.fsdp": 8}))
    whole = aot.analyze(replicated, 8)
    part = aot.analyze(sharded, 8)
    saved = whole.memory["arguments"] - part.memory["arguments"]
    state_bytes = sum(aot.state_bytes(replicated).values())
    assert saved == pytest.approx(7 / 8 * state_bytes, rel=0.02)  # all but norms and biases
    assert {one.kind for one in part.collectives} == {"all-gather", "reduce-scatter"}
    full = aot.flops_per_image(parts_of(recipe("tiny", remat="full"), images=100))
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
            "estimable": True,
        }

    monkeypatch.setattr(plan, "plan", plan_of)
    plans, best = plan.sweep(recipe(), "v5e:4x4", SETTINGS)
    assert len(plan.CHOICES) <= 6
    assert len(plans) == 5
    assert best["change"] == {"micro_batches": 2}


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4y4", "h300:8", "v5e:0x4", "2xh100:8", "0xv5e:4x4", ""]
)
def test_unknown_topologies_are_refused(name):
    with pytest.raises(UserError, match="must be one of: v5e:4x4"):
        accelerators.parse_topology(name)


@pytest.mark.parametrize(
    ("name", "chips", "hosts"),
    [
        ("v5e:4x4", 16, 4),
        ("v5p:2x2x4", 16, 4),
        ("v6e:8x8", 64, 16),
        ("2xv5e:4x4", 32, 8),
        ("h200:8", 8, 1),
        ("h100:8x4", 32, 4),
    ],
)
def test_known_topologies(name, chips, hosts):
    topology = accelerators.parse_topology(name)
    assert topology.chips == chips
    assert topology.hosts == hosts


@pytest.mark.parametrize(("one", "several"), [("h100:8", "h100:8x4"), ("v5e:4x4", "2xv5e:4x4")])
def test_communication_between_nodes_or_slices_takes_longer(one, several):
    inside = accelerators.network_seconds(accelerators.parse_topology(one), 1e9)
    assert inside < accelerators.network_seconds(accelerators.parse_topology(several), 1e9)
    assert accelerators.network_seconds(accelerators.parse_topology("h100:1"), 0) == 0


def test_without_libtpu_it_says_how_to_get_it():
    hide = "import sys; sys.modules['libtpu'] = None; import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda name, *a: None if name == 'libtpu' else f(name, *a); "
    words = ["plan", "--config=tests/tiny.py", "--topology=v5e:2x2", "--config.batch_size=16"]
    run = f"sys.argv = {['lmim'] + words!r}; from lmim_jax.cli.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide + run], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "pip install libtpu" in done.stderr.splitlines()[-1]


def test_the_file_may_be_in_a_new_folder(tmp_path, monkeypatch):
    path = tmp_path / "new" / "plan.json"
    config = recipe("tiny", batch_size=16)
    given = dict(config=config, topology="h200:1", sweep=False, json=str(path), **SETTINGS)
    flags = types.SimpleNamespace(FLAGS=types.SimpleNamespace(**given))
    monkeypatch.setattr(plan, "flags", flags)
    plan.main([])
    assert json.loads(path.read_text())["chips"] == 1


@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="pip install libtpu to compile for TPUs"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "flags", "mesh"),
    [
        ("v5e:2x2", [], {"data": 4, "fsdp": 1}),
        ("2xv5e:2x2", [], {"data": 8, "fsdp": 1}),
        ("2xv5e:2x2", ["--config.mesh.fsdp=4"], {"data": 2, "fsdp": 4}),
    ],
)
def test_the_tool_compiles_for_a_topology_that_is_not_there(topology, flags, mesh, tmp_path):
    command = [
        sys.executable,
        "-m",
        "lmim_jax.cli",
        "plan",
        "--config=tests/tiny.py",
        f"--topology={topology}",
        *flags,
    ]
    command += ["--config.batch_size=16", f"--json={tmp_path / 'plan.json'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["from"] == "compiler"
    assert found["mesh"] == mesh
    assert "all-reduce" in {one["kind"] for one in found["collectives"]}
    params = parts_of(recipe("tiny", batch_size=16), images=100).abstract_state().params
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
"""  # noqa: E501
    found = {
        (one.kind, one.group, one.shapes, one.size, one.times) for one in hlo.collectives(text)
    }
    assert found == {
        ("all-reduce", 4, ("f32[4]",), 16, 5),
        ("all-gather", 2, ("bf16[4,8]",), 64, 1),
        ("reduce-scatter", 4, ("f32[2]",), 32, 1),
    }


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 768.00M.",
        "the total memory required for HLO temporaries (16.50G) exceeds available HBM (15.75G). "
        "HLO module: jit_step.",
    ],
)
def test_out_of_memory_errors_of_the_compiler_are_read(message):
    sizes = aot.parse_out_of_memory(message)
    assert sizes == {"needed": 16.5 * 2**30, "limit": 15.75 * 2**30}


def test_other_errors_of_the_compiler_are_not_out_of_memory():
    assert aot.parse_out_of_memory("INTERNAL: something else") is None
