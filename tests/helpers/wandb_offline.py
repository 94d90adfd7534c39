"""A W&B run without a network, in a process of its own: ``wandb_offline.py write|read DIRECTORY``.

``read`` prints what the files of the run hold, one after the other.
"""

import json
import os
import struct
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swifti2v.training.engine.trackers import open_trackers

HEADER_BYTES, BLOCK_BYTES = 7, 32768
RECORD_HEADER, FULL, LAST = struct.Struct("<IHB"), 1, 4
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def write(directory: Path) -> None:
    folder = directory / "run"
    folder.mkdir()
    Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8)).save(directory / "grid.png")
    (tracker,) = open_trackers(["wandb"], folder, {"run": {"seed": 7}})
    tracker.log(1, {"loss": 0.5, "lr": 1e-5})
    tracker.log(2, {"loss": 0.25})
    tracker.log_image(2, "grid", directory / "grid.png")
    tracker.close()
    (tracker,) = open_trackers(["wandb"], folder, {"run": {"seed": 7}})
    tracker.log(3, {"loss": 0.125})
    tracker.close()


def iter_records(data: bytes) -> Iterator[bytes]:
    """Records of a W&B file, which is a LevelDB log behind 7 bytes."""
    place, parts = HEADER_BYTES, b""
    while place + RECORD_HEADER.size <= len(data):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < RECORD_HEADER.size:
            place += left
            continue
        _, length, kind = RECORD_HEADER.unpack_from(data, place)
        place += RECORD_HEADER.size
        parts += data[place : place + length]
        place += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def read_run(path: Path) -> dict[str, Any]:
    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    found: dict[str, Any] = {"config": {}, "history": []}
    for data in iter_records(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["id"] = record.run.run_id
            values = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            values.pop("_wandb", None)
            found["config"] |= values
        elif kind == "history":
            values = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            own = {name: values[name] for name in ("loss", "lr") if name in values}
            found["history"].append([values["_step"], own])
    found["pictures"] = len(list(path.parent.glob("files/media/images/*")))
    return found


if __name__ == "__main__":
    command, place = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        write(place)
    else:
        files = sorted(place.glob("run/wandb/offline-run-*/run-*.wandb"))
        sys.stdout.write(json.dumps([read_run(file) for file in files]))
