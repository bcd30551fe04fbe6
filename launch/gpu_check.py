"""The order of a GPU check: what runs side by side, what alone; results, table. See gpu_check.sh.

Programs take one to two minutes to compile, on a few cores each, and seconds to run. So everything
that is not timed runs side by side: parity, resumed runs, and the compilation of programs, each in
a process of its own. These wait then, and use the GPU one after the other. To choose kernels, a
process that compiles takes several GB of the GPU's memory, and keeps them; so only a few live at a
time, in rounds.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
TINY = bool(os.environ.get("GPU_CHECK_TINY"))
CASES = (  # of tests/reference
    "latent_mim_infonce",
    "latent_mim_norm_l2",
    "latent_mim_simreg",
    "pilamim",
    "mae",
    "ijepa",
    "capi",
    "data2vec2",
)
BATCH_SIZES = (256, 512, 1024, 2048)
# What differs from the defaults, attention=auto (this package's kernels) and xla_flags=auto
VARIANTS = {
    "default": (),
    "cudnn_attention": ("method.attention=cudnn",),
    "plain_attention": ("method.attention=xla",),
    "no_xla_flags": ("xla_flags=none",),
    "deterministic": ("deterministic=true",),
}
# The training loop with its input, which is cropped on the GPU and decoded in processes by default
LOOPS = {
    "default": (),
    "decoded_in_threads": ("data.workers=0",),
    "cropped_on_the_host": ("data.resize_on=host",),
}
# The same images with short sides of 256 pixels, as lmim prepare --shrink=256 writes them
PREPARED = ("data.source=tfds", "data.canvas=384")
# Flags of XLA, each added to those of a run, whose own values it replaces
FLAGS = {
    "triton_products": "--xla_gpu_enable_triton_gemm=true",
    "no_cuda_graphs": "--xla_gpu_enable_command_buffer=",
    "latency_hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "cublaslt": "--xla_gpu_enable_cublaslt=true",
    "cudnn_layer_norm": "--xla_gpu_enable_cudnn_layer_norm=true",
    "fusion_autotuner": "--xla_gpu_experimental_enable_fusion_autotuner=true",
    "block_level_fusions": "--xla_gpu_experimental_enable_fusion_block_level_rewriter=true",
    "triton_several_outputs": "--xla_gpu_unsupported_enable_triton_multi_output_fusion=true",
    "triton_fusions": "--xla_gpu_experimental_all_fusions_with_triton=true",
}
COMPILE_SHARE = 0.65  # of the time limit, after which what is compiled is timed
SLOTS = 8  # processes at a time at most: each may take 10 GB of the GPU's memory
RESERVE = 5.0  # seconds that a part needs at least

Result = dict[str, Any]


class Part(NamedTuple):
    """A part of the check: a process that prints its result as a line of JSON.

    Attributes:
      name: with a slash after the kind: "step/256_default".
      arguments: of gpu_measure.py.
      mode: "alone" on the GPU; "beside" others; "compile": compiles beside others, then runs alone.
      after: the name of a part whose files it needs; "": none.
      environment: added to the process's.
    """

    name: str
    arguments: tuple[str, ...]
    mode: str
    after: str = ""
    environment: tuple[tuple[str, str], ...] = ()


def all_parts() -> list[Part]:
    """The parts, the most important first."""
    platform = "cpu" if TINY else "cuda"
    exact = (
        ("LMIM_TEST_PLATFORM", platform),
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest"),
    )
    parts = [Part("device", ("device",), "alone"), Part("images/shapes", ("shapes",), "beside")]
    for case in CASES:
        parts.append(Part(f"parity/{case}", ("parity", case), "beside", environment=exact))
    parts.append(_resume("pinned"))
    parts.append(_resume("deterministic", "deterministic=true"))
    fused = "auto" if TINY else "cudnn"  # which a CPU does not have
    parts.append(_resume("bfloat16", "method.dtype=bfloat16"))
    parts.append(_resume("cudnn", "method.dtype=bfloat16", f"method.attention={fused}"))
    for variant, changes in VARIANTS.items():
        parts.append(_step(256, variant, changes))
    for size in BATCH_SIZES[1:]:
        parts.append(_step(size, "default", ()))
    for name, changes in LOOPS.items():
        arguments = ("loop", "batch_size=256", *changes)
        parts.append(Part(f"loop/256_{name}", arguments, "compile", "images/jpeg"))
    prepared = ("loop", "batch_size=256", *PREPARED)
    parts.append(Part("loop/256_prepared", prepared, "compile", "images/prepared"))
    parts.insert(2, Part("images/jpeg", ("jpeg",), "beside"))
    parts.insert(3, Part("images/prepared", ("prepared",), "beside", "images/jpeg"))
    # Kernels in CUDA graphs do not say in a trace which operation they belong to
    no_graphs = (("XLA_FLAGS", "--xla_gpu_enable_command_buffer="),)
    profile = ("profile", "batch_size=256")
    parts.append(Part("profile/256", profile, "compile", environment=no_graphs))
    for size in BATCH_SIZES[1:3]:
        for variant, changes in list(VARIANTS.items())[1:]:
            parts.append(_step(size, variant, changes))
    for size in BATCH_SIZES:
        parts.append(Part(f"torch/{size}", ("torch", str(size)), "alone"))
    parts.append(Part("transfer", ("transfer",), "alone"))
    parts.append(Part("attention", ("attention",), "alone"))
    for name, flag in FLAGS.items():
        parts.append(Part(f"flags/{name}", ("flags", flag, "batch_size=256"), "compile"))
    return parts


def _resume(name: str, *changes: str) -> Part:
    return Part(f"resume/{name}", ("resume", name, *changes), "beside", after="images/shapes")


def _step(batch_size: int, variant: str, changes: tuple[str, ...]) -> Part:
    if TINY:  # a CPU does not have the kernel
        changes = tuple(change for change in changes if change != "method.attention=cudnn")
    arguments = ("step", f"batch_size={batch_size}", *changes)
    return Part(f"step/{batch_size}_{variant}", arguments, "compile")


class Check:
    """Runs parts within a time limit and keeps their results.

    Attributes:
      out: the folder of the results.
      ends: the time (of time.monotonic) at which everything ends.
      began: the time at which it began.
    """

    def __init__(self, out: pathlib.Path, limit: float) -> None:
        """Read the results of earlier calls.

        Args:
          out: the folder of the results.
          limit: seconds for everything.
        """
        self.out = out
        self.began = time.monotonic()
        self.ends = self.began + limit
        (out / "logs").mkdir(parents=True, exist_ok=True)
        (out / "signals").mkdir(exist_ok=True)
        self._processes: dict[str, subprocess.Popen] = {}
        self._starts: dict[str, float] = {}

    def done(self) -> dict[str, Result]:
        """The newest result of every part that has succeeded, by name."""
        return {name: result for name, result in read_results(self.out).items() if result["ok"]}

    def run(self, parts: Sequence[Part], slots: int) -> None:
        """Run parts, as far as the time allows.

        Args:
          parts: in the order of their importance.
          slots: how many processes may live side by side.
        """
        for part in parts:
            if part.name == "device":
                self._run_alone(part)
        until = self.began + COMPILE_SHARE * (self.ends - self.began)
        queue = [part for part in parts if part.mode != "alone"]
        alone = [part for part in parts if part.mode == "alone" and part.name != "device"]
        while queue and time.monotonic() < until:
            self._run_beside(queue, slots, until)
            for part in parts:
                if part.mode == "compile" and self._is_waiting(part.name):
                    self._signal(part.name, "go").touch()
                    self._wait(part.name)
            while alone:
                self._run_alone(alone.pop(0))
        for part in alone:
            self._run_alone(part)

    def stop(self) -> None:
        """End all processes that still run."""
        for name in list(self._processes):
            self._stop(name)

    def _run_beside(self, queue: list[Part], slots: int, until: float) -> None:
        """Run parts side by side until each has ended or waits for the GPU, or the time is up.

        Args:
          queue: the parts; those that are started are removed.
          slots: how many processes may live.
          until: the time (of time.monotonic) at which those that still work are ended.
        """
        while time.monotonic() < until:
            for name in list(self._processes):
                if self._processes[name].poll() is not None:
                    self._record(name)
            working = [name for name in self._processes if not self._is_waiting(name)]
            ready = [part for part in queue if not part.after or self._has_files(part, queue)]
            if ready and len(self._processes) < slots:
                queue.remove(ready[0])
                self._start(ready[0])
            elif working:
                time.sleep(0.1)
            else:
                break
        for name in list(self._processes):
            if not self._is_waiting(name):
                self._stop(name)

    def _has_files(self, part: Part, queue: Sequence[Part]) -> bool:
        """Whether the part that it comes after has ended, in this call or an earlier one."""
        waiting = [other.name for other in queue] + list(self._processes)
        return part.after not in waiting

    def _run_alone(self, part: Part) -> None:
        if self.ends - time.monotonic() > RESERVE:
            self._start(part)
            self._wait(part.name)

    def _start(self, part: Part) -> None:
        for kind in ("ready", "go"):
            self._signal(part.name, kind).unlink(missing_ok=True)
        environment = dict(os.environ)
        environment.update(part.environment)
        environment["GPU_CHECK_SIGNALS"] = str(self._signal(part.name, ""))
        with (
            self._log(part.name, "err").open("w") as log,
            self._log(part.name, "out").open("w") as output,
        ):
            self._processes[part.name] = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_measure.py"), *part.arguments],
                stdout=output,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._starts[part.name] = time.monotonic()

    def _wait(self, name: str) -> None:
        """Wait until a process ends, within the time limit."""
        try:
            self._processes[name].wait(max(self.ends - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self._stop(name)
        else:
            self._record(name)

    def _stop(self, name: str) -> None:
        """End a process that takes too long, and its children; it has no result."""
        process = self._processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._tell(name, "not finished in time")

    def _record(self, name: str) -> None:
        """Append the result of a process that has ended."""
        process = self._processes.pop(name)
        output = self._log(name, "out").read_text().strip()
        result: Result = {"part": name, "ok": process.returncode == 0}
        result["seconds"] = round(time.monotonic() - self._starts[name], 1)
        if result["ok"]:
            result |= json.loads(output.splitlines()[-1])
        else:
            lines = self._log(name, "err").read_text().strip().splitlines()
            result["error"] = f"exit code {process.returncode}: {''.join(lines[-1:])}"[:500]
        with results_file(self.out).open("a") as file:
            file.write(json.dumps(result) + "\n")
        self._tell(name, "done" if result["ok"] else result["error"])

    def _tell(self, name: str, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {name}: {text}", flush=True)

    def _is_waiting(self, name: str) -> bool:
        """Whether a process is compiled and waits for the GPU."""
        process = self._processes.get(name)
        return (
            process is not None and process.poll() is None and self._signal(name, "ready").exists()
        )

    def _signal(self, name: str, kind: str) -> pathlib.Path:
        return self.out / "signals" / f"{name.replace('/', '_')}.{kind}"

    def _log(self, name: str, kind: str) -> pathlib.Path:
        return self.out / "logs" / f"{name.replace('/', '_')}.{kind}"


def results_file(out: pathlib.Path) -> pathlib.Path:
    """The file of results, a line of JSON each."""
    return out / "results.jsonl"


def read_results(out: pathlib.Path) -> dict[str, Result]:
    """The newest result of every part, by name; a success counts more than a later failure."""
    results: dict[str, Result] = {}
    if results_file(out).exists():
        for line in results_file(out).read_text().splitlines():
            result = json.loads(line)
            if result["ok"] or not results.get(result["part"], result)["ok"]:
                results[result["part"]] = result
    return results


def table(results: dict[str, Result]) -> list[str]:
    """The results as lines of text, in the order of `all_parts`."""
    lines = []
    for part in all_parts():
        result = results.get(part.name)
        if result is None:
            lines.append(f"{part.name:<28} not run")
        elif not result["ok"]:
            lines.append(f"{part.name:<28} FAILED: {result['error']}")
        else:
            kind = part.name.partition("/")[0]
            lines.append(f"{part.name:<28} {_describe(kind, result)}")
            for row in result.get("rows", []):
                lines.append(f"{'':<30} {_join(row)}")
    return lines


def _describe(kind: str, result: Result) -> str:
    """A result in one line."""
    if kind in ("step", "profile", "loop", "flags") and "milliseconds" in result:
        utilization = "not known"
        if result["mfu"]:
            utilization = f"{result['mfu']:.1%}"
        memory = (result["peak_memory"] or 0) / 1e9
        text = (
            f"{result['milliseconds']:8.1f} ms {result['images_per_second']:9.1f} images/s, "
            f"MFU {utilization}, peak memory {memory:.1f} GB, "
            f"compiled in {result['compile_seconds']:.0f} s"
        )
        if kind == "loop":
            text += f"; with input {result['loop_images_per_second']:.1f} images/s, "
            text += f"{result['ratio']:.3f} of it; input by itself "
            text += f"{result['input_images_per_second']:.1f} images/s"
        return text
    hidden = ("part", "ok", "seconds", "rows")
    return _join({key: value for key, value in result.items() if key not in hidden})


def _join(values: Result) -> str:
    """Names and values in one line, numbers with four digits."""
    texts = []
    for key, value in values.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        texts.append(f"{key} {value}")
    return ", ".join(texts)


def select(parts: Sequence[Part], only: str, done: Sequence[str]) -> list[Part]:
    """The parts to run.

    Args:
      parts: all of them.
      only: beginnings of names, with commas; "": all parts.
      done: names of those that have succeeded. Files of earlier calls are still there.
    """
    wanted = []
    for part in parts:
        if not only or part.name.startswith(tuple(only.split(","))):
            wanted.append(part.name)
    needed = [part.after for part in parts if part.name in wanted and part.name not in done]
    return [part for part in parts if part.name in [*wanted, *needed] and part.name not in done]


def _exit(number: int, frame: Any) -> None:
    """Exit on a signal in such a way that the processes are ended first."""
    sys.exit(128 + number)


def main() -> None:
    """Run the check, and print its table."""
    out = pathlib.Path(os.environ.get("OUT", "runs/gpu_check")).absolute()
    os.environ["OUT"] = str(out)
    signal.signal(signal.SIGTERM, _exit)
    check = Check(out, float(os.environ.get("LIMIT", "470")))
    slots = int(os.environ.get("SLOTS") or min(len(os.sched_getaffinity(0)), SLOTS))
    parts = select(all_parts(), os.environ.get("ONLY", ""), list(check.done()))
    try:
        check.run(parts, slots)
    finally:
        check.stop()
    results = read_results(out)
    lines = table(results)
    (out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    missing = [part.name for part in parts if part.name not in results]
    failed = [part.name for part in parts if part.name not in check.done()]
    print(f"results: {results_file(out)}")
    if missing:
        print(f"run it again for {len(missing)} parts that did not fit into the time")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
