"""The model card of an exported folder, README.md.

It says what the model is, how to open it, how it was trained, how it performed, which license
applies and what to cite.
"""

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import lmim_jax
from lmim_jax.convert import onnx, origin
from lmim_jax.convert.trained_model import TrainedModel
from lmim_jax.data import decode
from lmim_jax.data.image_options import ImageOptions, format_ranges
from lmim_jax.data.modalities import TRAINING_IMAGES
from lmim_jax.utils import buckets

NO_LICENSE = "other"  # the name that the Hugging Face Hub has for it
LIBRARIES = {  # format -> the name of its library on the Hub
    "timm": "timm",
    "hf": "transformers",
    "onnx": "onnx",
    "mmseg": "mmsegmentation",
    "detectron2": "detectron2",
    "flax": "lmim_jax",
    "safetensors": "safetensors",
}

USAGE = {
    "timm": """```python
{imports}

model = timm.create_model("{source}", pretrained=True).eval()
{images}
with torch.no_grad():
    mean = model(images)                     # [1, {width}]: the mean of the patches
    tokens = model.forward_features(images)  # [1, {tokens}, {width}]: {order}
```""",
    "hf": """```python
{imports}

model = AutoModel.from_pretrained("{source}", add_pooling_layer=False).eval()
{images}
with torch.no_grad():
    tokens = model(**images).last_hidden_state  # [1, {tokens}, {width}]: {order}
mean = tokens[:, {first_patch}:].mean(dim=1)
```""",
    "onnx": """```python
{imports}

session = onnxruntime.InferenceSession("model.onnx")
{images}
# [1, {width}] and [1, {patches}, {width}]
mean, patches = session.run(["mean", "patches"], {{"images": images}})
```""",
    "mmseg": """```sh
python tools/train.py PATH/config.py  # in a clone of mmsegmentation 1.2
mim train mmsegmentation config.py    # the same, in any folder
```

`config.py` is UPerNet on this encoder, for ADE20K in `data/ade`; change `num_classes`, data and
schedule there. `backbone.pth` holds the weights of the encoder; those of the heads begin at
random.""",
    "detectron2": """```sh
tools/lazyconfig_train_net.py --config-file=PATH/config.py --num-gpus=8  # in a clone of detectron2
```

`config.py` is Mask R-CNN with ViTDet on this encoder, for COCO in the folder that the environment
variable `DETECTRON2_DATASETS` names. `backbone.pth` holds the weights of the encoder; all others
begin at random, relative positions at zero.""",
    "flax": """```python
import lmim_jax

model = lmim_jax.load(".")
images = model.preprocess([{image}])  # [1, {image_height}, {image_width}, {channels}], as described below
features = model.encode(images)           # features.mean, features.patches; features.cls, if any
```""",  # noqa: E501
    "safetensors": """```sh
lmim import-weights model.safetensors --format={method} \\
    --config=RECIPE --workdir=RUN --nodata
```""",
}
# How the code of a card reads an image, by library: imports, and lines
PICTURES = {
    "timm": (
        "import timm, torch\nfrom PIL import Image",
        """prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = prepare(Image.open("image.jpg").convert("{mode}"))[None]""",
    ),
    "hf": (
        "import torch\nfrom PIL import Image\n"
        "from transformers import AutoImageProcessor, AutoModel",
        """prepare = AutoImageProcessor.from_pretrained("{source}")
images = prepare(Image.open("image.jpg").convert("{mode}"), return_tensors="pt")""",
    ),
    "onnx": (
        "import numpy as np, onnxruntime\nfrom PIL import Image, ImageOps",
        """image = Image.open("image.jpg").convert("{mode}")
size = ({image_width}, {image_height})
crop = ImageOps.fit(image, size, Image.Resampling.{filter}, bleed={bleed:.4g})
pixels = np.asarray(crop, np.float32).reshape({image_height}, {image_width}, {channels}) / 255
images = np.float32((pixels - {mean}) / {std}).transpose(2, 0, 1)[None]""",
    ),
}
BANDS = """# [{image_height}, {image_width}, {channels}], resized and cropped as below
levels = np.load("image.npy")  # 0 .. 255
images = np.float32((levels / 255 - {mean}) / {std}).transpose(2, 0, 1)[None]"""
# The same of images with bands that Pillow has no mode for
ARRAYS = {
    "timm": ("import numpy as np, timm, torch", f"{BANDS}\nimages = torch.from_numpy(images)"),
    "hf": (
        "import numpy as np, torch\nfrom transformers import AutoModel",
        f'{BANDS}\nimages = {{{{"pixel_values": torch.from_numpy(images)}}}}',
    ),
    "onnx": ("import numpy as np, onnxruntime", BANDS),
}
OTHER_SIZES = {
    "timm": "`create_model(..., img_size=...)`",
    "hf": "`model(..., interpolate_pos_encoding=True)`",
}
# From where a library loads the model: from this folder, or from the Hub
SOURCES = {"timm": ("local-dir:.", "hf-hub:{}"), "hf": (".", "{}")}
WEIGHTS = {
    "online": "the trained encoder",
    "target": "the teacher, an exponential moving average of the encoder",
    "both": "all networks",
}
RANDOM_TEACHER = "the encoder with random weights, as it was at the start"
# Options that are paths on the machine of the run; so is `classes`, where it is no list of names
PATHS = (
    *("path", "dir", "cache", "stage", "labels", "init_from"),
    *("images", "masks", "listed", "lists"),  # of evaluators
)
ROOTS = ("/", "~", "gs://")  # other options with such a beginning are paths too
FROZEN_TEACHER = "frozen:"  # config.method.target, before the path of a run

