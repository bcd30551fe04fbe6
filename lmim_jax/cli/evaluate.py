"""Evaluates the frozen features of a run: evaluators on its newest checkpoint.

    lmim evaluate --workdir=RUN
    lmim evaluate --workdir=RUN --evaluators=knn,logistic_regression,fewshot --baselines
    lmim evaluate --workdir=RUN --evaluators=knn --config.knn.feature=cls --weights=target
    lmim evaluate --workdir=RUN --evaluators=all --data.source=folder --data.path=IMAGES

Evaluators and their options are the sections of configs/evaluate.py; images are those of the run
unless --data.KEY=VALUE names others. The table has a column for the trained encoder and, with
--baselines, columns for the untrained encoder, raw pixels and color histograms. The JSON file is
RUN/evaluations/STEP-EVALUATORS.json, with a suffix if flags changed anything. Features are cached
in RUN/evaluations/cache, which may be deleted.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from jaxtyping import UInt8
from ml_collections import ConfigDict, config_flags

from lmim_jax.cli import app
from lmim_jax.data import image_options, inventory, label_file, sources
from lmim_jax.data.eval import extra_tests
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import multihost, sharding
from lmim_jax.evaluators import base as evaluators
from lmim_jax.evaluators.common import kept_classifier
from lmim_jax.evaluators.common.feature_cache import FeatureCache
from lmim_jax.evaluators.common.outcome import Outcome
from lmim_jax.report.eval_table import line, table
from lmim_jax.train import modality_subset, runs
from lmim_jax.train.metric_writer import write_picture
from lmim_jax.utils import atomic_io, buckets, commands, progress
from lmim_jax.utils.errors import UserError, did_you_mean
from lmim_jax.utils.logging import duration, log_to_console

RECIPES: dict[str, str | None] = {"config": "evaluate", "data": "evaluate:data"}
FLAGS_OF_OPTIONS = {"data.": "--data."}
ALL = "all"  # of --evaluators
DEFAULT = ["knn", "logistic_regression", "fewshot"]  # for classes
TRAINED = "trained"  # the column of the trained encoder
# Flags besides those of recipes that change what is measured
CHANGING = ("weights", "feature", "modalities", "baselines", "imagenet_v2", "imagenet_real")

log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What has been measured so far.

    Attributes:
      metrics: {"title/name": {column: value}}.
      pictures: {"title/name": picture or table} of the trained encoder.
    """

    metrics: dict[str, dict[str, float]]
    pictures: dict[str, UInt8[Any, "H W 3"] | str]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is evaluated.

    Attributes:
      data: the images.
      columns: {column of the table: weights}.
      description: the same in plain values, for the JSON file.
    """

    data: EvaluationData
    columns: dict[str, runs.Weights]
    description: dict[str, Any]


def choose_sections(titles: Sequence[str], config: ConfigDict) -> dict[str, ConfigDict]:
    """The sections of `config` that --evaluators names, by title.

    Args:
      titles: of sections, or their names before version 0.2; "all" stands for those that train
        nothing, from cheap to dear, before the others that are named.
      config: sections by title, see configs/evaluate.py.

    Raises:
      UserError: there is no section of a name, or no name.
    """
    if not titles:
        raise UserError(f"--evaluators is empty; give all, or some of: {', '.join(config)}")
    chosen: dict[str, ConfigDict] = {}
    for given in titles:
        title = evaluators.current_name(given)
        if given == ALL:
            chosen = {**_untrained(config), **chosen}
        elif title in config:
            chosen[title] = config[title]
        else:
            hint = did_you_mean(given, config)
            raise UserError(f"--evaluators={given}: no such evaluator{hint}")
    return chosen


def _untrained(config: ConfigDict) -> dict[str, ConfigDict]:
    """The sections of evaluators that train nothing, from cheap to dear."""
    costs = {}
    for title, section in config.items():
        evaluator = evaluators.find(section.type, f"config.{title}")
        if not evaluator.trains:
            costs[title] = evaluator.cost
    return {title: config[title] for title in sorted(costs, key=costs.__getitem__)}


def build_evaluators(
    run: runs.Run, sections: Mapping[str, ConfigDict], weights: str | None, feature: str | None
) -> list[evaluators.Scheduled]:
    """The evaluators of some sections.

    Args:
      run: the run.
      sections: by title; changed in place as the other arguments say, and empty options become the
        choice of the recipe.
      weights: "online" or "target", instead of `params` of the sections.
      feature: instead of `feature` of the sections, where any feature can be evaluated.

    Raises:
      UserError: see `evaluators.from_config`.
    """
    for title, section in sections.items():
        if weights:
            section.params = weights
        if feature and _takes_any_feature(section, f"config.{title}"):
            section.feature = feature
    choice = dict(run.config.representation)
    if run.exported:  # the only weights that it holds
        choice["weights"] = "online"
    evaluators.fill_in(sections, choice, "config")
    return evaluators.from_config(
        sections, steps_per_epoch=1, has_target=run.has_target, where="config"
    )


def _takes_any_feature(section: ConfigDict, where: str) -> bool:
    """Whether --feature is meant for an evaluator: those of images, or with baselines."""
    evaluator = evaluators.find(section.type, where)
    is_general = evaluator.takes == "image" or evaluator.supports_pixel_baselines
    return "feature" in section and is_general


def _with_feature(scheduled: evaluators.Scheduled, feature: str) -> evaluators.Scheduled:
    """An evaluator with another feature."""
    evaluator: Any = scheduled.evaluator
    evaluator = dataclasses.replace(evaluator, feature=feature)
    return dataclasses.replace(scheduled, evaluator=evaluator)


def select_supported(
    scheduled: Sequence[evaluators.Scheduled], data: EvaluationData, skip: bool
) -> list[evaluators.Scheduled]:
    """The evaluators for which the images have the labels and the test split that they need.

    Args:
      scheduled: all evaluators.
      data: the images.
      skip: leave out the others with a line in the log.

    Raises:
      UserError: an evaluator lacks something, and `skip` is False.
    """
    possible = evaluators.only_possible(scheduled, data.classes, data.sources)
    lacking = [one for one in scheduled if one not in possible]
    if skip or not lacking:
        return possible
    problem = evaluators.problem(lacking[0].evaluator, data.classes, data.sources)
    if data.targets:
        raise UserError(f"--evaluators={lacking[0].title}: {problem}")
    titles = ",".join(one.title for one in lacking)
    raise UserError(
        f"--evaluators={titles}: {problem}; give images in train/CLASS/ and test/CLASS/ with "
        "--data.source=folder --data.path=DIR"
    )


def measure(
    run: runs.Run,
    scheduled: Sequence[evaluators.Scheduled],
    data: EvaluationData,
    columns: Mapping[str, runs.Weights],
    skip: bool = False,
    keep: Callable[[evaluators.Scheduled, Outcome], None] | None = None,
) -> Iterator[Measured]:
    """Run evaluators on several weights.

    Args:
      run: the run.
      scheduled: the evaluators.
      data: the images.
      columns: {column of the table: weights}; the columns in `evaluators.ENCODER_FREE` need no
        weights.
      skip: leave out an evaluator that lacks something, with a warning.
      keep: what classifiers of the trained encoder are given to; None: they are not kept.

    Yields:
      After each evaluation, all that has been measured so far.

    Raises:
      UserError: an evaluator has nothing to measure or lacks something.
    """
    jobs = _list_jobs(scheduled, columns)
    measured = Measured({}, {})
    cost_left = sum(one.evaluator.cost for one, _ in jobs)
    cost_done = 0.0
    start = time.perf_counter()
    for number, (one, column) in enumerate(jobs, 1):
        log.info("[%d/%d] %s, %s", number, len(jobs), one.title, column)
        cost_done += one.evaluator.cost
        cost_left -= one.evaluator.cost
        job_start = time.perf_counter()
        data.keep = None
        if keep and column == TRAINED:
            data.keep = functools.partial(keep, one)
        try:
            with progress.working(one.title):
                metrics, pictures = one.run(run.method, columns[column], data)
            if not metrics and not pictures:
                raise UserError(
                    f"{one.title} has nothing to measure on these images: they lack what it needs"
                )
        except UserError as error:
            if not skip:
                raise
            log.warning("%s is left out: %s", one.title, error)
            continue
        for name, value in metrics.items():
            measured.metrics.setdefault(name, {})[column] = value
        if column == TRAINED:
            measured.pictures.update(pictures)
        left = (time.perf_counter() - start) / cost_done * cost_left
        _log_metrics(metrics, time.perf_counter() - job_start, left)
        yield measured


def _list_jobs(
    scheduled: Sequence[evaluators.Scheduled], columns: Iterable[str]
) -> list[tuple[evaluators.Scheduled, str]]:
    """The (evaluator, column) to run, where pixels and histograms are features of the evaluator."""
    jobs = []
    for one in scheduled:
        for column in columns:
            if column not in evaluators.ENCODER_FREE:
                jobs.append((one, column))
            elif one.evaluator.supports_pixel_baselines:
                jobs.append((_with_feature(one, column), column))
    return jobs


def _log_metrics(metrics: Mapping[str, float], seconds: float, left: float) -> None:
    """Log the metrics of one evaluation in a line."""
    listed = line({name.partition("/")[2]: value for name, value in metrics.items()})
    log.info(
        "        %s  (%s, ETA of all %s)", listed or "pictures", duration(seconds), duration(left)
    )


def open_inputs(
    run: runs.Run, data_config: ConfigDict, baselines: bool, folder: buckets.Path
) -> Inputs:
    """Open the images and place the weights on all devices.

    Args:
      run: the run.
      data_config: options of the images.
      baselines: also evaluate the untrained encoder, pixels and color histograms.
      folder: of evaluations, for the cache of features.
    """
    mesh = sharding.make_mesh()
    trained = run.weights.placed_on(mesh)
    cache = FeatureCache(folder / "cache")
    listings: sources.Listings = {}
    data = run.open_images(data_config, mesh, listings, progress=progress.show_split, cache=cache)
    found = inventory.describe_config(data_config, data.sources, listings, "--data")
    for text in found:
        log.info("%s", text)
    identities = {}
    counts = {}
    for split, source in data.sources.items():
        if source:
            identities[split] = source.identity()
            counts[split] = len(source)
    multihost.check_consistent(config=run.config.to_dict(), data=identities)
    columns = {}
    if baselines:
        columns.update(dict.fromkeys(evaluators.ENCODER_FREE, trained))
        columns["untrained"] = run.initial_weights(mesh)
    columns[TRAINED] = trained
    description = {
        "run": str(run.folder),
        "step": trained.step,
        "checkpoint": trained.checkpoint,
        "data": identities,
        "images": counts,
        "found": found,
        "classes": len(data.classes),
        "devices": f"{mesh.size} {jax.devices()[0].device_kind}",
        "version": multihost.versions(),
    }
    return Inputs(data, columns, description)


def default_titles(data_config: ConfigDict) -> list[str]:
    """The evaluators that run without --evaluators: those for the kind of the labels."""
    kind = label_file.CLASSES
    if data_config.labels:
        kind = label_file.read(data_config.labels, data_config.labels_kind).kind
    if kind == label_file.MULTILABEL:
        return ["knn", "logistic_regression"]
    if kind == label_file.REGRESSION:
        return ["knn", "ridge_regression"]
    return DEFAULT


def open_extra_tests(inputs: Inputs, v2: str, real: str) -> None:
    """Add ImageNet-V2 and the labels ReaL to the images, in place.

    Args:
      inputs: what is evaluated.
      v2: folder of ImageNet-V2; "": without.
      real: the file real.json; "": without.

    Raises:
      UserError: see data/eval/extra_tests.py.
    """
    data = inputs.data
    found = {}
    if v2:
        found[extra_tests.V2] = extra_tests.open_v2(v2, data.classes)
    if real:
        test = data.sources["test"]
        found[extra_tests.REAL] = extra_tests.open_real(real, test, data.classes)
    for name, extra in found.items():
        data.sources[name] = extra.source
        data.accepted[name] = extra.accepted
        inputs.description["images"][name] = len(extra.source)
        log.info("%s: %s more test images", name, f"{len(extra.source):,}")


def file_name(step: int, titles: Sequence[str]) -> str:
    """The name of the JSON file, which depends on the evaluators and on all flags that change them.

    Args:
      step: of the checkpoint.
      titles: of the evaluators.
    """
    given = flags.FLAGS
    changed: dict[str, Any] = {}
    for name in ("config", "data"):
        changed[name] = config_flags.get_override_values(given[name])
    for name in CHANGING:
        changed[name] = given[name].value
    recipe = pathlib.PurePath(config_flags.get_config_filename(given["config"])).name
    if recipe != f"{RECIPES['config']}.py":  # evaluate.py:imagenet
        changed["recipe"] = recipe
    suffix = ""
    if any(changed.values()):
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
        suffix = f"-{digest[:8]}"
    return f"{step}-{'-'.join(titles)}{suffix}.json"


def main(arguments: list[str]) -> None:
    """Evaluate, print the table and write the files."""
    given = flags.FLAGS
    app.keep_freed_memory()
    multihost.initialize(
        given.coordinator, given.num_processes, given.process_id, device_ids=app.device_ids()
    )
    log_to_console()
    workdir = app.run_folder(arguments)
    out = buckets.path(given.out) if given.out else None
    run = modality_subset.choose(runs.open_run(workdir), given.modalities)
    folder = buckets.path(workdir, "evaluations")
    changes = config_flags.get_override_values(given["data"])
    data_config = run.data_config(given.data.to_dict(), changes)
    chosen = given.evaluators
    if not flags.FLAGS["evaluators"].present:
        chosen = default_titles(data_config)
    sections = choose_sections(chosen, given.config)
    everything = ALL in chosen
    left_out = [title for title in given.config if title not in sections]
    if everything and left_out:
        log.info(
            "left out, as they train: %s; to add them: --evaluators=%s",
            ", ".join(left_out),
            ",".join([*chosen, *left_out]),
        )
    scheduled = build_evaluators(run, sections, given.weights, given.feature)
    inputs = open_inputs(run, data_config, given.baselines, folder)
    scheduled = select_supported(scheduled, inputs.data, skip=everything)
    open_extra_tests(inputs, given.imagenet_v2, given.imagenet_real)
    inputs.description["modalities"] = list(given.modalities)
    inputs.description["weights"] = {one.title: run.exported or one.weights for one in scheduled}
    titles = list(sections)
    if everything:
        titles = chosen
    out = out or folder / file_name(run.step, titles)
    kept: list[buckets.Path] = []

    def keep(one: evaluators.Scheduled, outcome: Outcome) -> None:
        if jax.process_index() == 0:
            target = out.parent / one.title
            origin = {
                "run": str(buckets.path(workdir).absolute()),
                "step": run.step,
                "checkpoint": inputs.description["checkpoint"],
                "weights": one.weights,
                "modalities": list(given.modalities),
            }
            config = image_options.as_read(run.config.to_dict(), inputs.data.config)
            kept_classifier.write(target, outcome, inputs.data.sources["test"], config, origin)
            kept.append(target)

    head = {
        "command": commands.of_this_process(),
        "evaluated": inputs.description,
        "config": {title: section.to_dict() for title, section in sections.items()},
    }
    measured = Measured({}, {})
    try:
        for measured in measure(run, scheduled, inputs.data, inputs.columns, everything, keep):
            if jax.process_index() == 0:
                contents = {**head, "figures": measured.metrics}
                atomic_io.write(out, json.dumps(contents, indent=2) + "\n")
    finally:  # what was measured before an error is kept
        if any(measured) and jax.process_index() == 0:
            _show(measured, inputs.description, out, kept)


def _show(
    measured: Measured,
    description: Mapping[str, Any],
    out: buckets.Path,
    kept: Sequence[buckets.Path],
) -> None:
    """Write the pictures and print the table, and where classifiers are."""
    for title, picture in measured.pictures.items():
        write_picture(out.parent, title, picture)
    print(table(description, measured.metrics))
    written = f"Metrics: {out}"
    tables = [name for name, value in measured.pictures.items() if isinstance(value, str)]
    if len(measured.pictures) > len(tables):
        written += f"; pictures: {out.parent / 'pictures'}"
    if tables:
        written += f"; tables: {out.parent / 'tables'}"
    print(written, flush=True)
    for folder in kept:
        command = commands.line("predict", folder, "IMAGES")
        print(f"Classifier and predictions: {folder}; to use it: {command}")


def define_flags() -> None:
    """Define the flags of the command."""
    app.define_workdir()
    flags.DEFINE_list(
        "modalities",
        [],
        "Of a run on several modalities: those that the images have; by default all. "
        "Example: --modalities=thermal",
    )
    flags.DEFINE_list(
        "evaluators",
        DEFAULT,
        "Titles of sections of configs/evaluate.py, or all: those that train nothing. "
        "Examples: --evaluators=knn,finetune, --evaluators=all,linear_probe",
    )
    flags.DEFINE_bool(
        "baselines",
        False,
        "Also evaluate the untrained encoder, raw pixels and color histograms. "
        "Example: --baselines",
    )
    flags.DEFINE_string(
        "imagenet_v2",
        "",
        "A folder of ImageNet-V2, on which k-NN, logistic regression and probes are tested too. "
        "Example: --imagenet_v2=imagenetv2-matched-frequency-format-val",
    )
    flags.DEFINE_string(
        "imagenet_real",
        "",
        "The file of the labels ReaL, by which the validation images are judged too. "
        "Example: --imagenet_real=real.json",
    )
    app.define_recipe("config", "The options of the evaluators. Example: --config.knn.feature=cls")
    app.define_recipe(
        "data", "The images, by default those of the run. Example: --data.path=photos"
    )
    flags.DEFINE_enum(
        "weights",
        None,
        ["online", "target"],
        "The weights to evaluate, by default `params` of each section, the choice of the recipe. "
        "Example: --weights=target",
    )
    flags.DEFINE_string(
        "feature",
        None,
        "The feature to evaluate, by default `feature` of each section, the choice of the recipe. "
        "Example: --feature=cls",
    )
    flags.DEFINE_string(
        "out",
        None,
        "The JSON file, by default in RUN/evaluations. Beside it are pictures/, tables/ and a "
        "folder of each classifier, named by its evaluator; their files replace earlier ones. "
        "Example: --out=knn/metrics.json",
    )
    app.define_processes()
