"""The command `lmim COMMAND [flags]`, which imports only the module of the chosen command."""

import importlib
import io
import sys
from collections.abc import Sequence

import lmim_jax
from lmim_jax.utils.errors import did_you_mean, fail

# Command -> (module in lmim_jax.cli, what it does)
COMMANDS = {
    "train": ("train", "Pretrain an encoder with a recipe, or resume a run."),
    "extend": ("extend", "Train a run for more epochs than it had."),
    "evaluate": (
        "evaluate",
        "Evaluate the frozen features of a run: k-NN, probes, fine-tuning, ...",
    ),
    "predict": ("predict", "Classify a folder of images with a probe or a fine-tuned encoder."),
    "features": ("extract_features", "Write the features of a folder of images to a file."),
    "pca": ("pca", "Show the features of a folder of images as a page."),
    "report": ("report", "Write an HTML report of a run."),
    "export": ("export", "Export an encoder for timm, Hugging Face, Flax or PyTorch."),
    "import-weights": ("import_weights", "Make a run of an official PyTorch checkpoint."),
    "prepare": ("prepare_data", "Prepare a dataset in ArrayRecord files."),
    "plan": (
        "plan",
        "Estimate memory, speed and hours on a TPU slice or GPUs that are not at hand.",
    ),
    "bench": ("bench", "Benchmark the train step, the input pipeline or checkpoints."),
    "study": ("study", "Train variants of a recipe over several seeds and compare them."),
    "supervised-baseline": (
        "supervised_baseline",
        "Train the encoder with labels, as an upper bound.",
    ),
    "checkpoints": ("checkpoints", "List and verify the checkpoints of a run."),
}


def overview() -> str:
    """The text of `lmim --help`."""
    lines = ["Usage: lmim COMMAND [flags]", "", "Latent Masked Image Modeling in JAX.", ""]
    for name, (_, summary) in COMMANDS.items():
        lines.append(f"  {name:<20} {summary}")
    lines.append("")
    lines.append(
        "lmim COMMAND --help explains the flags of a command; lmim --version prints the version."
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
      arguments: the command and its flags; None: those of the command line.
    """
    # Names of files may not be UTF-8
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("--help", "-h", "help"):
        print(overview())
        return
    if given[0] == "--version":
        print(f"lmim_jax {lmim_jax.__version__}")
        return
    name = given[0]
    if name not in COMMANDS:
        fail(f"lmim {name}: no such command{did_you_mean(name, COMMANDS)}")
    try:
        module = importlib.import_module(f"lmim_jax.cli.{COMMANDS[name][0]}")
        app = importlib.import_module("lmim_jax.cli.app")
    except ImportError as error:  # no restart would mend it
        fail(f"lmim {name}: {error}; is all that requirements.txt lists installed?")
    app.run(module, [f"lmim {name}", *given[1:]])


if __name__ == "__main__":
    main()
