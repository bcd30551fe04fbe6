"""The story of a training run, top to bottom."""

import json
import logging
import pathlib
import time

import jax
from clu import parameter_overview

from lmim_jax import checkpoint, files, gauges, metrics, optim, sharding
from lmim_jax import summary as summaries
from lmim_jax.data import augment, loader, sources
from lmim_jax.data.evaluation import Evaluation
from lmim_jax.evaluators import base as evaluators
from lmim_jax.methods import base as methods
from lmim_jax.state import create
from lmim_jax.step import make_train_step

log = logging.getLogger(__name__)


def train(config, workdir):
    """Train as `config` says, in `workdir`; running it again goes on where it stopped.

    Args:
      config: ConfigDict, see configs/vit_b.py.
      workdir: folder of this run's checkpoints, metrics and summary; made where it is not there.

    Returns:
      The summary, a dict, also written to workdir/summary.json.

    Raises:
      UserError: what only the user can mend. NonFinite: a loss or gradient was NaN or infinite.
    """
    began = time.perf_counter()
    summary_path = pathlib.Path(workdir, "summary.json")

    # Devices
    mesh = sharding.make_mesh()
    sharding.check_batch(config.batch_size, config.micro_batches, mesh.size)
    log.info("%d %s device(s), %d process(es)", mesh.size, jax.devices()[0].device_kind, jax.process_count())

    # Data
    source = {split: sources.from_config(config.data, split) for split in ("train", "test")}
    steps_per_epoch = loader.steps_per_epoch(source["train"], config.batch_size)
    total_steps = config.total_steps or config.epochs * steps_per_epoch
    images = {split: len(images) if images else 0 for split, images in source.items()}
    log.info("%(train)d training and %(test)d test images", images)

    # Method
    method = methods.from_config(config.method, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    augmentation = augment.from_config(config.augment, image_size=method.image_size, eval_size=method.feature_size)

    # Optimiser
    warmup_steps = config.optimizer.warmup_epochs / config.epochs * total_steps
    optimizer, learning_rate = optim.from_config(config.optimizer, warmup_steps=warmup_steps, total_steps=total_steps)

    # Evaluators
    data = Evaluation(source, config.data, augmentation, mesh)
    abstract = jax.eval_shape(method.init, jax.random.key(0))
    has_target = "encoder" in method.target_of(abstract)
    scheduled = evaluators.from_config(config.evaluators, steps_per_epoch=steps_per_epoch, has_target=has_target)
    for evaluator in scheduled:
        if not evaluator.due(total_steps, total_steps):
            log.info("%s is not evaluated: the run is shorter than its interval (`every`)", evaluator.title)

    # Everything about the config is checked: from here on, files are written
    checkpoint.claim(workdir, config.to_dict())
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint_keep)
    start = checkpoints.latest() or 0
    if start == total_steps and summary_path.exists():
        log.info("this run is finished: %d of %d steps, in %s", start, total_steps, workdir)
        summary = json.loads(summary_path.read_text())
        log.info(summaries.table(summary, workdir))
        return summary

    # State
    state, shardings = create(method, optimizer, config.seed, mesh)
    count = {name: parameter_overview.count_parameters(tree) for name, tree in state.params.items()}
    log.info("parameters: %s", ", ".join(f"{name} {number:,}" for name, number in count.items()))
    if start:
        state = checkpoints.restore(state, shardings)
        log.info("resuming after step %d of %d", start, total_steps)

    # Step
    train_step = jax.jit(
        make_train_step(method, augmentation, optimizer, mesh, config.micro_batches),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )

    # Loop: at a boundary evaluate and save the *same* state, then go on
    writer = metrics.Writer(workdir, start)
    gauge = gauges.make(method, data, config.gauge_images)
    meter = metrics.Meter(
        writer,
        gauges.Alarm(),
        start=start,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        batch_size=config.batch_size,
        log_every=config.log_every,
        learning_rate=learning_rate,
        tell=checkpoints.tell,
        began=began,
    )

    def evaluate(done):
        for evaluator in scheduled:
            if evaluator.due(done, total_steps):
                began = time.perf_counter()
                numbers, pictures = evaluator.run(method, state, data)
                writer.write(done, numbers)
                writer.draw(done, pictures)
                listed = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()) or evaluator.title
                log.info("step %d  %s  (%s)", done, listed, metrics.duration(time.perf_counter() - began))

    if start in (0, total_steps):
        evaluate(start)
    batches = loader.training(
        source["train"],
        config.data,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=total_steps,
        start=start,
        mesh=mesh,
    )
    meter.resume()
    try:
        for done, batch in enumerate(batches, start + 1):
            with jax.transfer_guard("disallow"):
                state, numbers = train_step(state, batch)
                if done % config.log_every == 0 or done == total_steps:
                    numbers |= gauge(state.params, state.target)
            meter.add(done, numbers)
            save = done % config.checkpoint_every == 0 or done == total_steps
            if save or any(evaluator.due(done, total_steps) for evaluator in scheduled):
                meter.pause()  # and so make sure that this state is finite
                evaluate(done)
                if save:
                    checkpoints.save(state, done)
                meter.resume()
    finally:
        checkpoints.close()  # saves under way end well, whatever stopped the run

    # End
    writer.close()
    lines = summaries.history(workdir)
    summary = summaries.summarize(lines, total_steps=total_steps, seconds=meter.wall_seconds)
    if jax.process_index() == 0:
        metrics.write_picture(workdir, "curves", summaries.curves(lines, workdir))
        files.write(summary_path, json.dumps(summary, indent=2) + "\n")
    log.info("finished %d steps in %s", total_steps, metrics.duration(summary["wall_seconds"]))
    log.info(summaries.table(summary, workdir))
    return summary
