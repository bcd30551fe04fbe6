"""Schedules of the recipes have the published values."""

import importlib

import numpy as np
import pytest

from lmim_jax.optim import adamw, schedules
from lmim_jax.train.build import build

IMAGES = 1_281_167  # of ImageNet-1k's training split

# {recipe: (steps per epoch, {epoch: (learning rate, weight decay, EMA momentum)})}, as the official
# code uses them in the first step of an epoch; None: there is no teacher. After the last epoch are
# the ends of the schedules.
PUBLISHED = {
    # README of yibingwei-1/LatentMIM: batch 4096, --blr 1.5e-4, 800 epochs, 40 of warm-up;
    # adjust_learning_rate: from and to min_lr_frac 0.25 of the peak; configs/lmim.yaml: weight
    # decay 0.05; main_lmim.py: momentum 1 - 0.01 (1 + cos(pi epoch / epochs)) / 2
    "vit_b": (
        312,
        {
            0: (6e-4, 0.05, 0.99),
            20: (1.5e-3, 0.05, 1 - 0.01 * (1 + np.cos(np.pi / 40)) / 2),
            40: (2.4e-3, 0.05, 1 - 0.01 * (1 + np.cos(np.pi / 20)) / 2),
            420: (1.5e-3, 0.05, 0.995392),
            800: (6e-4, 0.05, 1.0),
        },
    ),
    # Its configs/lmim.yaml: 300 epochs, 30 of warm-up; 128 images x 4 x 2 GPUs as recorded
    "in100_vit_b": (
        1251,  # were all classes used
        {
            0: (1.5e-4, 0.05, 0.99),
            30: (6e-4, 0.05, 1 - 0.01 * (1 + np.cos(np.pi / 10)) / 2),
            165: (3.75e-4, 0.05, 1 - 0.01 * (1 + np.cos(np.pi * 0.55)) / 2),
            300: (1.5e-4, 0.05, 1.0),
        },
    ),
    # arXiv 2111.06377, table 8: base learning rate 1.5e-4, weight decay 0.05, batch 4096, 40 epochs
    # of warm-up, cosine; util/lr_sched.py of facebookresearch/mae: from 0 and to 0
    "mae_vit_b": (
        312,
        {
            0: (0.0, 0.05, None),
            20: (1.2e-3, 0.05, None),
            40: (2.4e-3, 0.05, None),
            420: (1.2e-3, 0.05, None),
            800: (0.0, 0.05, None),
        },
    ),
    # pretrain.py of joonmy/PiLaMIM: 1.5e-4 x 2048 / 256 times min((epoch + 1) / 40, (1 + cos(pi
    # epoch / 800)) / 2), weight decay 0.05, momentum 0.996 to 1 along a line
    "pilamim_vit_b": (
        625,
        {
            0: (1.2e-3 / 40, 0.05, 0.996),
            19: (1.2e-3 / 2, 0.05, 0.996 + 0.004 * 19 / 800),
            39: (1.2e-3 * (1 + np.cos(np.pi * 39 / 800)) / 2, 0.05, 0.996 + 0.004 * 39 / 800),
            40: (1.2e-3 * (1 + np.cos(np.pi / 20)) / 2, 0.05, 0.9962),
            400: (6e-4, 0.05, 0.998),
            800: (0.0, 0.05, 1.0),
        },
    ),
    # README and run_pretraining.py of LightDXY/BootMAE: 1.5e-4 x 2048 / 256, from 0 in 40 of 801
    # epochs, to --min_lr 1e-4; weight decay 0.05; model_ema_decay 0.999 to 0.9999 in 100 epochs,
    # with --model_ema_dynamic to 0.99999 in 400
    "bootmae_vit_b": (
        625,
        {
            0: (0.0, 0.05, 0.999),
            20: (1.2e-3 * 12500 / 24999, 0.05, 0.99918),
            40: (1.2e-3, 0.05, 0.99936),
            100: (1e-4 + 1.1e-3 * (1 + np.cos(np.pi * 60 / 761)) / 2, 0.05, 0.9999),
            400: (1e-4 + 1.1e-3 * (1 + np.cos(np.pi * 360 / 761)) / 2, 0.05, 0.99999),
            801: (1e-4, 0.05, 0.99999),
        },
    ),
    # default_pretrain_config.yaml of facebookresearch/capi: 500,000 iterations of 32 x 512 images,
    # base_value 1e-3 after warmup_iters 50,000 from 0 (numpy.linspace), then truncate_cos 0.8 of
    # the cosine to 0; momentum 1 to 0.999 and back with the same shape; weight decay 0.1
    "capi_vit_l": (
        78,
        {
            0: (0.0, 0.1, 1.0),
            320: (1e-3 * 24_960 / 49_999, 0.1, 1 - 1e-3 * 24_960 / 49_999),
            641: (1e-3 * 49_998 / 49_999, 0.1, 1 - 1e-3 * 49_998 / 49_999),
            3205: (
                5e-4 * (1 + np.cos(np.pi * 0.8 * 199_990 / 450_000)),
                0.1,
                1 - 5e-4 * (1 + np.cos(np.pi * 0.8 * 199_990 / 450_000)),
            ),
            6410: (
                5e-4 * (1 + np.cos(np.pi * 0.8 * 449_980 / 450_000)),
                0.1,
                1 - 5e-4 * (1 + np.cos(np.pi * 0.8 * 449_980 / 450_000)),
            ),
        },
    ),
    # base_images_only_task.yaml of fairseq: 375,300 updates of 16 x 16 images, lr 1e-3 after 50,040
    # updates from 0, cosine to 0, weight decay 0.05, ema_decay 0.9998 to 0.99999 in 100,000 updates
    "data2vec2_vit_b": (
        5004,
        {
            0: (0.0, 0.05, 0.9998 + 0.00019 * 1e-5),
            5: (5e-4, 0.05, 0.9998 + 0.00019 * 0.25021),
            10: (1e-3, 0.05, 0.9998 + 0.00019 * 0.50041),
            20: (5e-4 * (1 + np.cos(np.pi * 10 / 65)), 0.05, 0.99999),
            75: (0.0, 0.05, 0.99999),
        },
    ),
    # large_images_only_task.yaml: 375,300 updates of 16 x 8 images, 4e-4, 150,000 updates
    "data2vec2_vit_l": (
        10_009,
        {
            0: (0.0, 0.05, 0.9998 + 0.00019 / 150_000),
            3: (4e-4 * 30_027 / 50_040, 0.05, 0.9998 + 0.00019 * 30_028 / 150_000),
            20: (2e-4 * (1 + np.cos(np.pi * 150_140 / 325_260)), 0.05, 0.99999),
        },
    ),
    # configs/in1k_vith14_ep300.yaml of facebookresearch/ijepa: start_lr 2e-4, lr 1e-3 after 40
    # epochs, final_lr 1e-6, weight decay 0.04 to final_weight_decay 0.4, ema 0.996 to 1; 600 epochs
    # of B: arXiv 2301.08243, table 1. src/train.py counts learning rate and weight decay up before
    # it reads them.
    "ijepa_vit_b": (
        625,
        {
            0: (2e-4 + 8e-4 / 25000, 0.04, 0.996),
            20: (
                6e-4 + 8e-4 / 25000,
                0.4 - 0.36 * (1 + np.cos(np.pi / 30)) / 2,
                0.996 + 0.004 / 30,
            ),
            40: (1e-3, 0.4 - 0.36 * (1 + np.cos(np.pi / 15)) / 2, 0.996 + 0.004 / 15),
            320: (
                5.005e-4,
                0.4 - 0.36 * (1 + np.cos(np.pi * 320 / 600)) / 2,
                0.996 + 0.004 * 8 / 15,
            ),
            600: (1e-6, 0.4, 1.0),
        },
    ),
}
SAME_SCHEDULES = ("vit_ti", "vit_s", "vit_l", "vit_h")  # as vit_b
NOT_EXACTLY_AT_THE_STEP = 3e-5  # relative: values of I-JEPA's next step


