"""What a run's encoder computes for a few held-out images: the data behind the report's pictures.

Letters: K images, R reference images, h w rows and columns of patches, N = h w, D width, A heads,
H W C rows, columns and channels of an image.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from lmim_jax.data.augment.device import Augment
from lmim_jax.data.eval.eval_data import EvaluationData, Subset
from lmim_jax.evaluators import visualization
from lmim_jax.evaluators.common import classifiers
from lmim_jax.evaluators.common.finite import check_finite
from lmim_jax.methods.base import Views
from lmim_jax.models.modalities import split_channels
from lmim_jax.train.runs import Run
from lmim_jax.utils.errors import UserError

REFERENCE = 32  # R: images whose mean feature at each position is subtracted
FEW = 8  # images whose means at each position would contain much of the images themselves
CHUNK = 8  # images encoded at a time
FINE = 28  # images are enlarged to this many rows or columns of patches, as in the paper's figure
BATCH = 64  # training images encoded at a time in the search for neighbors

Params = dict[str, Any]
Encode = Callable[[Params, dict[str, np.ndarray]], "Encoding"]
Windows = list[tuple[int, int, int, bool]]  # (top, left, side, visible) of each patch, in pixels


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What one set of weights makes of R images.

    Attributes:
      images: as the encoder sees them.
      tokens: `config.representation.patches` of every patch, float32.
      attention: of the last block: from CLS, or else the mean over all querying patches.
    """

    images: UInt8[np.ndarray, "R H W C"]
    tokens: Float[np.ndarray, "R N D"]
    attention: Float[np.ndarray, "R A N"]


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Features and attention of K held-out images.

    Attributes:
      images: as the encoder sees them.
      names: of the classes; of the files of unlabeled images.
      masks: true where the object is; None if the dataset has no masks.
      tokens: patch features; the mean over R images at each position is subtracted.
      untrained_tokens: the same for freshly initialized weights.
      attention: of the last block.
      attention_from_cls: whether CLS attends; otherwise it is the mean over all querying patches.
    """

    images: UInt8[np.ndarray, "K H W C"]
    names: list[str]
    masks: Bool[np.ndarray, "K H W"] | None
    tokens: Float[np.ndarray, "K h w D"]
    untrained_tokens: Float[np.ndarray, "K h w D"]
    attention: Float[np.ndarray, "K A h w"]
    attention_from_cls: bool


@dataclasses.dataclass(frozen=True)
class Translation:
    """Pixels of one modality, predicted from another that is visible as a whole.

    Attributes:
      given: name of the modality that is visible.
      predicted: name of the one that is not.
      images: of each scene: what is given, the prediction, and the truth.
    """

    given: str
    predicted: str
    images: Sequence[tuple[UInt8[np.ndarray, "H W _"], ...]]


@dataclasses.dataclass(frozen=True)
class TrainingViews:
    """What the model is given in training, for a few images; each modality is one of its own.

    Attributes:
      whole_images: without augmentation, each uint8 [H, W, C] of its own size.
      crops: the augmented crops.
      windows: of each crop.
      reconstructions: the crops with predicted pixels; None if the method predicts no pixels.
      translations: every modality from every other; empty with one modality or without pixels.
    """

    whole_images: list[UInt8[np.ndarray, "_ _ C"]]
    crops: list[UInt8[np.ndarray, "H W _"]]
    windows: list[Windows]
    reconstructions: list[UInt8[np.ndarray, "H W _"]] | None
    translations: list[Translation]


@dataclasses.dataclass(frozen=True)
class LabeledImage:
    """An image as the encoder sees it.

    Attributes:
      image: its pixels.
      class_name: "" if it is unlabeled.
      file_name: "" if it has a class.
    """

    image: UInt8[np.ndarray, "H W C"]
    class_name: str
    file_name: str


@dataclasses.dataclass(frozen=True)
class Neighbor:
    """A training image, and the cosine similarity of its mean feature to the query's."""

    labeled_image: LabeledImage
    cosine: float


@dataclasses.dataclass(frozen=True)
class Query:
    """An image, and the training images nearest to it, the nearest first."""

    labeled_image: LabeledImage
    neighbors: list[Neighbor]


