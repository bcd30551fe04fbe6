"""The story of a training run, top to bottom."""

import contextlib
import functools
import json
import logging
import pathlib
import time

import jax
from clu import parameter_overview

from lmim_jax.data import loader, sources
from lmim_jax.data.augment import device, host
from lmim_jax.data.eval.eval_data import EvaluationData
from lmim_jax.distributed import multihost, preemption, sharding
from lmim_jax.evaluators import base as evaluators
from lmim_jax.methods import base as methods
from lmim_jax.optim import adamw
from lmim_jax.train import collapse_metrics, metric_logger, provenance
from lmim_jax.train import summary as summaries
from lmim_jax.train import workdir as workdirs
from lmim_jax.train.checkpoints import Checkpoints
from lmim_jax.train.lock import Lock
from lmim_jax.train.metric_writer import Writer, history, write_picture
from lmim_jax.train.state import create
from lmim_jax.train.step import jit_step
from lmim_jax.utils import atomic_io
from lmim_jax.utils.errors import UserError
from lmim_jax.utils.logging import duration
from lmim_jax.utils.prng import augment_keys

log = logging.getLogger(__name__)


def train(config, workdir):
    """Train as `config` says, in `workdir`; running it again goes on where it stopped.

    Args:
      config: ConfigDict, see configs/vit_b.py.
      workdir: folder of this run's checkpoints, metrics and summary; made where it is not there.

    Returns:
      The summary, a dict, also written to workdir/summary.json.

    Raises:
      UserError: what only the user can mend. NonFinite: a loss or gradient was NaN or infinite. Preempted: SIGTERM or
      SIGUSR1 came, and the state is saved. SaveFailed: several checkpoints in a row could not be written.
    """
    began = time.perf_counter()

    # Devices
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(config.batch_size, config.micro_batches, mesh.size)
    kind, shape = (
        jax.devices()[0].device_kind,
        " x ".join(f"{name} {size}" for name, size in mesh.shape.items()),
    )
    log.info("%d %s device(s) as %s, %d process(es)", mesh.size, kind, shape, jax.process_count())

    # Data
    source = {split: sources.from_config(config.data, split) for split in ("train", "test")}
    steps_per_epoch = loader.steps_per_epoch(source["train"], config.batch_size)
    total_steps = config.total_steps or config.epochs * steps_per_epoch
    images = {split: len(images) if images else 0 for split, images in source.items()}
    log.info("%(train)d training and %(test)d test images", images)

    # Method
    method = methods.from_config(
        config.method, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    augmentation = device.from_config(
        config.augment, image_size=method.image_size, eval_size=method.feature_size
    )
    crop = host.from_config(config.data, augmentation, functools.partial(augment_keys, config.seed))

    # Optimiser
    warmup_steps = config.optimizer.warmup_epochs / config.epochs * total_steps
    optimizer, learning_rate = adamw.from_config(
        config.optimizer, warmup_steps=warmup_steps, total_steps=total_steps
    )

    # Evaluators
    abstract = jax.eval_shape(method.init, jax.random.key(0))
    has_target = "encoder" in method.target_of(abstract)
    scheduled = evaluators.from_config(
        config.evaluators, steps_per_epoch=steps_per_epoch, has_target=has_target
    )
    for evaluator in scheduled:
        if not evaluator.due(total_steps, total_steps):
            log.info(
                "%s is not evaluated: the run is shorter than its interval (`every`)",
                evaluator.title,
            )

    if config.on_nonfinite not in ("stop", "skip"):
        raise UserError(f"config.on_nonfinite={config.on_nonfinite!r} is none of: stop | skip")

    # Everything about the config is checked: from here on, files are written
    belongs = config.to_dict(), source["train"].identity()
    multihost.check_consistent(config=belongs[0], data=belongs[1])
    workdirs.check(workdir, *belongs)
    if summary := summaries.finished(workdir, total_steps):
        log.info("this run is finished: %d of %d steps, in %s", total_steps, total_steps, workdir)
        log.info(summaries.table(summary, workdir))
        return summary
    with Lock(workdir), Checkpoints(workdir, config) as checkpoints, preemption.PreemptionHandler() as handler:
        workdirs.claim(workdir, *belongs)
        provenance.note(workdir)

        # State
        state, shardings = create(
            method,
            optimizer,
            config.seed,
            mesh,
            rules=config.mesh.rules,
            min_size=config.mesh.min_size,
        )
        count = {
            name: parameter_overview.count_parameters(tree) for name, tree in state.params.items()
        }
        log.info(
            "parameters: %s", ", ".join(f"{name} {number:,}" for name, number in count.items())
        )
        start = 0
        if restored := checkpoints.restore(state, shardings):
            state, start = restored, int(restored.step)
            log.info("resuming after step %d of %d", start, total_steps)

        # Step
        train_step = jit_step(config, method, augmentation, optimizer, mesh, shardings)

        # Loop: at a boundary evaluate and save the *same* state, then go on
        data = EvaluationData(source, config.data, augmentation, mesh, check=handler.raise_if_received)
        gauge = collapse_metrics.make(method, data, config.gauge_images)
        writer = Writer(workdir, start)
        meter = metric_logger.Meter(
            writer,
            collapse_metrics.Alarm(),
            config,
            start=start,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            learning_rate=learning_rate,
            tell=checkpoints.tell,
            began=began,
        )

        def evaluate(done):
            """Run what is due after `done` steps, and is not there yet from before a restart."""
            for evaluator in scheduled:
                if evaluator.due(done, total_steps) and not (
                    done == start and writer.has(evaluator.title)
                ):
                    began = time.perf_counter()
                    numbers, pictures = evaluator.run(method, state, data)
                    writer.write(done, numbers)
                    writer.draw(done, pictures)
                    listed = (
                        "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
                        or evaluator.title
                    )
                    log.info(
                        "step %d  %s  (%s)", done, listed, duration(time.perf_counter() - began)
                    )

        with contextlib.suppress(
            preemption.EvaluationInterrupted
        ):  # by a signal, which the loop heeds after its next step
            evaluate(start)
        batches = loader.training_batches(
            source["train"],
            config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            steps=total_steps,
            start=start,
            mesh=mesh,
            crop=crop,
        )
        meter.resume()
        for done, batch in enumerate(batches, start + 1):
            last, log_due = done == total_steps, done % config.log_every == 0
            with jax.transfer_guard("disallow"):
                state, numbers = train_step(state, batch)
                if log_due:
                    numbers |= gauge(state.params, state.target)
            meter.add(done, numbers)
            stop = handler.should_stop(done)
            save = (
                stop
                or last
                or done % config.checkpoint_every == 0
                or (log_due and checkpoints.failing)
            )
            if save or any(evaluator.due(done, total_steps) for evaluator in scheduled):
                meter.pause()  # and so make sure that this state is finite
                try:
                    with contextlib.suppress(preemption.EvaluationInterrupted):
                        if not stop:
                            evaluate(done)
                except UserError:  # such as masks that are not there: what was trained is kept
                    checkpoints.save(state, done)
                    checkpoints.wait(must_succeed=True)
                    raise
                if save:
                    checkpoints.save(state, done)
                if stop:
                    raise preemption.Preempted(f"stopped after step {done} of {total_steps}")
                meter.resume()
        checkpoints.wait(must_succeed=True)
        if handler.received:  # in the last evaluation
            raise preemption.Preempted(f"stopped in the evaluation after step {total_steps}")

        # End
        writer.close()
        lines = history(workdir)
        summary = summaries.summarize(lines, total_steps=total_steps, seconds=meter.wall_seconds)
        if jax.process_index() == 0:
            write_picture(workdir, "curves", summaries.curves(lines, workdir))
            atomic_io.write(
                pathlib.Path(workdir, "summary.json"), json.dumps(summary, indent=2) + "\n"
            )
    log.info("finished %d steps in %s", total_steps, duration(summary["wall_seconds"]))
    log.info(summaries.table(summary, workdir))
    return summary
