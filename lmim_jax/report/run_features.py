"""What a run's encoder makes of a few held-out images, as arrays: the material of tools/report_pictures.py.

Letters: K images, R reference images, h w rows and columns of patches on the finer grid, N = h w, D width, A heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lmim_jax.data.eval.eval_data import EvaluationData, Subset
from lmim_jax.evaluators import visualization as drawn

FEATURE = "patches_prenorm"  # the official feature: tokens of patches before the final norm
REFERENCE = 32  # R: images whose mean feature at each position is subtracted
CHUNK = 8  # images at a time
FINE = 28  # images are enlarged to so many rows or columns of patches, as in the paper's figure
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Seen:
    """Of K held-out images.

    images uint8 [K, H, W, C] as the encoder sees them; classes: their names, "" where unlabelled;
    masks bool [K, H, W], or None; tokens [K, h, w, D], the mean over R images at each position subtracted;
    untrained: the same of fresh weights; attention [K, A, h, w] of the last block, from CLS (`from_cls`) or else the
    mean over all patches that look.
    """

    images: np.ndarray
    classes: list
    masks: np.ndarray | None
    tokens: np.ndarray
    untrained: np.ndarray
    attention: np.ndarray
    from_cls: bool


def canvases(data, count):
    """The same few held-out images each time: ({"image", "size", "label"}, indices), numpy."""
    batch, indices = data.sample(data.held_out, count)
    return {
        name: np.asarray(batch[name])[: len(indices)] for name in ("image", "size", "label")
    }, indices


def look(run, count):
    """The `Seen` of `count` held-out images."""
    method, data = run.method, run.data
    batch, indices = canvases(data, max(count, REFERENCE))
    count = min(count, len(indices))
    zoom = max(1, FINE / max(method.grid))
    grid = tuple(round(zoom * side) for side in method.grid)
    augment = dataclasses.replace(
        data.augment,
        eval_resize=round(zoom * data.augment.eval_resize),
        eval_size=tuple(side * method.patch_size for side in grid),
    )
    encode = _encoding(method, augment)
    fresh = jax.jit(method.init)(jax.random.key(run.config.seed))
    images, tokens, attention = encode(run.params, batch, count)
    _, untrained, _ = encode(fresh, batch, count)
    masks = data.object_masks(data.held_out, indices[:count])
    if masks is not None:
        masks = np.asarray(augment.levels(augment.evaluation(masks))).mean(-1) > 127
    centred = lambda x: (x - x.mean(axis=0))[:count].reshape(count, *grid, -1)
    return Seen(
        images,
        [class_name(data, label) for label in batch["label"][:count]],
        masks,
        centred(tokens),
        centred(untrained),
        attention.reshape(*attention.shape[:2], *grid),
        "cls"
        in jax.eval_shape(
            method.features, run.params, jnp.zeros((1, *method.feature_size, method.channels))
        ),
    )


def class_name(data, label):
    """The name of a class number; "" for none."""
    return data.classes[label] if 0 <= label < len(data.classes) else ""


def _encoding(method, augment):
    """(params, canvases of R images, count K) -> (images uint8 [K, H, W, C], FEATURE [R, N, D], attention [K, A, N]).

    A few images at a time: attention on a fine grid is large.
    """

    @jax.jit
    def encode(params, chunk):
        images = augment.evaluation(chunk)
        features = method.features(params, images)
        attention = features[max(name for name in features if name.endswith("/attention"))]
        attention = attention[:, :, 0, 1:] if "cls" in features else attention.mean(axis=2)
        return augment.levels(images), features[FEATURE].astype(jnp.float32), attention

    def all_of(params, batch, count):
        total, found = len(batch["image"]), []
        for start in range(0, total, CHUNK):
            rows = np.arange(start, start + CHUNK) % total  # one shape, one compilation
            found.append(
                jax.device_get(
                    encode(params, {name: batch[name][rows] for name in ("image", "size")})
                )
            )
        images, tokens, attention = (
            np.concatenate(part)[:total] for part in zip(*found, strict=True)
        )
        return np.clip(images, 0, 255).astype(np.uint8)[:count], tokens, attention[:count]

    return all_of


def given(run, count):
    """What training sees of some images: (whole images, crops, windows of each, reconstructions or None), uint8."""
    method, augment = run.method, run.data.augment
    batch, _ = canvases(run.data, count)
    batch = {name: batch[name] for name in ("image", "size")}
    crops, views = jax.device_get(drawn.drawing(method, augment, run.data.mesh)(batch))
    windows = [drawn.windows_of(method, views, k) for k in range(len(crops))]
    wholes = [canvas[:h, :w] for canvas, (h, w) in zip(batch["image"], batch["size"], strict=True)]
    rebuilt = None
    if hasattr(method, "reconstruct"):
        repaint = lambda params, crops, views: augment.levels(
            method.reconstruct(params, augment.normalize(crops), views)
        )
        rebuilt = np.clip(
            jax.device_get(jax.jit(repaint)(run.params, crops, views)), 0, 255
        ).astype(np.uint8)
    return wholes, np.clip(crops, 0, 255).astype(np.uint8), windows, rebuilt


def neighbours(run, queries, count, bank):
    """The nearest of `bank` training images to some held-out ones, by cosine of mean features.

    Returns:
      [(picture, class, [(picture, class, cosine), ...]), ...], pictures uint8 [H, W, C] as the encoder sees them; and
      the number of training images searched.
    """
    data, train = run.data, run.data.sources["train"]
    taken = np.sort(np.random.default_rng(0).permutation(len(train))[:bank])
    among = Subset(train, tuple(taken.tolist()))
    pooled = jax.jit(
        lambda params, images: (
            run.method.features(params, images)[FEATURE].astype(jnp.float32).mean(1)
        )
    )
    batch, asked = data.sample(data.held_out, queries)
    wanted = np.asarray(pooled(run.params, batch["images"]))[: len(asked)]
    searched = EvaluationData({"train": among, "test": None}, data.config, data.augment, data.mesh)
    rows = [
        (np.asarray(pooled(run.params, x["images"])), x["index"])
        for x in searched.batches("train", BATCH)
    ]
    found, index = (np.concatenate(column) for column in zip(*rows, strict=True))
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    cosines = unit(wanted) @ unit(found[index >= 0]).T
    ids = taken[index[index >= 0]]
    if data.held_out == "train":  # not the image itself
        cosines[np.asarray(asked)[:, None] == ids[None]] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    shown = _thumbnails(data, train, ids[order].ravel())
    pictures, names = (
        _levels(data, batch),
        [class_name(data, label) for label in np.asarray(batch["label"])],
    )
    lists = [
        [(*shown[ids[i]], float(row[i])) for i in best]
        for row, best in zip(cosines, order, strict=True)
    ]
    return list(zip(pictures, names, lists, strict=False)), len(among)


def _levels(data, batch):
    """Images of a batch as the encoder sees them, uint8 [B, H, W, C]."""
    return np.clip(np.asarray(data.augment.levels(batch["images"])), 0, 255).astype(np.uint8)


def _thumbnails(data, source, indices):
    """{index: (picture uint8 [H, W, C], class)} of some images of a source."""
    chosen = np.unique(indices)
    few = EvaluationData(
        {"train": Subset(source, tuple(chosen.tolist()))}, data.config, data.augment, data.mesh
    )
    batch, order = few.sample("train", len(chosen))
    pictures, labels = _levels(data, batch), np.asarray(batch["label"])
    return {
        int(chosen[i]): (pictures[row], class_name(data, labels[row]))
        for row, i in enumerate(order)
    }
