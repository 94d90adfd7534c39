"""Build the page: one HTML file with all of its code, and copies of the videos under blind names."""

import hashlib
import json
import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import av

from swifti2v.errors import InputError
from swifti2v.evaluation.side_by_side.pairs import Pair
from swifti2v.shipped import PACKAGE
from swifti2v.storage import whole_file, write_whole

INDEX, VIDEOS = "index.html", "videos"
FORMAT = 1
"""Format of the page's data and of the results it exports."""


def require_new_folder(folder: Path) -> None:
    """Refuse an output folder that holds something already.

    Raises:
        InputError: The folder is refused.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"output {folder} exists and is not an empty folder; choose another name")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"folder {folder.parent} does not exist; create it first")


def build_page(pairs: Sequence[Pair], names: tuple[str, str], seed: int, folder: Path) -> Path:
    """Write the page, in a new or empty folder, and its videos; returns the HTML file.

    The seed decides the order of pairs and of their sides; the names of the two sets are shown when
    all votes are given. The page works from disk, and refers to no other files.

    Raises:
        InputError: The folder is not empty.
    """
    require_new_folder(folder)
    (folder / VIDEOS).mkdir(parents=True)
    draw = random.Random(seed)
    shuffled = list(pairs)
    draw.shuffle(shuffled)
    places = []
    for number, pair in enumerate(shuffled, start=1):
        left = draw.choice(("first", "second"))
        sides = (pair.first, pair.second) if left == "first" else (pair.second, pair.first)
        files = [f"{VIDEOS}/{number:03d}-{side}.mp4" for side in ("left", "right")]
        for source, file in zip(sides, files, strict=True):
            copy_video(source, folder / file)
        places.append(
            {
                "name": pair.name,
                "left": left,
                "files": files,
                "fps": pair.fps,
                "num_frames": pair.num_frames,
                "width": pair.width,
                "height": pair.height,
            }
        )
    data: dict[str, Any] = {"format": FORMAT, "names": names, "seed": seed, "pairs": places}
    data["page"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    write_whole(folder / INDEX, render_page(data))
    return folder / INDEX


def render_page(data: dict[str, Any]) -> str:
    """The HTML with style, code and data in it."""
    static = resources.files("swifti2v.evaluation.side_by_side") / "static"
    parts = {name: (static / name).read_text(encoding="utf-8") for name in _PARTS}
    look = (PACKAGE / "look" / "look.css").read_text(encoding="utf-8")
    # "</" would end the script element wherever it stands, as in a name.
    text = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
    return (
        parts["page.html"]
        .replace("/*style*/", look + parts["page.css"])
        .replace("/*script*/", parts["page.js"])
        .replace("/*data*/", text)
    )


_PARTS = ("page.html", "page.css", "page.js")


def copy_video(source: Path, target: Path) -> None:
    """The video stream of a file, not encoded again, in a plain MP4 without any texts or sound.

    What is stored in a file would tell where it comes from; and browsers cannot seek in files
    that were written piece by piece.
    """
    with (
        whole_file(target, ".mp4") as unfinished,
        av.open(f"file:{source.absolute()}") as reader,
        av.open(str(unfinished), "w", format="mp4", options={"movflags": "faststart"}) as writer,
    ):
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        copy.metadata.clear()
        for packet in reader.demux(stream):
            if packet.size:
                packet.stream = copy
                writer.mux(packet)
