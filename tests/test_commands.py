"""Printed commands run as they are printed, and every flag that a message names exists."""

import ast
import contextlib
import functools
import html
import importlib
import io
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types

import conftest
import pytest
import tiny
from absl import flags
from flax.traverse_util import flatten_dict

from lmim_jax.cli import app, import_weights, study
from lmim_jax.cli.__main__ import COMMANDS, main
from lmim_jax.convert import model_card
from lmim_jax.distributed import multihost
from lmim_jax.report import config_diff, log_sections
from lmim_jax.train import metric_writer, provenance, summary
from lmim_jax.utils import array_memory, buckets, commands, recipes

PACKAGE = conftest.ROOT / "lmim_jax"
SUMMARY = {"steps": 8, "images_per_second": 200.0, "wall_seconds": 1.0}


@contextlib.contextmanager
def tool(name):
    """The flags of one command, {name: flag}, and its module; no others are defined meanwhile."""
    module = importlib.import_module(f"lmim_jax.cli.{COMMANDS[name][0]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flags.FLAGS.__dict__, "__flags", {})
        patch.setitem(flags.FLAGS.__dict__, "__flags_parsed", False)
        patch.setattr(app, "_OWN_FLAGS", {})
        yield app._define(module), module


def parse(command, monkeypatch):
    """Parse a printed command as `lmim` does: its name, and the positional arguments."""
    words = shlex.split(command, comments=True)
    name, arguments = arguments_of(words)
    with tool(name) as (_, module):
        monkeypatch.setattr(sys, "argv", [f"lmim {name}", *arguments])
        positional = app.parse_flags(app.choose_recipes(module, sys.argv), sys.argv)
        return name, positional[1:]


def arguments_of(words):
    """Name and arguments of a command, however its program is called."""
    if pathlib.Path(words[0]).name == "lmim":
        return words[1], words[2:]
    start = words.index(commands.PACKAGE) + 1
    return words[start], words[start + 1 :]


# How a command is called


def make_program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An interpreter in a folder that is not on PATH, with `lmim` beside it."""
    folder = tmp_path / "my env" / "bin"
    monkeypatch.setattr(sys, "executable", str(make_program(folder / "python")))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv(commands.CALLER_PATH, raising=False)
    make_program(folder / "lmim")
    return folder


def test_paths_are_quoted_for_the_shell():
    words = ["report", "--workdir=my run", "--out=it's; $HOME.html", "a*", "~"]
    parsed = shlex.split(commands.line(*words))
    assert parsed[-len(words) :] == words
    echoed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {commands.line(*words)}"], capture_output=True, text=True
    )
    assert echoed.stdout.splitlines()[-len(words) :] == words


def test_lmim_is_called_by_its_name_only_where_the_shell_finds_it(environment, monkeypatch):
    assert commands.line("report") == f"'{environment}/lmim' report"
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert commands.line("report") == "lmim report"
    # A launcher has activated an environment, and the shell that called it has not
    monkeypatch.setenv(commands.CALLER_PATH, "/usr/bin")
    assert commands.line("report") == f"'{environment}/lmim' report"
    monkeypatch.delenv(commands.CALLER_PATH)
    # Another one comes first
    other = make_program(environment.parent.parent / "other" / "lmim")
    monkeypatch.setenv("PATH", f"{other.parent}:{environment}")
    assert commands.line("report") == f"'{environment}/lmim' report"
    monkeypatch.setattr(sys, "argv", [str(other), "train"])
    assert commands.line("report") == "lmim report"


def test_without_lmim_the_interpreter_runs_the_package(environment, tmp_path):
    (environment / "lmim").unlink()
    words = shlex.split(commands.line("checkpoints", "--workdir=x"))
    program = [str(environment / "python"), "-m", "lmim_jax.cli"]
    assert words[-5:] == [*program, "checkpoints", "--workdir=x"]
    assert words[:-5] == ["env", f"PYTHONPATH={conftest.ROOT}"]


def test_names_that_are_not_utf_8_are_printed(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    main(["--version"])
    print("caf\udce9.png", flush=True)
    assert stream.buffer.getvalue().endswith(b"caf\\udce9.png\n")


def test_the_command_of_a_process_is_one_that_starts_it_again(environment, monkeypatch):
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    monkeypatch.setattr(sys, "argv", ["/any/main.py", "my photos"])
    assert commands.of_this_process() == "lmim train 'my photos'"
    monkeypatch.setattr(sys, "argv", ["/any/lmim_jax/cli/__main__.py", "train", "photos"])
    assert commands.of_this_process() == "lmim train photos"
    monkeypatch.setattr(sys, "argv", ["script.py", "a b"])
    assert commands.of_this_process() == "python script.py 'a b'"


def test_tensorboard_is_called_where_it_is(environment, tmp_path, monkeypatch):
    writer = metric_writer.MetricWriter(tmp_path / "my run", 0)
    monkeypatch.setattr(metric_writer.importlib.util, "find_spec", lambda name: None)
    folder = tmp_path / "my run" / "tensorboard"
    install = f"'{environment}/python' -m pip install tensorboard"
    show = f"'{environment}/tensorboard' '--logdir={folder}'"
    assert writer.board_command == f"{install} && {show}"
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert writer.board_command.startswith("python -m pip install tensorboard && tensorboard '--")
    make_program(environment / "tensorboard")
    monkeypatch.setattr(metric_writer.importlib.util, "find_spec", lambda name: "found")
    assert writer.board_command == f"tensorboard '--logdir={folder}'"


# Which commands are printed


PRINTED = re.compile(
    r"(?:cd .* && )?"
    r"(?:'[^']*/lmim'|[\w./-]*\blmim|env \S*PYTHONPATH=.* -m lmim_jax\.cli) [a-z-]+ .*"
)


def printed(text):
    """The commands of this package in a text, each of them a line or the end of one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [found[0] for found in map(PRINTED.search, lines) if found]


def test_commands_of_the_summary_and_the_page_are_of_their_tools(tmp_path, monkeypatch):
    run = tmp_path / "my run"
    monkeypatch.setattr(sys, "argv", ["lmim", "train", str(tmp_path), f"--workdir={run}"])
    starts = [provenance.describe()]
    extensions = [["--epochs=2000", "--schedule=continue"]]
    flags_of_run = ["--config=vit_b", "--config.seed=3"]
    match = config_diff.RecipeMatch("vit_b", {}, flags_of_run, extensions)
    of_page = log_sections._commands(buckets.path(run), starts, match)
    assert [command.rpartition("# ")[2] for command in of_page] == [
        "reproduce the training",
        "then its extension 1",
        "the original command",
        "check the weights",
        "this page",
    ]
    of_summary = printed(summary.format_summary(SUMMARY, run))
    assert len(of_summary) == len(summary.NEXT_STEPS)
    (of_card,) = printed(model_card.USAGE["safetensors"].format(method="mae"))
    of_card = of_card.replace("RECIPE", "mae_vit_b")
    names = set()
    for command in [*of_page, *of_summary, of_card]:
        folder, _, rest = command.rpartition(" && ")
        if folder:
            assert shlex.split(folder) == ["cd", str(pathlib.Path.cwd())]
        names.add(parse(rest, monkeypatch)[0])
    expected = {"train", "extend", "checkpoints", "report", "evaluate", "features", "pca"}
    assert names == expected | {"import-weights"}


def test_no_next_step_asks_for_a_large_batch(monkeypatch):
    for words in summary.NEXT_STEPS.values():
        if words[0] == "train" and len(words) > 2:
            (recipe,) = [word for word in words if word.startswith("--config=")]
            module = importlib.import_module(f"lmim_jax.configs.{recipe.partition('=')[2]}")
            assert module.get_config().batch_size <= 128
        elif words[0] == "train":
            assert words == ("train", "FOLDER")  # which chooses the batch


def test_what_follows_an_import_is_of_its_recipe(tmp_path, monkeypatch):
    run = tmp_path / "my run"
    given = ["--config=tests/tiny.py", "--config.batch_size=4", "--config.data.path=my photos"]
    given[0] = f"--config={conftest.ROOT / 'tests' / 'tiny.py'}"
    for data, names in (
        ("--data", ["features", "export", "train"]),
        ("--nodata", ["features", "export"]),
    ):
        with tool("import-weights") as (_, module):
            monkeypatch.setattr(sys, "argv", ["lmim", *given, f"--workdir={run}", data])
            app.parse_flags(module.RECIPES, sys.argv)
            steps = import_weights.next_steps()
        assert [step[0] for step in steps] == names
        for step in steps:
            parse(commands.line(*step), monkeypatch)
            assert f"--workdir={run}" in step
    with tool("train"):
        pass
    assert len(steps) == 2


def test_the_command_of_a_study_is_one_that_makes_it_again(monkeypatch):
    with tool("study") as (_, module):
        monkeypatch.setattr(
            sys, "argv", ["lmim", "--config=compare:cifar10", "--set=data.path=my images"]
        )
        app.parse_flags(module.RECIPES, sys.argv)
        command = study._command_line(flags.FLAGS)
        assert study._title(flags.FLAGS)
    words = arguments_of(shlex.split(command))[1]
    assert words[0].endswith("compare.py:cifar10")
    assert words[1] == "--set=data.path=my images"
    parse(command, monkeypatch)


# Flags that messages name

FLAG = re.compile(r"(?<![\w-])--(?:\[no\])?([a-z][\w.-]*)")
KEY = re.compile(r"(?<![\w./-])config\.([a-z_][\w.\0]*)")
OF_OTHERS = {  # programs, named beside each
    "config-file",  # detectron2
    "num-gpus",
    "local-dir",  # hf download
    "ntasks",  # srun
    "ntasks-per-node",
    "gpus-per-node",
    "gpus-per-task",
    "ulimit",  # docker run
    "shm-size",
    "recursive",  # gcloud storage
    "query-gpu",  # nvidia-smi
    "logdir",  # tensorboard
    "help",
    "helpshort",
    "version",
    "card-width",  # CSS
    "columns",
}
STYLES = "html.py"  # whose names begin in the same way


@functools.cache
def config_keys():
    """The keys of all recipes, joined by dots, and those that hold others."""
    keys = {"json"}  # config.json, a file
    for name in [*recipes.training_names(), "study", "evaluate"]:
        argument = ["latent_mim,shapes"] if name == "small" else []
        config = importlib.import_module(f"lmim_jax.configs.{name}").get_config(*argument)
        for path in flatten_dict(config.to_dict(), keep_empty_nodes=True):
            for end in range(1, len(path) + 1):
                keys.add(".".join(map(str, path[:end])))
    return keys


@functools.cache
def flags_of(name):
    with tool(name) as (own, module):
        return frozenset(own), frozenset(module.RECIPES)


def texts(path):
    """(line, text) of the strings of a module; what is filled into them is a NUL character.

    Without docstrings, which can name what other tools have and what a section is called in code.
    """
    tree = ast.parse(path.read_text())
    parts = set()  # of formatted strings, which come before them
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            parts.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            pieces = [getattr(part, "value", "") for part in node.values]
            yield node.lineno, "".join(p if isinstance(p, str) else "\0" for p in pieces)
        elif id(node) in parts:
            continue
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def exists(flag, name):
    """Whether a tool has a flag; of a config, whether any recipe has the key."""
    own, configs = flags_of(name)
    flag = flag.rstrip(".")
    holder, dot, key = flag.partition(".")
    if not dot:
        return flag in own or (flag.startswith("no") and flag[2:] in own)
    if holder not in configs:
        return False
    return f"{holder}.{key}" in config_keys() or key in config_keys() or key.isupper()


def tools_of(line, path):
    """The tools whose flags a line of a text names: that of a module of cli, and others by name."""
    own = [name for name, (module, _) in COMMANDS.items() if path.name == f"{module}.py"]
    if path.parent.name != "cli" or not own or " " not in line:  # or a word of any command
        return list(COMMANDS)
    return own + [name for name in re.findall(r"\blmim ([a-z-]+)", line) if name in COMMANDS]


def wrong_names(path):
    found = []
    for number, text in texts(path):
        for line in text.splitlines():
            for flag in FLAG.findall(line):
                flag = flag.rstrip(".-")
                if flag in OF_OTHERS or flag.startswith("xla_"):
                    continue
                if not any(exists(flag, name) for name in tools_of(line, path)):
                    found.append(f"{path.name}:{number}: --{flag}")
            for key in KEY.findall(line):
                known = key.partition("\0")[0].rstrip(".")
                if "\0" in key and not key.partition("\0")[0].endswith("."):
                    known = known.rpartition(".")[0]
                if known == "py":  # a file
                    continue
                if known and known not in config_keys():
                    found.append(f"{path.name}:{number}: config.{known}")
    return found


def test_every_flag_and_key_that_is_named_exists():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != STYLES and not path.is_relative_to(PACKAGE / "configs"):
            found += wrong_names(path)
    assert found == []


def test_wrong_names_are_found(tmp_path):
    path = tmp_path / "cli" / "report.py"
    path.parent.mkdir()
    path.write_text(
        'f"--workdir=RUN --pth={x}, config.data.pth, config.mesh.{x}"\nx = "no --seed"\n'
    )
    assert wrong_names(path) == [
        "report.py:1: --pth",
        "report.py:1: config.data.pth",
        "report.py:2: --seed",
    ]


@pytest.mark.parametrize(
    ("name", "message", "expected"),
    [
        ("train", "config.data.path='x' is not a folder", "config.data.path='x' is not a folder"),
        ("evaluate", "config.data.path='x' is not one", "--data.path='x' is not one"),
        ("evaluate", "see --config.data.classes", "see --data.classes"),
        ("evaluate", "config.knn.k=0; myconfig.data.x", "config.knn.k=0; myconfig.data.x"),
        ("report", "config.data.path='x' is not one", "--path='x' is not one"),
        ("prepare", "config.data.path='x' is not one", "--folder='x' is not one"),
    ],
)
def test_messages_name_the_flag_of_the_tool(name, message, expected):
    module = importlib.import_module(f"lmim_jax.cli.{COMMANDS[name][0]}")
    assert app.with_own_flags(module, message) == expected
    with tool(name) as (own, _):
        for option, flag in getattr(module, "FLAGS_OF_OPTIONS", {}).items():
            assert flag.strip("-").partition(".")[0] in own
            assert option.rstrip(".") in config_keys()


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ("photos", "own"),
        ("--config.deterministic photos", "own"),
        ("--noconfig.report photos", "own"),
        ("--config.batch_size 8 photos", "own"),
        ("--extend photos", "own"),
        ("-- photos", "own"),
        ("-- -photos", "own"),
        ("", "quickstart"),
        ("--", "quickstart"),
        ("--config.batch_size 8 --hours 1", "quickstart"),
        ("--config.nothing photos", "quickstart"),
    ],
)
def test_a_folder_of_images_is_found_among_the_arguments(arguments, recipe):
    with tool("train") as (_, module):
        chosen = app.choose_recipes(module, ["lmim train", *arguments.split()])
    assert chosen == {"config": recipe}