# Columns of the table of results: key of a value -> head
COLUMNS = {
    "majority": "most frequent class",
    "pixels": "raw pixels",
    "histogram": "colors",
    "untrained": "untrained",
    "trained": "trained",
}
COLLAPSE_METRICS = {
    "collapse_index": "collapse index (1 means total collapse)",
    "effective_rank": "effective rank of features",
}
# Keys of summary.json with the baselines of a metric, where the two differ
BASELINE_KEYS = {"accuracy": "linear"}


def write(
    model: TrainedModel,
    kind: str,
    which: str,
    license_name: str = "",
    base_model: str = "",
    repo: str = "",
) -> str:
    """Write the text of the card.

    Args:
      model: the exported model.
      kind: --format of the export.
      which: the exported weights: "online", "target" or "both".
      license_name: of the weights, as the Hugging Face Hub names licenses; "": not chosen yet.
      base_model: the model on the Hub that training began with; "": none.
      repo: USER/NAME on the Hub, where the folder will be; "": nowhere.
    """
    has_cls = "cls_token" in model.params["encoder"]
    begun = origin.read(model.folder)
    sections = [
        _front_matter(kind, license_name, base_model),
        *_introduction(model, which),
        "## Use",
        _place(kind, repo),
        USAGE[kind].format(**_usage_values(model, kind, has_cls, repo)),
        _advice(kind, has_cls),
        "## Images",
        _preprocessing(model, kind),
        "## Training",
        _training(model),
        "## Results",
        _results(model),
        "## Base model",
        _base_model(begun, base_model),
        "## License",
        _license(begun, license_name),
        "## Citation",
        _citation(model),
        "<details>\n<summary>Config</summary>",
        f"```json\n{json.dumps(public_config(model.config), indent=2)}\n```",
        "</details>",
    ]
    return "\n\n".join(sections) + "\n"


def public_config(config: Any) -> dict[str, Any]:
    """Convert a ConfigDict to plain values, without the paths of the machine that it ran on."""
    return _without_paths(json.loads(config.to_json()))