def cases():
    """(recipe, steps per epoch, epoch, its values) of the table."""
    for name, (steps_per_epoch, epochs) in PUBLISHED.items():
        for epoch, values in epochs.items():
            yield pytest.param(name, steps_per_epoch, epoch, values, id=f"{name}-{epoch}")


@pytest.mark.parametrize(("name", "steps_per_epoch", "epoch", "values"), list(cases()))
def test_schedules_have_the_published_values(name, steps_per_epoch, epoch, values):
    config = importlib.import_module(f"lmim_jax.configs.{name}").get_config()
    assert steps_per_epoch == IMAGES // config.batch_size
    parts = build(config, steps_per_epoch)
    learning_rate, weight_decay, momentum = values
    step = epoch * steps_per_epoch
    # The ends: I-JEPA's last step already has them
    before = step - config.optimizer.steps_ahead if epoch == config.epochs else step
    np.testing.assert_allclose(
        parts.learning_rate(before), learning_rate, rtol=NOT_EXACTLY_AT_THE_STEP, atol=1e-10
    )
    _, decay = adamw.make_schedules(
        config.optimizer,
        warmup_steps=config.optimizer.warmup_epochs * steps_per_epoch,
        total_steps=parts.total_steps,
        steps_per_epoch=steps_per_epoch,
    )
    np.testing.assert_allclose(decay(before), weight_decay, rtol=NOT_EXACTLY_AT_THE_STEP)
    if momentum is None:
        assert parts.method.ema_rate(step) == 0
        return
    # Latent MIM's teacher is updated before a step, and ours after the step before it
    if parts.config.method.name == "latent_mim":
        step -= 1
    np.testing.assert_allclose(1 - parts.method.ema_rate(step), momentum, rtol=1e-6)


