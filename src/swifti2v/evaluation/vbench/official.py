"""The official VBench code, run as a program of its own: it cannot share our environment.

One dimension is one run, so that a failure costs one dimension and the next call goes on.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from swifti2v.errors import ConfigError, InputError
from swifti2v.evaluation.vbench.scores import RESULT_SUFFIX, read_results
from swifti2v.evaluation.vbench.suite import SuiteEntry, require_files
from swifti2v.storage import require_same_settings, write_whole

COMMIT = "45e79ec14e69a2187202c675d2dbce1a71843d53"
"""Commit of github.com/Vchitect/VBench."""
SCRIPT, REQUIREMENTS = "install.sh", "requirements.txt"
SUITE = "vbench2_beta_i2v/vbench2_i2v_full_info.json"
CROPS = "vbench2_beta_i2v/data/crop"
"""Folder in the repository; the official code takes the photos only from here."""
NEEDS_PHOTOS = frozenset({"i2v_subject", "i2v_background"})
RUN_RECORD = "run.json"
_PROBE = """
import json, torch, torchvision
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "torchvision": torchvision.__version__,
    "device": torch.cuda.get_device_name() if cuda else None,
}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """Installation that ``install.sh`` makes."""

    python: Path
    """Interpreter of its environment."""
    repository: Path
    """VBench at ``COMMIT``."""
    cache: Path
    """Folder of weights."""


def write_setup(folder: Path) -> Path:
    """Write the script and the pins into a folder; nothing is installed or downloaded.

    Returns:
        The script.

    Raises:
        InputError: The folder cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"folder {folder.parent} does not exist; create it first")
    folder.mkdir(exist_ok=True)
    files = resources.files("swifti2v.evaluation.vbench") / "setup_files"
    write_whole(folder / REQUIREMENTS, (files / REQUIREMENTS).read_text(encoding="utf-8"))
    script = (files / SCRIPT).read_text(encoding="utf-8").replace("@COMMIT@", COMMIT)
    write_whole(folder / SCRIPT, script)
    (folder / SCRIPT).chmod(0o755)
    return folder / SCRIPT


def find_installation(folder: Path) -> Installation:
    """Find the official code in a folder, at the commit whose scores we read.

    Raises:
        InputError: The installation is missing or incomplete.
        ConfigError: It is at another commit.
    """
    folder = folder.absolute()
    install = Installation(
        python=folder / "venv/bin/python", repository=folder / "VBench", cache=folder / "cache"
    )
    for path in (
        install.python,
        install.repository / "evaluate_i2v.py",
        install.repository / SUITE,
    ):
        if not path.exists():
            raise InputError(
                f"{path} does not exist: run 'swifti2v vbench setup {folder}' and its script"
            )
    head = subprocess.run(
        ["git", "-C", install.repository, "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    if head != COMMIT:
        raise ConfigError(
            f"{install.repository} is at commit {head or 'unknown'}, not {COMMIT}; run "
            f"{folder / SCRIPT} again"
        )
    return install


def describe_environment(install: Installation) -> dict[str, Any]:
    """Versions and the GPU, on which scores depend.

    Raises:
        ConfigError: The environment does not work, or there is no GPU.
    """
    result = subprocess.run(
        [install.python, "-c", _PROBE], capture_output=True, text=True, check=False
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{install.python} cannot import torch and torchvision ({reason})")
    environment: dict[str, Any] = json.loads(result.stdout)
    if environment["device"] is None:
        raise ConfigError(
            "the official code needs an NVIDIA GPU, and its environment sees none; 'swifti2v "
            "vbench lite' runs on a CPU too"
        )
    return environment


def require_photos(
    install: Installation, entries: Sequence[SuiteEntry], dimensions: Sequence[str], ratio: str
) -> None:
    """Refuse to start without the photos that the dimensions read.

    Raises:
        InputError: Photos are missing.
    """
    folder = install.repository / CROPS / ratio
    photos = [
        folder / entry.image_name
        for entry in entries
        if not NEEDS_PHOTOS.isdisjoint(set(dimensions) & set(entry.dimension))
    ]
    require_files(photos, "photos", f"{folder}; run {install.cache.parent / SCRIPT} again")


def open_run(folder: Path, record: dict[str, Any]) -> None:
    """Make the folder of results, or see that the one there was started in the same way.

    Raises:
        InputError: It holds something else, or results of other videos or settings.
    """
    path = folder / RUN_RECORD
    text = json.dumps(record, ensure_ascii=False, indent=1)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        require_same_settings(before, record, f"output {folder}", "another folder")
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"output {folder} is not an empty folder; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text + "\n")


def run_dimension(
    install: Installation, dimension: str, videos: Path, suite: Path, ratio: str, folder: Path
) -> Path:
    """Measure one dimension, or take the result that is there: a file in the official format.

    The folder of videos holds nothing else, named as in the suite.

    Raises:
        InputError: The official code failed or measured nothing; its output is in a log file.
    """
    result, log = folder / f"{dimension}{RESULT_SUFFIX}", folder / f"{dimension}.log"
    if result.is_file():
        read_results([result])
        return result
    work = folder / dimension
    for old in work.glob(f"*{RESULT_SUFFIX}"):
        old.unlink()
    command: list[str | Path] = [
        install.python, "evaluate_i2v.py", "--videos_path", videos.absolute(),
        "--full_json_dir", suite.absolute(), "--dimension", dimension, "--ratio", ratio,
        "--output_path", work.absolute(),
    ]  # fmt: skip
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment |= {
        "VBENCH_CACHE_DIR": str(install.cache),
        "TORCH_HOME": str(install.cache / "torch"),
        "PATH": f"{install.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            command, cwd=install.repository, env=environment, stdout=output,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    results = list(work.glob(f"*{RESULT_SUFFIX}"))
    if done.returncode or len(results) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise InputError(
            f"VBench failed on {dimension} ({(lines or ['no message'])[-1]}); see {log}"
        )
    if dimension not in read_results(results):
        raise InputError(f"VBench wrote no {dimension} into {results[0]}; see {log}")
    write_whole(result, results[0].read_bytes())
    return result
