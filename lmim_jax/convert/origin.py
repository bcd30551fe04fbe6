"""Where the weights of a run or of an exported model come from: official files, and other runs.

An origin is a dict of plain values, {} where training began with random weights. Its keys, if any:

  imported        the content of imported.json: the file of official weights
  init_from       what training began with: {"name" of the folder, "step", "origin"}
  frozen_teacher  whose features are the targets: {"name", "origin"}

None instead of an origin: it was not recorded.
"""

import json
from typing import Any

from lmim_jax.utils import buckets

INITIAL = "init_from.json"  # of a run that began with the weights of another one

Origin = dict[str, Any] | None


def read(folder: buckets.Path) -> Origin:
    """The origin of the weights in the folder of a run or of an exported model."""
    config = read_json(folder / "config.json")
    if "exported" in config:
        return config["exported"].get("origin")
    found: dict[str, Any] = {}
    imported = read_json(folder / "imported.json")
    if imported:
        found["imported"] = imported
    initial = read_json(folder / INITIAL)
    if "folder" in initial:
        found["init_from"] = {
            "name": buckets.path(initial["folder"]).name,
            "step": initial["step"],
            "origin": initial.get("origin"),
        }
    if "frozen_teacher" in initial:
        found["frozen_teacher"] = {
            "name": buckets.path(initial["frozen_teacher"]).name,
            "origin": initial.get("frozen_teacher_origin"),
        }
    return found


def sentences(origin: Origin) -> list[str]:
    """What a model card says of an origin; nothing of random weights."""
    if origin is None:
        return [
            "Whether these began with imported weights was not recorded; if so, the license of "
            "those applies."
        ]
    found = []
    if "init_from" in origin:
        begun = origin["init_from"]
        found.append(f"Training began with weights of `{begun['name']}`, step {begun['step']}.")
        found += sentences(begun["origin"])
    if "imported" in origin:
        found.append(_describe_import(origin["imported"]))
    if "frozen_teacher" in origin:
        teacher = origin["frozen_teacher"]
        found.append(f"The targets were features of a frozen teacher, `{teacher['name']}`.")
        found += sentences(teacher["origin"])
    return found


def has_imported_weights(origin: Origin) -> bool:
    """Whether imported weights were trained further; those of a frozen teacher were not."""
    if not origin:
        return False
    if "imported" in origin:
        return True
    return "init_from" in origin and has_imported_weights(origin["init_from"]["origin"])


def _describe_import(imported: dict[str, Any]) -> str:
    text = f"Imported weights: {imported['file']}, SHA-256 {imported['sha256']}."
    if imported["fresh"]:
        count = len(imported["fresh"])
        text += f" {count} arrays were not in that file, and initialized at random."
    return text


def read_json(path: buckets.Path) -> dict[str, Any]:
    """Read a JSON file; {} if it does not exist."""
    if not path.is_file():
        return {}
    return json.loads(path.read_text())
