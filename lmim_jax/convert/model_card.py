"""The model card of an exported folder, README.md: what it is, how to open it, what was measured on it."""

import json

USAGE = {
    "timm": """import timm, torch
from PIL import Image

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = prepare(Image.open("image.jpg").convert("{mode}"))[None]
with torch.no_grad():
    mean = model(images)                     # [1, {width}]: the mean of the patches
    tokens = model.forward_features(images)  # [1, {tokens}, {width}]: {order}
""",
    "hf": """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{folder}", add_pooling_layer=False).eval()
prepare = AutoImageProcessor.from_pretrained("{folder}")
images = prepare(Image.open("image.jpg").convert("{mode}"), return_tensors="pt")
with torch.no_grad():
    tokens = model(**images).last_hidden_state  # [1, {tokens}, {width}]: {order}
mean = tokens[:, {first}:].mean(dim=1)
""",
    "flax": """import lmim_jax

model = lmim_jax.load("{folder}")
images = model.preprocess(["image.jpg"])  # [1, {height}, {image_width}, {channels}], as described below
features = model.encode(images)           # features.mean, features.patches; features.cls, if any
""",
    "safetensors": """lmim import-weights {folder}/model.safetensors --format={method} \\
    --config=RECIPE --workdir=RUN
""",
}
SIZES = {
    "timm": "`create_model(..., img_size=...)`",
    "hf": "`model(..., interpolate_pos_encoding=True)`",
}
ODD_MARGINS = " Half an odd margin is rounded down by transformers and to even by `lmim_jax`: one pixel, at times."
LIBRARY = {"timm": "timm", "hf": "transformers", "flax": "lmim_jax", "safetensors": "safetensors"}
WEIGHTS = {
    "online": "the trained encoder",
    "target": "the teacher, its moving average",
    "both": "all its networks",
}
PRIVATE = ("path", "dir", "classes")  # of config.data: where things lie on the machine of the run
COLUMNS = {
    "pixels": "raw pixels",
    "histogram": "colours",
    "untrained": "untrained",
    "trained": "trained",
}
WORDS = {
    "collapse_index": "collapse index (1 is total)",
    "effective_rank": "effective rank of features",
}


def write(model, kind, which, folder):
    """The text of the card.

    Args:
      model: a `runs.Run`. kind: the --format. which: "online", "target" or "both". folder: its name, for examples.
    """
    method, config = model.method, model.config
    first = int("cls_token" in model.params["encoder"])
    grid, (height, width) = f"{method.grid[0]} x {method.grid[1]} patches", method.feature_size
    filled = dict(
        folder=folder,
        width=method.width,
        tokens=method.num_patches + first,
        first=first,
        height=height,
    )
    filled |= dict(image_width=width, channels=method.channels, method=config.method.name)
    filled |= dict(
        order=f"CLS, then {grid}" if first else grid, mode="RGB" if method.channels == 3 else "L"
    )
    numbers = lambda values: ", ".join(f"{value:g}" for value in values)
    augment = config.augment
    sections = (
        f"# {config.method.name}: {method.depth} layers, {method.width} wide, patches of {method.patch_size}",
        f"A Vision Transformer pretrained without labels by {config.method.name}, with `lmim_jax`: {WEIGHTS[which]}. "
        f"It takes images of {height} x {width} pixels and gives {method.width} numbers for each of {grid}. "
        "All weights are float32" + (", and there is no head." if which != "both" else "."),
        "## Use",
        f"```{'sh' if kind == 'safetensors' else 'python'}\n{USAGE[kind].format(**filled).rstrip()}\n```",
        *_advice(kind, first),
        "## Images",
        f"The short side to {augment.eval_resize} pixels ({augment.interpolation}, antialiased); of that the centre, "
        f"{height} x {width}; channels, from 0 to 1, less ({numbers(augment.mean)}), "
        f"divided by ({numbers(augment.std)}).{ODD_MARGINS if kind == 'hf' else ''}",
        "## Training",
        _training(model),
        "## Results",
        _results(model),
        "## Config",
        f"```json\n{json.dumps(public(config), indent=2)}\n```",
    )
    tags = f'library_name: {LIBRARY[kind]}\npipeline_tag: image-feature-extraction\ntags: ["masked-image-modeling"]'
    return "\n\n".join((f"---\n{tags}\n---", *sections)) + "\n"