def sample_canvases(
    data: EvaluationData, count: int
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """Some readable held-out images, the same ones at every call.

    Returns:
      {"image", "size", "label"} of each image, and their indices in the held-out split.

    Raises:
      UserError: none of them can be read.
    """
    batch, indices = data.sample(data.held_out, count)
    readable = _readable_rows(batch, indices)
    canvases = {}
    for name in ("image", "size", "label"):
        canvases[name] = np.asarray(batch[name])[readable]
    return canvases, tuple(indices[row] for row in readable)


def _readable_rows(batch: dict[str, Any], indices: tuple[int, ...]) -> list[int]:
    """The rows of a sample that could be read.

    Raises:
      UserError: there are none.
    """
    read = np.asarray(batch["index"])[: len(indices)] >= 0
    if not read.any():
        raise UserError(f"not one of {len(indices)} images that were chosen at random can be read")
    return np.flatnonzero(read).tolist()


def encode_images(run: Run, which: str, count: int) -> EncodedImages:
    """Features and attention of `count` held-out images (or all, if there are fewer).

    Args:
      run: the run.
      which: its weights, "online" or "target".
      count: number of images.
    """
    method = run.method
    data = run.data
    canvases, indices = sample_canvases(data, max(count, REFERENCE))
    count = min(count, len(indices))
    augment, grid = _enlarged(run)
    params = run.placed_encoder(which)
    encode = _make_encoder(method, augment, run.config.representation.patches)
    encoding = encode(params, canvases)
    untrained = encode(run.initial_weights(run.mesh).params, canvases)
    heads = encoding.attention.shape[1]
    names = []
    for index, label in zip(indices[:count], canvases["label"], strict=False):
        names.append(class_name(data, label) or file_name(data, data.held_out, index))
    return EncodedImages(
        images=encoding.images[:count],
        names=names,
        masks=_object_masks(data, augment, indices[:count]),
        tokens=_center_tokens(encoding.tokens, count, grid),
        untrained_tokens=_center_tokens(untrained.tokens, count, grid),
        attention=encoding.attention[:count].reshape((count, heads) + grid),
        attention_from_cls=_has_cls(method, params),
    )


def _enlarged(run: Run) -> tuple[Augment, tuple[int, int]]:
    """An augmentation that enlarges images to FINE patches a side, and that grid of patches."""
    method = run.method
    augment = run.data.augment
    zoom = max(1, FINE / max(method.grid))
    rows, columns = (round(zoom * side) for side in method.grid)
    eval_size = (rows * method.patch_size, columns * method.patch_size)
    enlarged = dataclasses.replace(
        augment,
        eval_resize=max(round(zoom * augment.eval_resize), min(eval_size)),
        eval_size=eval_size,
    )
    return enlarged, (rows, columns)


def _center_tokens(
    tokens: Float[np.ndarray, "R N D"], count: int, grid: tuple[int, int]
) -> Float[np.ndarray, "K h w D"]:
    """Tokens of the first `count` images, with the mean over all images subtracted.

    It is the mean at each position, unless there are too few images for that.
    """
    axes: tuple[int, ...] = (0,)
    if len(tokens) < FEW:
        axes = (0, 1)
    centered = tokens - tokens.mean(axis=axes, keepdims=True)
    return centered[:count].reshape((count,) + grid + (-1,))


def _object_masks(
    data: EvaluationData, augment: Augment, indices: tuple[int, ...]
) -> Bool[np.ndarray, "K H W"] | None:
    """Masks of held-out images, resized like the images; None if the dataset has none."""
    masks = data.object_masks(data.held_out, indices)
    if masks is None:
        return None
    levels = np.asarray(augment.denormalize(augment.evaluation(masks)))
    return levels.mean(-1) > 127


def _has_cls(method: Any, params: Params) -> bool:
    """Whether the encoder has a CLS token."""
    images = jnp.zeros((1,) + tuple(method.feature_size) + (method.channels,))
    return "cls" in jax.eval_shape(method.features, params, images)


def class_name(data: EvaluationData, label: int) -> str:
    """The name of a class index; "" for an unlabeled image."""
    if 0 <= label < len(data.classes):
        return data.classes[label]
    return ""


def file_name(data: EvaluationData, split: str, index: int) -> str:
    """The name of an image without its folder and its suffix."""
    return pathlib.PurePath(data.sources[split].name(index)).stem


def _make_encoder(method: Any, augment: Augment, feature: str) -> Encode:
    """A function of (params, canvases) that encodes images, CHUNK at a time.

    Attention on a fine grid needs too much memory for many images at once.
    """

    @jax.jit
    def encode_chunk(params, chunk):
        images = augment.evaluation(chunk)
        features = method.features(params, images)
        tokens = features[feature].astype(jnp.float32)
        return augment.denormalize(images), tokens, _last_attention(features)

    def encode(params: Params, canvases: dict[str, np.ndarray]) -> Encoding:
        total = len(canvases["image"])
        images = []
        tokens = []
        attention = []
        for start in range(0, total, CHUNK):
            rows = np.arange(start, start + CHUNK) % total  # a full chunk: one compilation
            chunk = {name: canvases[name][rows] for name in ("image", "size")}
            chunk_images, chunk_tokens, chunk_attention = jax.device_get(
                encode_chunk(params, chunk)
            )
            check_finite(chunk_tokens, params, chunk_images)
            images.append(chunk_images)
            tokens.append(chunk_tokens)
            attention.append(chunk_attention)
        return Encoding(
            images=_to_uint8(np.concatenate(images)[:total]),
            tokens=np.concatenate(tokens)[:total],
            attention=np.concatenate(attention)[:total],
        )

    return encode


def _last_attention(features: dict[str, Array]) -> Float[Array, "B A N"]:
    """Attention of the last block to the patches, from CLS or else averaged over all patches."""
    last_block = max(name for name in features if name.endswith("/attention"))
    attention = features[last_block]
    if "cls" in features:
        return attention[:, :, 0, 1:]
    return attention.mean(axis=2)


def _to_uint8(levels: np.ndarray) -> np.ndarray:
    """Pixel levels as uint8; values outside 0 .. 255 are clipped."""
    return np.clip(levels, 0, 255).astype(np.uint8)


def training_views(run: Run, count: int) -> TrainingViews:
    """What the model is given in training for `count` held-out images."""
    method = run.method
    augment = run.data.augment
    canvases, _ = sample_canvases(run.data, count)
    batch = {name: canvases[name] for name in ("image", "size")}
    draw = visualization.jit_training_views(method, augment, run.data.mesh)
    crops, views = jax.device_get(draw(batch))
    whole_images = []
    for canvas, (height, width) in zip(batch["image"], batch["size"], strict=True):
        whole_images.append(canvas[:height, :width])
    painted = None
    translations: list[Translation] = []
    if hasattr(method, "reconstruct"):

        @jax.jit
        def jit_reconstruct(params, crops, views):
            return augment.denormalize(method.reconstruct(params, augment.normalize(crops), views))

        def reconstruct(views):
            pixels = jit_reconstruct(run.placed_weights.params, crops, views)
            return _to_uint8(jax.device_get(pixels))

        painted = reconstruct(views)
        translations = _translations(method, _to_uint8(crops), reconstruct)
    found = TrainingViews([], [], [], None if painted is None else [], translations)
    for k, crop in enumerate(_to_uint8(crops)):
        found.whole_images.extend(split_channels(whole_images[k], method.inputs))
        found.crops.extend(split_channels(crop, method.inputs))
        for number in range(len(method.inputs)):
            found.windows.append(visualization.training_windows(method, views, k, number))
        if found.reconstructions is not None and painted is not None:
            found.reconstructions.extend(split_channels(painted[k], method.inputs))
    return found


def _translations(
    method: Any,
    crops: UInt8[np.ndarray, "B H W C"],
    reconstruct: Callable[[Views], UInt8[np.ndarray, "B H W C"]],
) -> list[Translation]:
    """Every modality, predicted from every other."""
    if not method.modalities:
        return []
    names = [modality.name for modality in method.modalities]
    count = method.num_patches
    tokens = np.arange(count * len(names), dtype=np.int32)
    found = []
    for number, name in enumerate(names):
        # Methods want as many masked patches of every modality: those that are given, too
        given = tokens[number * count : (number + 1) * count]
        views = {
            "visible": np.tile(given, (len(crops), 1)),
            "masked": np.tile(tokens, (len(crops), 1)),
        }
        painted = split_channels(reconstruct(views), method.inputs)
        true = split_channels(crops, method.inputs)
        for other, other_name in enumerate(names):
            if other != number:
                rows = list(zip(true[number], painted[other], true[other], strict=True))
                found.append(Translation(name, other_name, rows))
    return found


def nearest_neighbors(
    run: Run, which: str, queries: int, count: int, bank: int
) -> tuple[list[Query], int]:
    """The training images nearest to some held-out ones, by cosine similarity of mean features.

    Args:
      run: the run.
      which: its weights, "online" or "target".
      queries: number of held-out images.
      count: neighbors of each.
      bank: at most this many training images, drawn at random, are searched.

    Returns:
      The queries with their neighbors, and the number of training images searched.
    """
    data = run.data
    train = data.sources["train"]
    searched = np.sort(np.random.default_rng(0).permutation(len(train))[:bank])
    params = run.placed_encoder(which)
    feature = run.config.representation.patches
    encode = jax.jit(functools.partial(_mean_features, run.method, feature))
    batch, query_indices = data.sample(data.held_out, queries)
    rows = _readable_rows(batch, query_indices)
    query_indices = tuple(query_indices[row] for row in rows)
    query_features = np.asarray(encode(params, batch["images"]))[rows]
    bank_features, bank_ids = _encode_bank(run, functools.partial(encode, params), searched)
    queries_normalized = classifiers.l2_normalize_rows(query_features)
    cosines = queries_normalized @ classifiers.l2_normalize_rows(bank_features).T
    if data.held_out == "train":  # an image is not its own neighbor
        cosines[np.asarray(query_indices)[:, None] == bank_ids[None]] = -np.inf
    count = min(count, int(np.isfinite(cosines).sum(axis=1).min(initial=count)))
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    thumbnails = _thumbnails(data, train, bank_ids[order].ravel())
    images = _as_seen(data, batch)[rows]
    labels = np.asarray(batch["label"])[rows]
    found = []
    for k, nearest in enumerate(order):
        neighbors = []
        for i in nearest:
            neighbors.append(Neighbor(thumbnails[int(bank_ids[i])], float(cosines[k, i])))
        query = _describe(data, data.held_out, int(query_indices[k]), images[k], labels[k])
        found.append(Query(query, neighbors))
    return found, len(searched)


def _mean_features(
    method: Any, feature: str, params: Params, images: Float[Array, "B H W C"]
) -> Float[Array, "B D"]:
    """The mean patch feature of each image."""
    return method.features(params, images)[feature].astype(jnp.float32).mean(1)


def _encode_bank(
    run: Run,
    encode: Callable[[Array], Array],
    searched: Int[np.ndarray, " M"],
) -> tuple[Float[np.ndarray, "M D"], Int[np.ndarray, " M"]]:
    """Mean features of the readable ones of the training images `searched`, and their indices."""
    selected = Subset(run.data.sources["train"], tuple(searched.tolist()))
    data = _with_train_source(run.data, selected)
    features = []
    positions = []
    for batch in data.batches("train", BATCH):
        features.append(np.asarray(encode(batch["images"])))
        positions.append(batch["index"])
    position = np.concatenate(positions)
    readable = position >= 0
    return np.concatenate(features)[readable], searched[position[readable]]


def _with_train_source(data: EvaluationData, source: Subset) -> EvaluationData:
    """The same preprocessing for other training images."""
    return EvaluationData({"train": source, "test": None}, data.config, data.augment, data.mesh)


def _as_seen(data: EvaluationData, batch: dict[str, Any]) -> UInt8[np.ndarray, "B H W C"]:
    """Images of a batch as the encoder sees them."""
    return _to_uint8(np.asarray(data.augment.denormalize(batch["images"])))


def _describe(
    data: EvaluationData, split: str, index: int, image: UInt8[np.ndarray, "H W C"], label: int
) -> LabeledImage:
    """An image of a split with the name of its class, or else of its file."""
    name = class_name(data, label)
    if name:
        return LabeledImage(image, name, "")
    return LabeledImage(image, "", file_name(data, split, index))


def _thumbnails(
    data: EvaluationData, source: Any, indices: Int[np.ndarray, " M"]
) -> dict[int, LabeledImage]:
    """{index: image} of some images of a source, as the encoder sees them."""
    chosen = np.unique(indices)
    if not len(chosen):
        return {}
    selected = Subset(source, tuple(chosen.tolist()))
    batch, order = _with_train_source(data, selected).sample("train", len(chosen))
    images = _as_seen(data, batch)
    labels = np.asarray(batch["label"])
    thumbnails = {}
    for row, i in enumerate(order):
        index = int(chosen[i])
        thumbnails[index] = _describe(data, "train", index, images[row], labels[row])
    return thumbnails