def test_a_mistake_in_the_code_of_a_recipe_is_not_one_in_a_flag(tmp_path, monkeypatch):
    """Not even if a flag names the same key."""
    path = tmp_path / "mine.py"
    for code in ("def get_config():\n    return {}['epochs']", "{}['epochs']"):
        path.write_text(code)
        with pytest.raises(KeyError, match="epochs"):
            parse(f"lmim train --config={path} --config.epochs=3", monkeypatch)


def test_examples_in_the_help_are_of_their_tools():
    for name, (module_name, _) in COMMANDS.items():
        text = importlib.import_module(f"lmim_jax.cli.{module_name}").__doc__
        found = printed(text.partition("\n")[2])
        assert found, f"lmim {name} --help shows no example"
        for command in found:
            called = command.split()[1]
            for flag in FLAG.findall(command):
                assert exists(flag.rstrip(".-"), called), command


# Every printed command, typed

SHORT = tiny.CHOSEN


def options(values):
    return [f"--config.{key}={value}" for key, value in values.items()]


class Shell:
    """Types commands in a folder with a space in its name."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            **os.environ,
            "XLA_FLAGS": f"{conftest.FAST} --xla_force_host_platform_device_count=1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self.environment.pop("PYTHONPATH", None)

    def type(self, command, folder=None):
        """Its output; it must succeed."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder or self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
        return done.stdout

    def show_board(self, command):
        """Start TensorBoard as printed, until it says where it listens."""
        board = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port=0"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            text = ""
            for line in board.stdout:
                text += line
                if "http://" in line:
                    return
            raise AssertionError(f"{command}\n{text}")
        finally:
            board.send_signal(signal.SIGTERM)
            board.wait()