def public(config):
    """The config as a plain dict, without the paths of the machine it ran on."""
    plain = json.loads(config.to_json())
    plain["data"] |= {key: "" for key in PRIVATE if key in plain["data"]}
    return plain


def _advice(kind, first):
    """Paragraphs: what a user would get wrong."""
    if kind == "safetensors":
        return [
            "Names and layouts are those of the method's official PyTorch code, constant positions included."
        ]
    told = ["Features are taken after the final norm."]
    if kind in SIZES:
        told += [
            f"Other image sizes: {SIZES[kind]}; positions are interpolated then, not quite as `lmim_jax` does it."
        ]
    if first:
        told += [
            "Not every method trains its CLS token for something; when in doubt, take the mean of the patches."
        ]
    return [" ".join(told)]


def _training(model):
    """A list: on what, how long, from what."""
    config = model.config.to_dict()
    source = {key: config["data"].get(key) for key in ("source", "name")}
    source["images"] = config.get("training_images", {}).get(
        "images"
    )  # unknown where weights came without images
    lines = ["- data: " + ", ".join(f"{key} {value}" for key, value in source.items() if value)]
    lines += [
        f"- {model.step} steps with {config['batch_size']} images each, seed {config['seed']}"
    ]
    if origin := _read(model.path / "imported.json"):
        lines += [f"- began with imported weights: {origin['file']}, SHA-256 {origin['sha256']}"]
        lines += (
            [f"- {len(origin['fresh'])} arrays were not in that file, and began afresh"]
            if origin["fresh"]
            else []
        )
    return "\n".join(lines)


def _results(model):
    """One table of what was measured on this step: while training (summary.json), and since (evaluations/*.json)."""
    rows, gauges = {}, []
    summary = _read(model.path / "summary.json")
    if summary.get("steps") == model.step:
        for name, value in summary.items():
            section = model.config.evaluators.get(name.split("/")[0]) if "/" in name else None
            if section and "_" not in name:
                baselines = summary.get(name.split("/")[1])  # a dict of rows, where there is one
                baselines = baselines if isinstance(baselines, dict) else {}
                rows[_row(name, section)] = {**baselines, "trained": value}
        gauges = [f"{WORDS[name]}: {summary[name]:.3g}" for name in WORDS if name in summary]
    for path in sorted((model.path / "evaluations").glob("*.json")):
        found = _read(path)
        what = found.get("evaluated", {})
        if what.get("step") == model.step:
            for name, values in found["figures"].items():
                title = name.split("/")[0]
                rows[_row(name, found["config"][title], what["weights"].get(title))] = values
    if not rows and not gauges:
        return "None: nothing was measured on these weights."
    columns = [column for column in COLUMNS if any(column in values for values in rows.values())]
    head = ["figure", "weights", "feature", *(COLUMNS[column] for column in columns)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)] if rows else []
    for row, values in rows.items():
        cells = [f"{values[column]:.4g}" if column in values else "" for column in columns]
        lines += [f"| {' | '.join([*row, *cells])} |"]
    if rows:
        lines += [
            "",
            "Accuracies are percentages of test images. The labels served to measure, never to train.",
        ]
        lines += [
            "`patches` is the mean of an image's patches after the final norm, `patches_prenorm` that before it."
        ]
    return "\n".join([*lines, *(["", "; ".join(gauges) + "."] if gauges else [])])


def _row(name, section, weights=None):
    """(figure, weights, feature) that a line is told by."""
    return name, weights or section["params"], section.get("feature", "")


def _read(path):
    return json.loads(path.read_text()) if path.is_file() else {}