def test_the_peak_of_the_published_warmups_is_where_it_was():
    def steps_of_peak(name, steps_per_epoch):
        config = importlib.import_module(f"lmim_jax.configs.{name}").get_config()
        parts = build(config, steps_per_epoch)
        rates = np.array([float(parts.learning_rate(step)) for step in range(24_990, 25_010)])
        return (np.flatnonzero(rates >= rates.max() * (1 - 1e-7)) + 24_990).tolist()

    assert steps_of_peak("bootmae_vit_b", 625)[:2] == [24_999, 25_000]  # numpy.linspace
    assert steps_of_peak("ijepa_vit_b", 625)[0] == 24_999  # counted up before


def test_the_weight_of_bootmaes_features_has_the_official_values():
    config = importlib.import_module("lmim_jax.configs.bootmae_vit_b").get_config()
    method = build(config, 625).method
    for epoch, expected in ((0, 4 / 801), (99, 400 / 801), (200, 1.0), (800, 1.0)):
        for step in (epoch * 625, epoch * 625 + 624):
            np.testing.assert_allclose(method._feature_weight(step), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.75), (200, 0.676777), (420, 0.480385), (800, 0.25)]
)
def test_the_goal_of_similarities_has_the_official_values(epoch, expected):
    # run of the official code: 0.25 + 0.5 (1 + cos(pi epoch / 800)) / 2
    method = importlib.import_module("lmim_jax.configs.vit_b").get_config().method
    goal = schedules.cosine(method.similarity_start, method.similarity_end, epoch / 800)
    np.testing.assert_allclose(goal, expected, rtol=2e-5)


@pytest.mark.parametrize("name", SAME_SCHEDULES)
def test_other_sizes_have_the_schedules_of_the_published_one(name):
    found = importlib.import_module(f"lmim_jax.configs.{name}").get_config()
    published = importlib.import_module("lmim_jax.configs.vit_b").get_config()
    assert found.optimizer == published.optimizer
    assert (found.epochs, found.batch_size) == (published.epochs, published.batch_size)


@pytest.mark.parametrize("total_steps", [7, 100, 500_000])
def test_a_run_of_other_length_has_the_whole_schedule(total_steps):
    config = importlib.import_module("lmim_jax.configs.pilamim_vit_b").get_config()
    config.total_steps = total_steps
    rates = build(config, 625).learning_rate(np.arange(total_steps))
    assert rates[0] == pytest.approx(1.2e-3 / 40, rel=1e-5)
    assert rates.argmax() == pytest.approx(total_steps / 20, abs=max(1, total_steps / 800))
    assert rates[-1] < 0.1 * rates.max()


def test_a_cosine_from_step_0_is_capped_by_the_warmup():
    learning_rate = schedules.warmup_cosine(0.0, 1.0, 0.0, 10, 100, rebased=False)
    np.testing.assert_allclose(learning_rate(5), 0.5, rtol=1e-6)  # the warm-up is smaller
    np.testing.assert_allclose(learning_rate(50), 0.5, rtol=1e-6)  # halfway along the cosine
    assert learning_rate(10) < 1


@pytest.mark.parametrize("warmup_steps", [1.5, 2, 2.5, 9, 9.5])
def test_a_peak_in_the_warmup_is_reached_and_never_passed(warmup_steps):
    learning_rate = schedules.warmup_cosine(0.1, 1.0, 0.0, warmup_steps, 100, peak_in_warmup=True)
    rates = np.array([float(learning_rate(step)) for step in range(100)])
    last = int(np.ceil(warmup_steps)) - 1
    np.testing.assert_allclose(rates[last], rates.max(), rtol=1e-6)
    assert rates.max() <= 1
    assert (np.diff(rates[last + 1 :]) < 0).all()


@pytest.mark.parametrize("warmup_steps", [0.5, 1])
def test_a_warmup_of_one_step_has_the_first_value_of_linspace(warmup_steps):
    learning_rate = schedules.warmup_cosine(0.1, 1.0, 0.0, warmup_steps, 100, peak_in_warmup=True)
    np.testing.assert_allclose(learning_rate(0), 0.1, rtol=1e-6)
    assert learning_rate(1) > 0.99
