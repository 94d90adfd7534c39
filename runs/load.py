"""Load figures of ``swifti2v serve`` on this machine, as one JSON object: ``python runs/load.py``.

Clients submit small videos of the nano model, poll them, and read the stream of each until its first
bytes; meanwhile the worker is killed a few times. Then every video is compared, frame for frame, with one
that the command line made with the same seed, which is timed as well.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from swifti2v.media import read_clip

PHOTO = Path(__file__).parents[1] / "examples" / "lake.jpg"
FIELDS = {"prompt": "pan left", "size": "128x64", "num_frames": "9"}
NUM_SEEDS = 3
POLL_SECONDS = 0.5


class Load:
    """What is measured while clients work."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def make_video(self, number: int) -> dict[str, Any]:
        """One client's job, from submit to its last state."""
        with httpx.Client(base_url=self.url, timeout=600) as client:
            started = time.monotonic()
            data = {**FIELDS, "seed": str(number % NUM_SEEDS)}
            files = {"input_reference": PHOTO.read_bytes()}
            video = self._time("submit", lambda: client.post("/v1/videos", data=data, files=files))
            path = video["polling_url"]
            with client.stream("GET", f"{path}/stream") as response:
                next(response.iter_raw(), b"")
            self._note("first_frame", time.monotonic() - started)
            while video["status"] in ("queued", "in_progress"):
                time.sleep(POLL_SECONDS)
                video = self._time("status", lambda: client.get(path))
            return video

    def _time(self, name: str, ask: Any) -> dict[str, Any]:
        while True:
            started = time.monotonic()
            response = ask()
            self._note(name, time.monotonic() - started)
            if response.status_code != 429:
                return dict(response.raise_for_status().json())
            time.sleep(float(response.headers["retry-after"]))

    def _note(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[name].append(seconds)

    def summary(self) -> dict[str, dict[str, float]]:
        """Median and 95th percentile of each kind."""
        return {
            name: {
                "p50": round(statistics.median(all_), 3),
                "p95": round(sorted(all_)[int(0.95 * (len(all_) - 1))], 3),
            }
            for name, all_ in self.seconds.items()
        }


def start_server(data_dir: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server that is ready, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "swifti2v", "serve", "--port", str(port), "--data-dir", str(data_dir)]
    server = subprocess.Popen([sys.executable, *command, "--queue-size", "1000"])
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return server, url
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def kill_worker(database: Path, num_kills: int, between: float, is_over: threading.Event) -> int:
    """Kill the worker again and again; how often it was killed."""
    killed: set[int] = set()
    while len(killed) < num_kills and not is_over.wait(between):
        with sqlite3.connect(database) as connection:
            (state,) = connection.execute("SELECT state FROM worker").fetchone()
        pid = json.loads(state)["pid"]
        if pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    return len(killed)


def hash_frames(path: Path) -> str:
    """SHA-256 of a video's frames."""
    return hashlib.sha256(read_clip(path).frames.tobytes()).hexdigest()


def run_command_line(folder: Path) -> tuple[float, list[str]]:
    """Seconds of a job by the command line, and the frames of each seed."""
    width, height = FIELDS["size"].split("x")
    spent, hashes = [], []
    for seed in range(NUM_SEEDS):
        output = folder / f"{seed}.mp4"
        started = time.monotonic()
        subprocess.run(
            [
                sys.executable, "-m", "swifti2v", "generate", PHOTO, "-p", FIELDS["prompt"],
                "--width", width, "--height", height, "--num-frames", FIELDS["num_frames"],
                "--seed", str(seed), "-o", output,
            ],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        spent.append(time.monotonic() - started)
        hashes.append(hash_frames(output))
    return statistics.median(spent), hashes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--kill-seconds", type=float, default=20.0, help="Between two kills.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        server, url = start_server(data_dir)
        load, is_over = Load(url), threading.Event()
        with ThreadPoolExecutor(asked.clients + 1) as pool:
            kills = pool.submit(kill_worker, data_dir / "jobs.sqlite", asked.kills, asked.kill_seconds, is_over)  # fmt: skip
            started = time.monotonic()
            videos = list(pool.map(load.make_video, range(asked.jobs)))
            spent = time.monotonic() - started
            is_over.set()
        server.send_signal(signal.SIGTERM)
        server.wait()
        made = [v for v in videos if v["status"] == "completed"]
        frames = [hash_frames(data_dir / "jobs" / v["id"] / "video.mp4") for v in made]
        by_hand, hashes = run_command_line(Path(folder))
        wrong = sum(h != hashes[v["seed"]] for v, h in zip(made, frames, strict=True))
    result = {
        "jobs": asked.jobs,
        "clients": asked.clients,
        "worker_kills": kills.result(),
        "lost": asked.jobs - len(made),
        "wrong_frames": wrong,
        "seconds": load.summary(),
        "seconds_per_job": round(spent / asked.jobs, 3),
        "seconds_per_job_of_command_line": round(by_hand, 3),
        "times_faster": round(by_hand * asked.jobs / spent, 2),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
