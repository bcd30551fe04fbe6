"""Sections of all evaluators: for `tools.evaluate`, and for recipes to take into training.

    python -m lmim_jax.tools.evaluate --config=configs/evaluate.py --workdir=RUN --evaluators=linear_probe,finetune

A section has `type` (a file in lmim_jax/evaluators/), `every` and `params` as in configs/vit_b.py, and the evaluator's
own fields. A recipe evaluates while it trains with: config.evaluators.linear_probe = get_config().linear_probe
"""

from ml_collections import ConfigDict


def get_config():
    """Sections by title."""
    config = ConfigDict()

    # -- Those that train, on augmented images. lr = base_lr * batch_size / 256, up along a line from 0, then half a
    # cosine down to min_lr. Epochs here suit sets of some thousand images; comments say what suits ImageNet.
    config.linear_probe = dict(
        type="linear_probe",  # MAE's: batch normalisation + linear layer on a frozen feature
        every=0.0,
        params="online",
        feature="cls",  # of the method's; of patches their mean. I-JEPA has no "cls": "patches"
        batch_size=128,  # MAE: 16384
        epochs=10.0,  # MAE: 90
        warmup_epochs=1.0,  # MAE: 10
        base_lr=12.8,  # MAE: 0.1. Both make lr 6.4: a step of LARS is a share of the weights, whatever the batch
        min_lr=0.0,
        momentum=0.9,
        weight_decay=0.0,
        trust_coefficient=0.001,
        scale=(0.08, 1.0),  # share of the area a crop takes; ratio and flip are those of the run
        seed=0,  # of first weights, order and augmentation
    )
    config.attentive = dict(
        type="attentive",  # CAPI's: one learned query reads frozen patch tokens
        every=0.0,
        params="online",
        feature="patches",  # any with a token for each patch
        batch_size=128,  # CAPI: 1024
        epochs=10.0,  # CAPI: 12,500 steps
        warmup_epochs=1.0,  # CAPI: a tenth
        base_lr=4e-3,  # CAPI: the best of ten, 1e-5 .. 1e-2
        min_lr=0.0,
        b1=0.9,
        b2=0.95,
        weight_decay=1e-3,  # CAPI: the best of 5e-4, 1e-3, 5e-2
        scale=(0.08, 1.0),
        seed=0,
    )
    config.finetune = dict(
        type="finetune",  # MAE's: all weights, from the mean of patches
        every=0.0,
        params="online",
        batch_size=128,  # MAE: 1024
        epochs=10.0,  # MAE: 100 (L, H: 50)
        warmup_epochs=1.0,  # MAE: 5
        base_lr=2e-3,  # MAE: 5e-4 (L, H: 1e-3)
        min_lr=1e-6,
        layer_decay=0.65,  # factor of the learning rate from a block to the one below (L, H: 0.75)
        b1=0.9,
        b2=0.999,
        weight_decay=0.05,  # not of biases, norms, positions and CLS
        drop_path=0.1,  # stochastic depth in the last block, rising from 0 in the first (L: 0.2, H: 0.3)
        randaugment=(2, 9.0, 0.5),  # operations, their magnitude 0 .. 10 and its deviation; 0 operations: none
        erasing=0.25,  # probability of random erasing
        mixup=0.8,  # parameter of the Beta distribution; 0: none
        cutmix=1.0,
        switch=0.5,  # share of batches with cutmix, where there are both
        label_smoothing=0.1,
        scale=(0.08, 1.0),
        remat="none",  # less memory for more time: none | dots | full, as in vit_b.devices, for the encoder as a whole
        seed=0,
    )
    return config