def _without_paths(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a config, and those in it, with empty values in place of paths."""
    kept: dict[str, Any] = {}
    for key, value in section.items():
        kept[key] = value
        if isinstance(value, dict):
            kept[key] = _without_paths(value)
        elif isinstance(value, list) and key in PATHS:
            kept[key] = []
        elif isinstance(value, str) and (key in (*PATHS, "classes") or value.startswith(ROOTS)):
            kept[key] = ""
        elif isinstance(value, str) and value.startswith(FROZEN_TEACHER):
            kept[key] = FROZEN_TEACHER.removesuffix(":")
    return kept


def _front_matter(kind: str, license_name: str, base_model: str) -> str:
    """What the Hugging Face Hub reads of a card."""
    lines = [
        f"library_name: {LIBRARIES[kind]}",
        "pipeline_tag: image-feature-extraction",
        f"license: {license_name or NO_LICENSE}",
    ]
    if base_model:
        lines.append(f"base_model: {base_model}")
    lines.append('tags: ["masked-image-modeling"]')
    return "\n".join(["---", *lines, "---"])


def _base_model(begun: origin.Origin, base_model: str) -> str:
    """Sentences on the weights that training began with.

    Args:
      begun: where the weights come from.
      base_model: see `write`.
    """
    sentences = origin.sentences(begun)
    if base_model:
        sentences.insert(0, f"{base_model}.")
    elif begun is not None and not {"imported", "init_from"} & begun.keys():
        sentences.insert(0, "None: training began with random weights.")
    return " ".join(sentences)


def _license(begun: origin.Origin, license_name: str) -> str:
    """Sentences on the license of the weights; see `write`."""
    text = f"These weights: {license_name}."
    if not license_name:
        text = (
            "No license has been chosen for these weights: set `license` at the top of this file."
        )
    if origin.has_imported_weights(begun):
        text += " The license of the imported weights applies to them too."
    return f"{text} The code, `lmim_jax`: Apache-2.0."


def _citation(model: TrainedModel) -> str:
    """What to cite: the paper of the method, which its module names first, and the code."""
    module = importlib.import_module(type(model.method).__module__)
    paper = (module.__doc__ or "").strip().partition("\n")[0]
    return f"- the method: {paper}\n- the code: lmim_jax {lmim_jax.__version__}"


def _grid_text(model: TrainedModel) -> str:
    rows, columns = model.method.grid
    return f"{rows} x {columns} patches"


def _introduction(model: TrainedModel, which: str) -> list[str]:
    """Title and first paragraph."""
    method = model.method
    name = model.config.method.name
    height, width = method.feature_size
    weights = WEIGHTS[which]
    if which == "target" and model.config.method.get("target") == "random":
        weights = RANDOM_TEACHER
    text = (
        f"A Vision Transformer pretrained by {name} without labels, with `lmim_jax`: "
        f"{weights}. It takes images of {height} x {width} pixels and computes "
        f"{method.width} features for each of {_grid_text(model)}. All weights are float32."
    )
    if which != "both":
        text += " There is no head."
    return [
        f"# {name}: {method.depth} layers, width {method.width}, patch size {method.patch_size}",
        text,
    ]


def _place(kind: str, repo: str) -> str:
    """Words on where the code that follows runs."""
    if not repo:
        return "In the folder of this file:"
    if kind in SOURCES:
        return "Anywhere:"
    return f"In the folder that `hf download {repo} --local-dir=FOLDER` makes:"


def _usage_values(model: TrainedModel, kind: str, has_cls: bool, repo: str) -> dict[str, Any]:
    """Values to fill into USAGE."""
    method = model.method
    augment = model.config.augment
    local, remote = SOURCES.get(kind, ("", ""))
    height, width = method.feature_size
    order = _grid_text(model)
    if has_cls:
        order = f"CLS, then {order}"
    readers = PICTURES if method.channels in decode.MODES else ARRAYS
    imports, lines = readers.get(kind, ("", ""))
    image = '"image.jpg"'
    if method.modalities:
        image = "array"
    elif readers is ARRAYS:
        image = '"image.tif"'
    values = {
        "method": model.config.method.name,
        "mode": decode.MODES.get(method.channels),
        "image": image,
        "imports": imports,
        "width": method.width,
        "tokens": method.num_patches + int(has_cls),
        "first_patch": int(has_cls),
        "order": order,
        "image_height": height,
        "image_width": width,
        "channels": method.channels,
        "source": remote.format(repo) if repo else local,
        "patches": method.num_patches,
        "filter": augment.interpolation.upper(),
        "bleed": (1 - min(height, width) / augment.eval_resize) / 2,
        "mean": tuple(augment.mean),
        "std": tuple(augment.std),
    }
    return {**values, "images": lines.format(**values)}


def _advice(kind: str, has_cls: bool) -> str:
    """A paragraph on what is easily overlooked."""
    if kind == "safetensors":
        return (
            "Names and layouts are those of the method's official PyTorch code, including constant "
            "positions."
        )
    if kind == "detectron2":
        return (
            "ViTDet has no CLS token and no last norm, and most of its blocks attend within "
            "windows: its features are not those that were measured below, and it is meant to be "
            "trained as a whole."
        )
    sentences = ["Features are taken after the final norm."]
    if kind == "onnx":
        sentences.append(
            f"`model.onnx` (opset {onnx.OPSET}) takes any number of normalized images of this size."
        )
    if kind == "mmseg":
        sentences.append("The first three feature maps of UPerNet come without it.")
    if kind in OTHER_SIZES:
        sentences.append(
            f"For other image sizes, use {OTHER_SIZES[kind]}, which interpolates the positions in "
            "a slightly different way than `lmim_jax`."
        )
    if has_cls:
        sentences.append(
            "Not every method trains its CLS token; when in doubt, take the mean of the patches."
        )
    return " ".join(sentences)


def _preprocessing(model: TrainedModel, kind: str) -> str:
    """A paragraph on how images must be prepared."""
    augment = model.config.augment
    height, width = model.method.feature_size
    resize = f"Resize the short side to {augment.eval_resize} pixels"
    if height != width:
        share = augment.eval_resize / min(height, width)
        resize = f"Resize until {share * height:.0f} x {share * width:.0f} pixels are covered"
    text = (
        f"{resize} ({augment.interpolation}, "
        f"antialiased), crop the center of {height} x {width} pixels, scale channels to 0 .. 1, "
        f"subtract ({_join_numbers(augment.mean)}), and divide by ({_join_numbers(augment.std)})."
    )
    modalities = [f"{part.name} ({part.channels})" for part in model.method.modalities]
    if modalities:
        text += (
            f" The channels are those of {', '.join(modalities)} side by side, given "
            "as an array [height, width, channels]. For files of one modality: "
            f'`lmim_jax.load(".", modalities=["{model.method.modalities[0].name}"])`.'
        )
    text += _describe_ranges(model)
    if kind == "hf" and model.method.channels in decode.MODES:
        text += (
            " If the margin of the crop is odd, transformers rounds its half down and `lmim_jax` "
            "to even, so crops can differ by one pixel."
        )
    return text


def _describe_ranges(model: TrainedModel) -> str:
    """A sentence on samples that are not of 8 bits, if the run knows their range."""
    options = ImageOptions.from_config(model.config.data)
    texts = []
    for part in options.parts_of(model.method.channels):
        if part.options.ranges:
            texts.append(f"{part.name} {format_ranges(part.options.ranges)}".strip())
    if not texts:
        return ""
    return (
        f" Samples that are not of 8 bits become levels before: {' and '.join(texts)} become 0 and "
        "255, and values outside are clipped."
    )


def _join_numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _training(model: TrainedModel) -> str:
    """A list: data and length."""
    config = model.config.to_dict()
    data = {
        "source": config["data"].get("source"),
        "name": config["data"].get("name"),
        "images": config.get(TRAINING_IMAGES, {}).get("images"),  # none if imported with --nodata
    }
    known = [f"{key} {value}" for key, value in data.items() if value]
    lines = [
        f"- data: {', '.join(known)}",
        f"- {model.step} steps of {config['batch_size']} images each, seed {config['seed']}",
    ]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Measurement:
    """What a row of the table of results measures; all fields are shown.

    Attributes:
      metric: name of the metric, such as "knn/knn20".
      weights: "online" or "target".
      feature: name of the evaluated feature; "" where the evaluator chooses it.
    """

    metric: str
    weights: str
    feature: str


Rows = dict[_Measurement, Mapping[str, float]]


def _results(model: TrainedModel) -> str:
    """A table of all metrics of this step: from training, then from later evaluations."""
    summary = origin.read_json(model.folder / "summary.json")
    if summary.get("steps") != model.step or model.modalities:  # training measures all of them
        summary = {}
    rows = {**_summary_rows(model, summary), **_evaluation_rows(model)}
    paragraphs = []
    if rows:
        paragraphs.append(_table(rows))
        paragraphs.append(
            "Accuracies are percentages of test images. Labels are used for evaluation only, never "
            "for training.\n`patches` is the mean of an image's patches after the final norm, "
            "`patches_prenorm` the mean before it."
        )
    collapse = []
    for name, text in COLLAPSE_METRICS.items():
        if name in summary:
            collapse.append(f"{text}: {summary[name]:.3g}")
    if collapse:
        paragraphs.append("; ".join(collapse) + ".")
    if not paragraphs:
        return "None: these weights have not been evaluated."
    return "\n\n".join(paragraphs)


def _summary_rows(model: TrainedModel, summary: Mapping[str, Any]) -> Rows:
    """Rows from summary.json: the metrics of the run's own evaluators, with their baselines."""
    rows: Rows = {}
    for name, value in summary.items():
        title, _, metric = name.partition("/")
        section = model.config.evaluators.get(title)
        # Metrics with an underscore are those of baselines, and other by-products.
        if not metric or not section or "_" in metric or metric == "majority":
            continue
        baselines = summary.get(BASELINE_KEYS.get(metric, metric))
        if not isinstance(baselines, dict):
            baselines = {}
        measurement = _Measurement(name, section["params"], section.get("feature", ""))
        rows[measurement] = {**baselines, "trained": value}
    return rows


def _evaluation_rows(model: TrainedModel) -> Rows:
    """Rows from evaluations/*.json, which `lmim evaluate` writes."""
    rows: Rows = {}
    for path in buckets.matching(model.folder / "evaluations", "*.json"):
        content = origin.read_json(path)
        evaluated = content.get("evaluated", {})
        if evaluated.get("step") != model.step or _is_of_other_images(model, evaluated):
            continue
        for name, values in content["figures"].items():
            title, _, _ = name.partition("/")
            section = content["config"][title]
            weights = evaluated["weights"].get(title) or section["params"]
            if not isinstance(values, dict):  # before version 0.2
                values = {"trained": values}
            rows[_Measurement(name, weights, section.get("feature", ""))] = values
    return rows


def _is_of_other_images(model: TrainedModel, evaluated: Mapping[str, Any]) -> bool:
    """Whether an evaluation was of other images than the model's, or of other modalities."""
    config = origin.read_json(model.folder / "config.json")  # of all modalities
    every = list(config.get("data", {}).get("modalities", {}))
    if set(evaluated.get("modalities") or every) != set(model.modalities or every):
        return True
    own = model.config.to_dict().get(TRAINING_IMAGES)
    theirs = (evaluated.get("data") or {}).get("train")
    return own is not None and theirs is not None and own != theirs


def _table(rows: Rows) -> str:
    """Format rows as a Markdown table, without empty columns."""
    columns = []
    for column in COLUMNS:
        if any(column in values for values in rows.values()):
            columns.append(column)
    heads = ["metric", "weights", "feature"] + [COLUMNS[column] for column in columns]
    lines = [_table_line(heads), "|" + "---|" * len(heads)]
    for measurement, values in rows.items():
        cells = [measurement.metric, measurement.weights, measurement.feature]
        for column in columns:
            cell = ""
            if column in values:
                cell = f"{values[column]:.4g}"
            cells.append(cell)
        lines.append(_table_line(cells))
    return "\n".join(lines)


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