@pytest.fixture
def shell(tmp_path, images):
    folder = tmp_path / "my folder"
    folder.mkdir()
    shutil.copytree(images, folder / "my photos")
    return Shell(folder)


def first_line():
    """How this test calls the package before it has printed anything."""
    return shlex.join(["env", f"PYTHONPATH={conftest.ROOT}", sys.executable, "-m", "lmim_jax.cli"])


@pytest.mark.slow
def test_every_command_of_a_first_run_runs_as_printed(shell):
    given = ["train", "my photos", *options(SHORT | {"report": True}), "--workdir=my run"]
    log = shell.type(f"{first_line()} {shlex.join(given)}")
    of_log = printed(log)
    assert len(of_log) == len(summary.NEXT_STEPS), log
    for command in of_log:
        words = arguments_of(shlex.split(command))[0]
        if words == "train":
            command += " " + shlex.join(options(SHORT | {"report": False}))
        shell.type(command.replace("FOLDER", "'my photos'"))
    for name in (
        "features.npz",
        "pca.html",
        "runs/my photos",
        "runs/collapse",
        "my run/report.html",
    ):
        assert (shell.folder / name).exists(), name
    page = (shell.folder / "my run" / "report.html").read_text()
    blocks = re.findall(r"<pre\b.*?</pre>", page, re.DOTALL)
    (code,) = [block for block in blocks if "check the weights" in block]
    of_page = printed(html.unescape(re.sub(r"<[^>]+>", "", code)))
    assert len(of_page) == 4
    for command in of_page:
        shell.type(command, folder="/")
    again = shell.folder / "my run_again"
    mine = (shell.folder / "my run" / "config.json").read_text()
    assert (again / "config.json").read_text() == mine
    (board,) = re.findall(r"curves: (.*)", log)
    if importlib.util.find_spec("tensorboard"):
        shell.show_board(board)
    else:
        install, _, show = board.partition(" && ")
        shell.type(install.replace("install tensorboard", "--version"))
        assert pathlib.Path(shlex.split(show)[0]).name == "tensorboard"


