"""Image augmentation on the device: crop, antialiased resize, flip, normalise, as pure JAX on uint8 canvases.

The host only decodes. An image lies at the top left of a fixed canvas [K, K, C] uint8 with its true size; a crop is
resized by two matrix products, columns then rows, equal to Pillow's antialiased resize within 1 level.

Letters: B batch, K canvas side, C channels, S output side.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lmim_jax.errors import UserError

PRECISION = jax.lax.Precision.HIGH  # pixel values need more than bfloat16's 8 bits


def bicubic(x):
    """Keys' cubic convolution kernel with a = -0.5, Pillow's BICUBIC; support 2."""
    x = jnp.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, inner, jnp.where(x < 2, outer, 0.0))


def bilinear(x):
    """Triangle kernel, Pillow's BILINEAR; support 1."""
    return jnp.maximum(1 - jnp.abs(x), 0.0)


KERNELS = {"bicubic": bicubic, "bilinear": bilinear}


def resize_weights(start, length, low, high, canvas, size, kernel):
    """The matrix [S, K] that resizes the interval [start, start + length) of an axis to S samples.

    Where the interval is shrunk the kernel is widened by the scale (antialiasing); weights outside [low, high), the
    samples that may be read, are 0, and each row sums to 1, as in Pillow.

    Args:
      start, length: the box along this axis, in canvas samples (scalars, any float).
      low, high: valid range: the box itself when the image is cropped first (training), the image otherwise.
      canvas: K. size: S. kernel: function of the distance in source samples.
    """
    scale = length / size
    width = jnp.maximum(scale, 1.0)
    center = start + (jnp.arange(size) + 0.5) * scale
    samples = jnp.arange(canvas)
    weights = kernel((samples[None, :] + 0.5 - center[:, None]) / width)
    weights = jnp.where((samples >= low) & (samples < high), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def crop_resize(image, box, valid, size, kernel):
    """Resize a box of one canvas to S x S' pixels, rounded to whole levels after each axis, as Pillow does.

    Args:
      image: [K, K, C] uint8. box: (top, left, height, width). valid: (top, left, bottom, right), what may be read.
      size: (S, S'), rows and columns. kernel: a value of KERNELS.

    Returns:
      float32 [S, S', C] of whole numbers in 0 .. 255.
    """
    canvas = image.shape[0]
    rows = resize_weights(box[0], box[2], valid[0], valid[2], canvas, size[0], kernel)
    columns = resize_weights(box[1], box[3], valid[1], valid[3], canvas, size[1], kernel)
    level = lambda x: jnp.clip(jnp.floor(x + 0.5), 0, 255)
    x = level(jnp.einsum("sj,ijc->isc", columns, image.astype(jnp.float32), precision=PRECISION))
    return level(jnp.einsum("ti,isc->tsc", rows, x, precision=PRECISION))


def sample_crop(key, height, width, scale, ratio):
    """A random-resized-crop box (top, left, height, width), int32, drawn as torchvision's `RandomResizedCrop` does.

    Ten tries of an area share uniform on `scale` and an aspect log-uniform on `ratio`; if none fits, the centre with
    the nearest allowed aspect.
    """
    keys = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(keys[0], (10,), minval=scale[0], maxval=scale[1])
    aspect = jnp.exp(jax.random.uniform(keys[1], (10,), minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1])))
    crop_w = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    crop_h = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (crop_w > 0) & (crop_w <= width) & (crop_h > 0) & (crop_h <= height)
    first = jnp.argmax(fits)
    crop_h, crop_w = crop_h[first], crop_w[first]
    top = jnp.floor(jax.random.uniform(keys[2]) * (height - crop_h + 1)).astype(jnp.int32)
    left = jnp.floor(jax.random.uniform(keys[3]) * (width - crop_w + 1)).astype(jnp.int32)
    center_h = jnp.where(width < ratio[0] * height, jnp.round(width / ratio[0]), height).astype(jnp.int32)
    center_w = jnp.where(width > ratio[1] * height, jnp.round(height * ratio[1]), width).astype(jnp.int32)
    found = jnp.stack([jnp.minimum(top, height - crop_h), jnp.minimum(left, width - crop_w), crop_h, crop_w])
    center = jnp.stack([(height - center_h) // 2, (width - center_w) // 2, center_h, center_w])
    return jnp.where(fits.any(), found, center)


@dataclasses.dataclass(frozen=True)
class Augment:
    """The fields are `config.augment`. Called on a batch it gives training images, `evaluation` gives test images."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    eval_resize: int
    eval_size: tuple[int, int]

    def __post_init__(self):
        if self.interpolation not in KERNELS:
            raise UserError(f"config.augment.interpolation={self.interpolation!r} is none of: {' | '.join(KERNELS)}")

    def _constants(self, images):
        shape = (1,) * (images.ndim - 1) + (-1,)
        return (jnp.asarray(x, jnp.float32).reshape(shape) for x in (self.mean, self.std))

    def normalize(self, images):
        """Levels 0 .. 255 [..., C] -> (x / 255 - mean) / std, float32."""
        mean, std = self._constants(images)
        return (images / 255 - mean) / std

    def levels(self, images):
        """The inverse of `normalize`: whole levels 0 .. 255, float32."""
        mean, std = self._constants(images)
        return jnp.round((images * std + mean) * 255)

    def __call__(self, keys, batch):
        """Random-resized crop, flip, normalise.

        Args:
          keys: [B], one key per image.
          batch: image [B, K, K, C] uint8, size [B, 2] int32 (height, width).

        Returns:
          float32 [B, *image_size, C].
        """
        kernel = KERNELS[self.interpolation]

        def one(key, image, size):
            crop_key, flip_key = jax.random.split(key)
            top, left, height, width = box = sample_crop(crop_key, size[0], size[1], self.scale, self.ratio)
            x = crop_resize(image, box, (top, left, top + height, left + width), self.image_size, kernel)
            return jnp.where(jax.random.bernoulli(flip_key), x[:, ::-1], x) if self.flip else x

        return self.normalize(jax.vmap(one)(keys, batch["image"], batch["size"]))

    def evaluation(self, batch):
        """Short side to `eval_resize`, centre crop of `eval_size`, normalise: float32 [B, *eval_size, C].

        The resize may read the whole image, so it equals resizing first and cropping afterwards.
        """
        kernel = KERNELS[self.interpolation]

        def one(image, size):
            # torchvision: the long side is int(resize * long / short); centre crop offsets round half to even.
            resized = self.eval_resize * size // jnp.min(size)
            scale = size / resized
            crop = jnp.asarray(self.eval_size)
            box = jnp.concatenate([jnp.round((resized - crop) / 2) * scale, crop * scale])
            return crop_resize(image, box, (0, 0, size[0], size[1]), self.eval_size, kernel)

        return self.normalize(jax.vmap(one)(batch["image"], batch["size"]))


def from_config(config, *, image_size, eval_size):
    """Build the augmentation from `config.augment`; sizes come from the method."""
    return Augment(**config, image_size=tuple(image_size), eval_size=tuple(eval_size))
