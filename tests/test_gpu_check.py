"""launch/gpu_check.sh: the order of its parts, results, a second call; and all of it, tiny."""

import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import conftest
import pytest

ROOT = pathlib.Path(__file__).parent.parent
# In place of gpu_measure.py: notes when it works, and uses the "GPU" for a moment
MEASURE = """
import json, os, pathlib, sys, time
kind, name, *rest = sys.argv[1:]
born = time.monotonic()
prefix = os.environ["GPU_CHECK_SIGNALS"]
if kind == "compile":
    pathlib.Path(prefix + "ready").touch()
    while not pathlib.Path(prefix + "go").exists():
        time.sleep(0.01)
if kind == "hang":
    time.sleep(100)
began = time.monotonic()
time.sleep(0.05)
if kind == "fail":
    sys.exit("it broke")
print("noise")
print(json.dumps({"born": born, "span": [began, time.monotonic()]}))
"""


@pytest.fixture
def check(monkeypatch, tmp_path):
    """The module, with parts that do nothing."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "launch" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "gpu_measure.py").write_text(MEASURE)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_parts_have_names_of_their_own_and_the_most_important_come_first(check):
    parts = check.all_parts()
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[0] == "device"
    kinds = list(dict.fromkeys(name.partition("/")[0] for name in names))
    assert kinds.index("parity") < kinds.index("resume") < kinds.index("step")
    for part in parts:
        assert part.after in ("", *names[: names.index(part.name)])
        assert part.mode in ("alone", "beside", "compile")


def test_only_some_parts_and_what_they_need(check):
    parts = check.all_parts()
    chosen = check.select(parts, "resume/pinned,torch", done=["torch/256"])
    assert [part.name for part in chosen] == [
        "images/shapes",
        "resume/pinned",
        "torch/512",
        "torch/1024",
        "torch/2048",
    ]
    chosen = check.select(parts, "resume/pinned", done=["images/shapes"])
    assert [part.name for part in chosen] == ["resume/pinned"]
    assert check.select(parts, "", [part.name for part in parts]) == []


def test_timed_parts_follow_one_another_and_results_are_kept(check, tmp_path):
    parts = [
        check.Part("device", ("alone", "0"), "alone"),
        check.Part("a", ("beside", "a"), "beside"),
        check.Part("b", ("fail", "b"), "beside", after="a"),
        check.Part("c", ("compile", "c"), "compile"),
        check.Part("d", ("compile", "d"), "compile"),
        check.Part("e", ("alone", "e"), "alone"),
    ]
    first = check.Check(tmp_path, limit=60)
    first.run(parts, slots=1)
    results = check.read_results(tmp_path)
    assert set(results) == {"device", "a", "b", "c", "d", "e"}
    assert results["b"]["error"] == "exit code 1: it broke"
    assert set(first.done()) == {"device", "a", "c", "d", "e"}
    timed = sorted(results[name]["span"] for name in ("device", "c", "d", "e"))
    for (_, end), (start, _) in itertools.pairwise(timed):
        assert end < start
    # A second call repeats what has failed
    again = check.select(parts, "", list(first.done()))
    assert [part.name for part in again] == ["b"]


def test_few_processes_live_at_a_time_and_parts_follow_in_rounds(check, tmp_path):
    parts = [check.Part(name, ("compile", name), "compile") for name in "abc"]
    parts.insert(1, check.Part("alone", ("alone", "alone"), "alone"))
    check.Check(tmp_path, limit=60).run(parts, slots=2)
    results = check.read_results(tmp_path)
    order = sorted(results, key=lambda name: results[name]["span"][0])
    assert order == ["a", "b", "alone", "c"]
    assert results["c"]["born"] > results["b"]["span"][1]


def test_what_does_not_fit_into_the_time_is_stopped_and_has_no_result(check, tmp_path, capsys):
    parts = [
        check.Part("long", ("hang", "long"), "beside"),
        check.Part("quick", ("compile", "quick"), "compile"),
        check.Part("late", ("hang", "late"), "alone"),
    ]
    hurried = check.Check(tmp_path, limit=check.RESERVE + 3)
    hurried.run(parts, slots=2)
    hurried.stop()
    assert set(check.read_results(tmp_path)) == {"quick"}
    assert "long: not finished in time" in capsys.readouterr().out


def test_a_success_counts_more_than_a_later_failure(check, tmp_path):
    lines = [{"part": "device", "ok": ok, "error": "lost", "n": n} for n, ok in enumerate((1, 0))]
    check.results_file(tmp_path).write_text("\n".join(map(json.dumps, lines)))
    assert check.read_results(tmp_path)["device"]["n"] == 0
    text = "\n".join(check.table(check.read_results(tmp_path)))
    assert "n 0" in text
    assert "not run" in text


def run_tiny(out, **variables):
    """gpu_check.sh on the CPU, with small sizes: (the process, its results)."""
    environment = {
        **os.environ,
        "OUT": str(out),
        "PYTHON": sys.executable,
        "NO_INSTALL": "1",
        "GPU_CHECK_TINY": "1",
        "XLA_FLAGS": conftest.FAST,
        **variables,
    }
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "gpu_check.sh")],
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = (out / "results.jsonl").read_text().splitlines()
    return done, {result["part"]: result for result in map(json.loads, lines)}


@pytest.mark.slow
def test_a_step_is_measured(tmp_path):
    done, results = run_tiny(tmp_path, ONLY="step/256_default")
    assert done.returncode == 0, done.stdout
    assert list(results) == ["step/256_default"]
    assert results["step/256_default"]["milliseconds"] > 0
    assert "images/s" in (tmp_path / "table.txt").read_text()


@pytest.mark.slow
def test_all_of_it(tmp_path):
    done, results = run_tiny(tmp_path, LIMIT="1200")
    assert "not run" not in (tmp_path / "table.txt").read_text()
    failed = [name for name, result in results.items() if not result["ok"]]
    if importlib.util.find_spec("torch") is None:
        failed = [name for name in failed if not name.startswith("torch")]
    assert not failed, done.stdout
    assert results["resume/pinned"]["equal"]
    assert results["parity/mae"]["passed"] == 3
    assert len(results["profile/256"]["rows"]) == 10