@pytest.mark.slow
def test_commands_of_an_import_and_of_its_card_run_as_printed(shell):
    recipe = shell.folder / "my recipe.py"
    recipe.write_text(
        f"import sys\n\nsys.path.insert(0, {str(pathlib.Path(tiny.__file__).parent)!r})\n"
        "import tiny\n\n\ndef get_config():\n    config = tiny.get_config()\n"
        "    config.method = tiny.method('mae')\n"
        f"    config.data.path = {str(shell.folder / 'my photos')!r}\n    return config\n"
    )
    config = tiny.get_config()
    config.method = tiny.method("mae")
    tiny.run(config, shell.folder / "my run")
    given = ["export", "--workdir=my run", "--format=safetensors", "--out=my card"]
    shell.type(f"{first_line()} {shlex.join(given)}")
    card = (shell.folder / "my card" / "README.md").read_text()
    (command,) = printed(card)
    command = command.replace("RECIPE", "'../my recipe.py'").replace("RUN", "'../my import'")
    command = command.replace("lmim ", f"{first_line()} ", 1)  # where it is not on PATH
    for data in ("", " --data --config.total_steps=2"):
        folder = "../my import"
        text = shell.type(
            command.replace(folder, folder + data[:6].strip()) + data, shell.folder / "my card"
        )
        of_import = printed(text)
        assert len(of_import) == (3 if data else 2)
        for follows in of_import:
            follows = follows.replace("FOLDER", "'../my photos'").replace("DIR", f"out{data[:6]!r}")
            shell.type(follows, shell.folder / "my card")


