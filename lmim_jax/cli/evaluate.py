"""What the frozen features of a run are worth: evaluators on its newest checkpoint, one table, one JSON file.

    lmim evaluate --workdir=RUN --evaluators=knn,logistic_regression,fewshot --baselines
    lmim evaluate --workdir=RUN --evaluators=knn --config.knn.feature=cls --weights=target
    lmim evaluate --workdir=RUN --evaluators=all --data.source=folder --data.path=IMAGES

Evaluators and their knobs are the sections of configs/evaluate.py; images are those of the run, or what
--data.KEY=VALUE says instead. Columns of the table: raw pixels, colours and the encoder before training (these with
--baselines), the encoder after it. The JSON file is RUN/evaluations/STEP-EVALUATORS.json, with a suffix where anything
was changed by a flag; it says what was evaluated. Features are kept in RUN/evaluations/cache, which may be deleted.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import pathlib
import shlex
import sys
import time

import jax
import tqdm
from absl import flags
from ml_collections import config_flags

from lmim_jax.distributed import multihost, sharding
from lmim_jax.evaluators import base as evaluators
from lmim_jax.evaluators.common import image_features
from lmim_jax.evaluators.common.feature_cache import FeatureCache
from lmim_jax.report.eval_table import line, table
from lmim_jax.train import runs
from lmim_jax.train.metric_writer import write_picture
from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration, log_to_console

log = logging.getLogger("lmim_jax.cli.evaluate")
TELL = 20.0  # seconds between lines of progress

RECIPES: dict[str, str | None] = {"config": "evaluate", "data": "evaluate:data"}


def choose(titles, config):
    """The sections of `config` that --evaluators names, {title: section}.

    Raises:
      UserError: there is none of a name, with the nearest one.
    """
    for title in titles:
        if title not in (*config, "all"):
            near = difflib.get_close_matches(title, config, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(config)}"
            raise UserError(f"--evaluators={title}: no such evaluator; {hint}")
    if not titles:
        raise UserError(f"--evaluators is empty; give all, or some of: {', '.join(config)}")
    return {
        title: config[title] for title in (config if "all" in titles else dict.fromkeys(titles))
    }


def schedule(run, sections, weights, feature):
    """The evaluators of {title: section}, with --weights and --feature in place of what the sections say.

    Raises:
      UserError: see `evaluators.from_config`.
    """
    sections = {title: dict(section) for title, section in sections.items()}
    for section in sections.values():
        section["params"] = weights or section["params"]
    target = run.method.target_of(jax.eval_shape(run.method.init, jax.random.key(0)))
    found = evaluators.from_config(
        sections, steps_per_epoch=1, has_target="encoder" in target, where="config"
    )
    return [_on(one, feature) if feature else one for one in found]


def _on(scheduled, feature):
    """A scheduled evaluator on another feature, where it takes any."""
    if not hasattr(scheduled.evaluator, "takes_pixels"):
        return scheduled
    return dataclasses.replace(
        scheduled, evaluator=dataclasses.replace(scheduled.evaluator, feature=feature)
    )


def allowed(scheduled, data, everything):
    """The evaluators that the images allow: those that need labels and a test split have them.

    Args:
      everything: leave out the others, and say so.

    Raises:
      UserError: one does not, and was asked for by name.
    """
    blind = [
        one.title
        for one in scheduled
        if hasattr(one.evaluator, "labelled") and not evaluators.labelled(data)
    ]
    if blind:
        what = "no classes" if not data.classes else "no test split"
        advice = (
            "give images in train/CLASS/ and test/CLASS/ with --data.source=folder --data.path=DIR"
        )
        if not everything:
            raise UserError(f"--evaluators={','.join(blind)}: the images have {what}; {advice}")
        log.info("left out, as the images have %s: %s", what, ", ".join(blind))
    return [one for one in scheduled if one.title not in blind]


def measure(run, scheduled, data, weights, everything=False):
    """Run evaluators on each of some weights.

    Args:
      weights: {column: Weights}; a column that is in pooling.FIXED needs no encoder.
      everything: leave out an evaluator that something is missing for, and say so.

    Yields:
      After each evaluator, what has been found so far: ({"title/name": {column: number}}, pictures of the column
      "trained" {"title/name": uint8 [H, W, 3]}).

    Raises:
      UserError: an evaluator had nothing to measure, or lacks something.
    """
    jobs = [(one, column) for one in scheduled for column in weights if _has(one, column)]
    figures, pictures, began = {}, {}, time.perf_counter()
    for done, (one, column) in enumerate(jobs):
        log.info("[%d/%d] %s, %s", done + 1, len(jobs), one.title, column)
        start = time.perf_counter()
        try:
            on = _on(one, column) if column in image_features.FIXED else one
            numbers, drawn = on.run(run.method, weights[column], data)
            if not numbers and not drawn:
                raise UserError(
                    f"{one.title} has nothing to measure on these images: they lack what it needs"
                )
        except UserError as error:
            if not everything:
                raise
            log.warning("%s is left out: %s", one.title, error)
            continue
        for name, value in numbers.items():
            figures.setdefault(name, {})[column] = value
        if column == "trained":
            pictures |= drawn
        left = (time.perf_counter() - began) / (done + 1) * (len(jobs) - done - 1)
        listed = line({name.partition("/")[2]: value for name, value in numbers.items()})
        took = duration(time.perf_counter() - start)
        log.info("        %s  (%s, ETA of all %s)", listed or "pictures", took, duration(left))
        yield figures, pictures


def _has(scheduled, column):
    return column not in image_features.FIXED or hasattr(scheduled.evaluator, "takes_pixels")


def progress(batches, split, total):
    """Batches as they come, shown with their number, speed and ETA: a bar on a terminal, else lines in the log."""
    title = f"images of {split}"
    if sys.stderr.isatty():
        yield from tqdm.tqdm(
            batches, title, total, leave=False, unit=" batches", disable=jax.process_index() > 0
        )
        return
    began = told = time.perf_counter()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.perf_counter()
        if now - told > TELL:
            left, told = (now - began) / done * (total - done), now
            log.info("        %s: %d of %d batches, ETA %s", title, done, total, duration(left))


def prepare(run, knobs, baselines, folder):
    """(images, columns as `measure` takes them, what is evaluated); the arguments are what the flags say."""
    mesh = sharding.make_mesh()
    trained = run.weights(mesh)
    data = run.images(knobs, mesh, progress=progress, cache=FeatureCache(folder / "cache"))
    identities = {split: source.identity() for split, source in data.sources.items() if source}
    multihost.check_consistent(config=run.config, data=identities)
    columns = {name: trained for name in image_features.FIXED if baselines}
    columns |= {"untrained": run.untrained(mesh)} if baselines else {}
    what = {
        "run": str(run.workdir),
        "step": trained.step,
        "checkpoint": trained.checkpoint,
        "data": identities,
        "images": {split: len(source) for split, source in data.sources.items() if source},
        "classes": len(data.classes),
        "devices": f"{mesh.size} {jax.devices()[0].device_kind}",
        "version": multihost.versions(),
    }
    return data, {**columns, "trained": trained}, what


def file_name(flag, step, titles):
    """The name of the JSON file: another one for every set of evaluators, and for whatever flags change."""
    changed = {name: config_flags.get_override_values(flag[name]) for name in ("config", "data")}
    changed |= {"weights": flag.weights, "feature": flag.feature, "baselines": flag.baselines}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    suffix = f"-{digest}" if any(changed.values()) else ""
    return f"{step}-{'-'.join(titles)}{suffix}.json"


def main(arguments):
    """Run the command."""
    flag = flags.FLAGS
    multihost.initialize(flag.coordinator, flag.num_processes, flag.process_id)
    log_to_console()
    if arguments:
        raise UserError(
            f"unknown argument {arguments[0]!r}; give the run as --workdir={arguments[0]}"
        )
    run, folder = runs.open_run(flag.workdir), pathlib.Path(flag.workdir, "evaluations")
    sections, everything = choose(flag.evaluators, flag.config), "all" in flag.evaluators
    scheduled = schedule(run, sections, flag.weights, flag.feature)
    knobs = run.data_config(flag.data.to_dict(), config_flags.get_override_values(flag["data"]))
    data, columns, what = prepare(run, knobs, flag.baselines, folder)
    scheduled = allowed(scheduled, data, everything)
    what["weights"] = {one.title: one.weights for one in scheduled}
    name = file_name(flag, what["step"], ["all"] if everything else list(sections))
    out = pathlib.Path(flag.out) if flag.out else folder / name
    started_by = shlex.join(["python", "-m", "lmim_jax.cli", "evaluate", *sys.argv[1:]])
    head = {"command": started_by, "evaluated": what}
    head["config"] = {title: section.to_dict() for title, section in sections.items()}
    found = {}, {}
    try:
        for found in measure(run, scheduled, data, columns, everything):
            if not jax.process_index():
                atomic_io.write(out, json.dumps({**head, "figures": found[0]}, indent=2) + "\n")
    finally:  # what was measured before a mistake counts
        figures, pictures = found
        if (figures or pictures) and not jax.process_index():
            for title, picture in pictures.items():
                write_picture(out.parent, title.replace("/", "_"), picture)
            print(table(what, figures))
            print(
                f"Figures: {out}" + (f"; pictures: {out.parent / 'pictures'}" if pictures else ""),
                flush=True,
            )


def define_flags():
    """Define the flags of the command."""
    config_flags.DEFINE_config_file(
        "config", None, "Evaluators; default: configs/evaluate.py.", lock_config=True
    )
    config_flags.DEFINE_config_file(
        "data", None, "Images; default: those of the run.", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "The --workdir of a training run.", required=True)
    flags.DEFINE_list(
        "evaluators",
        ["knn", "logistic_regression", "fewshot"],
        "Titles of sections in configs/evaluate.py, or all.",
    )
    flags.DEFINE_bool(
        "baselines",
        False,
        "Also the encoder before training, and pixels and colours where it can be.",
    )
    flags.DEFINE_enum(
        "weights",
        None,
        ["online", "target"],
        "Weights to evaluate; default: `params` of each section.",
    )
    flags.DEFINE_string(
        "feature",
        None,
        "Feature to evaluate, where any will do; default: `feature` of each section.",
    )
    flags.DEFINE_string("out", None, "The JSON file; default: in RUN/evaluations.")
    flags.DEFINE_string("coordinator", "", "Several processes: as in main.py.")
    flags.DEFINE_integer("num_processes", 0, "Several processes: as in main.py.")
    flags.DEFINE_integer("process_id", -1, "Several processes: as in main.py.")