@pytest.mark.slow
def test_the_command_of_a_prepared_dataset_trains(shell):
    given = ["prepare", "--folder=my photos", "--out=my data", "--name=photos", "--processes=1"]
    (command,) = printed(shell.type(f"{first_line()} {shlex.join(given)}"))
    shell.type(f"{command} {shlex.join(options(SHORT | {'report': False}))}")


FAULTS = """
import resource
import numpy as np
from lmim_jax.utils import array_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 25, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = array_memory.keep_freed()
pages()
print(kept, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("tunables", [None, "glibc.malloc.check=0"])
def test_freed_memory_is_kept_unless_the_user_decides(tunables):
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    if tunables:
        environment["GLIBC_TUNABLES"] = tunables
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(
        command, cwd=conftest.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    assert kept == str(not tunables)
    if not tunables:
        assert int(faults) < 100  # of 8,192 pages


@pytest.mark.parametrize("gpus", [0, 1])
def test_memory_is_kept_on_cpus_only(gpus, monkeypatch):
    monkeypatch.setattr(multihost, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(multihost, "visible_tpu_chips", lambda: 0)
    calls = []
    monkeypatch.setattr(array_memory, "keep_freed", lambda: calls.append(1))
    app.keep_freed_memory()
    assert len(calls) == 1 - gpus


@pytest.mark.parametrize("name", ["train", "evaluate", "supervised_baseline", "bench"])
def test_commands_that_compute_keep_memory(name, monkeypatch):
    class Kept(Exception):
        """Ends the command."""

    def keep():
        raise Kept

    monkeypatch.setattr(app, "keep_freed_memory", keep)
    module = importlib.import_module(f"lmim_jax.cli.{name}")
    given = types.SimpleNamespace(compare=None, what="step", profile=None, config=None)
    monkeypatch.setattr(flags, "FLAGS", given)
    call = {
        "train": lambda: module.run(None, ""),
        "bench": lambda: module.bench_devices(given),
    }.get(name, lambda: module.main([]))
    with pytest.raises(Kept):
        call()
