"""``transition`` on the command line: what it writes, keeps, refuses and survives."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from swifti2v.cli.transition import transition
from swifti2v.jobs.interruption import Interruption
from swifti2v.media import open_writer, read_clip
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.shapes import PixelShape
from swifti2v.shards import is_in_shard
from swifti2v.training.data.decoding import decode_pair
from swifti2v.training.data.readers import read_manifest
from swifti2v.training.data.samples import Manifest
from swifti2v.training.transition.job import TransitionJob
from swifti2v.training.transition.samples import TransitionConfig
from swifti2v.training.transition.store import TransitionStore
from tests.helpers.command_line import copy_model, error_line, save_lora, succeed
from tests.helpers.tiny import NUM_FRAMES, SIZE

CONFIGS = Path(__file__).parents[2] / "src" / "swifti2v" / "configs"
NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four good clips, one file that is not a clip, one too short, a picture without caption."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate((*NAMES, "short")):
        num_frames = 10 if name == "short" else NUM_FRAMES + 4 * number
        frames = np.random.default_rng(number).integers(
            0, 256, (num_frames, SIZE, SIZE, 3), np.uint8
        )
        with open_writer(
            folder / f"{name}.mkv", height=SIZE, width=SIZE, fps=16, codec="ffv1"
        ) as writer:
            writer.write(frames)
    (folder / "broken.mp4").write_text("no video")
    rows = [{"video": f"{name}.mkv", "prompt": f"clip {name}", "weight": 2} for name in NAMES]
    rows += [
        {"video": "broken.mp4", "prompt": "broken"},
        {"video": "short.mkv", "prompt": "short"},
        {"video": "gone.mkv", "prompt": "gone"},
    ]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(model: Path, data: Path, output: Path, *more: object) -> Result:
    app = typer.Typer()
    app.command()(transition)
    arguments = [data / "list.jsonl", "--output-dir", output, "--model", model, "--device", "cpu"]
    return CliRunner().invoke(app, [str(argument) for argument in (*arguments, *more)])


def contents(output: Path) -> dict[str, Any]:
    """All that was written: text files as they are, clips as their frames."""
    return {
        str(path.relative_to(output)): read_clip(path).frames.tobytes()
        if path.suffix == ".mkv"
        else path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The output of one run over everything, and what it printed."""
    output = tmp_path_factory.mktemp("whole")
    return output, succeed(run(model, data, output, "--json"))


def test_it_writes_a_training_manifest_and_counts_what_it_refuses(whole):
    output, result = whole
    report = json.loads(result.stdout)
    assert (report["num_made"], report["num_kept"]) == (4, 0)
    causes = {reject["id"]: reject["reason"].partition(": ")[0] for reject in report["rejects"]}
    assert causes == {
        "broken.mp4": "cannot be read",
        "short.mkv": "too short",
        "gone.mkv": "file not found",
    }
    assert "refused broken.mp4: cannot be read" in result.stderr
    assert report["manifest"] == str(output / "manifest.jsonl")
    manifest = read_manifest(report["manifest"])
    assert manifest.rejects == ()
    assert [(s.prompt, s.weight) for s in manifest.samples] == [(f"clip {n}", 2) for n in NAMES]
    for sample in manifest.samples:
        frames, reference = decode_pair(
            sample, PixelShape(NUM_FRAMES, SIZE, SIZE), 16, np.random.default_rng(3)
        )
        assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        assert reference.shape == (NUM_FRAMES, SIZE // 4, SIZE // 4, 3)


def test_a_record_tells_all_that_decided_the_sample(whole):
    output, _ = whole
    record = json.loads((output / "clips" / "b.mkv.json").read_text())
    assert record["id"] == "b.mkv"
    assert 0.2 <= record["sigma"] <= 0.6
    assert record["sigmas"][0] == record["sigma"]
    assert record["sigmas"][-1] == 0
    assert record["end"] - record["start"] == pytest.approx(NUM_FRAMES / 16)
    settings = record["parameters"]["settings"]
    assert settings["generation"]["stage1"]["sampling"]["num_inference_steps"] == 2
    assert record["parameters"]["prompt"] == "clip b"
    assert record["source"].endswith("b.mkv")
    assert record["versions"].keys() == {"swifti2v", "torch", "diffusers", "av"}
    assert record["clip_bytes"] == (output / "clips" / "b.mkv.mkv").stat().st_size


def test_a_second_run_keeps_everything(model, data, whole):
    output, _ = whole
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in (output / "clips").iterdir()}
    report = json.loads(succeed(run(model, data, output, "--json")).stdout)
    assert (report["num_made"], report["num_kept"], len(report["rejects"])) == (0, 4, 3)
    assert contents(output) == before
    assert times == {path: path.stat().st_mtime_ns for path in (output / "clips").iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 1], "settings.seed is 0 there and 1 now"),
        (["--sigma", "0.2:0.7"], "settings.sigma_high is 0.6 there and 0.7 now"),
        (
            ["--set", "stage1.sampling.num_inference_steps=3"],
            "num_inference_steps is 2 there and 3",
        ),
        (["--lora", "LORA"], "weights.stage1_transformer is"),
    ],
)
def test_other_parameters_are_refused_before_anything_is_made(
    model, data, whole, tmp_path, options, message
):
    output, _ = whole
    before = contents(output)
    lora = save_lora(tmp_path / "lora.safetensors")
    options = [lora if option == "LORA" else option for option in options]
    line = error_line(run(model, data, output, *options))
    assert message in line
    assert "another output dir" in line
    assert contents(output) == before


def test_samples_of_other_noise_are_refused(model, data, whole, tmp_path):
    output = copy_model(whole[0], tmp_path / "older")
    record = output / "clips" / "b.mkv.json"
    values = json.loads(record.read_text())
    del values["parameters"]["sampling_version"]  # as records were before
    record.write_text(json.dumps(values))
    assert "sampling_version is None there and 2 now" in error_line(run(model, data, output))


def test_stage_twos_settings_play_no_part(model, data, whole):
    output, _ = whole
    result = run(model, data, output, "--set", "stage2.segment_size=2", "--json")
    assert json.loads(succeed(result).stdout)["num_kept"] == 4


def test_levers_reach_the_transformer(model, data, whole):
    output, _ = whole
    line = error_line(run(model, data, output, "--set", "stage1.speed.linear=int8"))
    assert "weights.stage1_transformer is" in line  # loaded so, and refused beside the others
    residual = ("--set", "stage1.speed.residual=float32")
    line = error_line(run(model, data, output, *residual))
    assert "stage1.speed.residual is 'model' there and 'float32' now" in line


@pytest.mark.slow
def test_shards_together_are_the_whole(model, data, whole, tmp_path):
    output, _ = whole
    reports = []
    for shard in ("2/2", "1/2"):
        result = succeed(run(model, data, tmp_path, "--shard", shard, "--json"))
        reports.append(json.loads(result.stdout))
    assert sum(report["num_made"] for report in reports) == 4
    assert all(report["num_made"] for report in reports)
    assert sum(len(report["rejects"]) for report in reports) == 3
    assert [report["manifest"] for report in reports] == [None, str(tmp_path / "manifest.jsonl")]
    parts, one = contents(tmp_path), contents(output)
    both = b"".join(parts.pop(f"manifest-{shard}-of-2.jsonl") for shard in (1, 2))
    assert parts["manifest.jsonl"] == both
    rows, expected = (
        [json.loads(line) for line in made.pop("manifest.jsonl").splitlines()]
        for made in (parts, one)
    )
    for row in (*rows, *expected):
        row["video"] = Path(row["video"]).name  # relative to another folder
    assert sorted(rows, key=lambda row: row["video"]) == expected
    assert parts == one


def test_an_empty_shard_is_no_error(model, data, tmp_path):
    shards = [f"{index}/40" for index in range(1, 41)]
    listed = read_manifest(data / "list.jsonl")
    ids = [*(s.id for s in listed.samples), *(r.id for r in listed.rejects)]
    empty = next(s for n, s in enumerate(shards, 1) if not any(is_in_shard(i, n, 40) for i in ids))
    result = succeed(run(model, data, tmp_path, "--shard", empty))
    assert "no clip of the manifest belongs to this part" in result.stdout
    # It counts as there, so that the others' rows are put together.
    assert contents(tmp_path) == {f"manifest-{empty.replace('/', '-of-')}.jsonl": b""}


def test_the_models_own_loras_can_be_left_out(model, data, whole, tmp_path):
    """LoRAs of a preset: with them the record has other weights, without them the base's."""
    output, _ = whole
    lora = save_lora(tmp_path / "lora.safetensors")
    own = copy_model(model, tmp_path / "model")
    path = own / "model_index.json"
    index = json.loads(path.read_text())
    index["components"]["stage1_transformer"]["loras"] = [{"path": str(lora)}]
    path.write_text(json.dumps(index))

    def weights(*more: str) -> str:
        made = succeed(run(own, data, tmp_path / "out", "--dry-run", "--json", *more))
        return str(json.loads(made.stdout)["weights"]["stage1_transformer"])

    base = json.loads((output / "clips" / "b.mkv.json").read_text())["parameters"]["weights"]
    assert weights("--without-loras") == base["stage1_transformer"]
    assert weights() != base["stage1_transformer"]


def test_the_2k_curriculum_reads_what_the_command_in_its_file_writes(whole):
    text = (CONFIGS / "stage2_2k.yaml").read_text()
    (command,) = (line for line in text.splitlines() if "swifti2v data transition" in line)
    words = command.removeprefix("#").split()
    assert words[words.index("--model") + 1] == yaml.safe_load(text)["model"]
    manifests = yaml.safe_load(text)["phases"][1]["data"]["manifests"]
    real, made = manifests
    assert (words[3], words[words.index("--root") + 1]) == (real["path"], real["root"])
    (manifest,) = whole[0].glob("*.jsonl")
    written = Path(words[words.index("--output-dir") + 1], manifest.name)
    assert made["path"] == str(written)


@pytest.mark.slow
def test_killed_and_run_again_it_makes_what_one_run_makes(model, data, whole, tmp_path):
    output, _ = whole
    code = (
        "import typer; from swifti2v.cli.transition import transition; app = typer.Typer(); "
        "app.command()(transition); app()"
    )
    arguments = [data / "list.jsonl", "--output-dir", tmp_path, "--model", model, "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not list(tmp_path.glob("clips/*.json")) and process.poll() is None:
        assert time.monotonic() < end, "no sample was made in two minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_kept = len(list(tmp_path.glob("clips/*.json")))
    assert num_kept >= 1
    report = json.loads(succeed(run(model, data, tmp_path, "--json")).stdout)
    assert (report["num_kept"], report["num_made"]) == (num_kept, 4 - num_kept)
    resumed, one = contents(tmp_path), contents(output)
    for made in (resumed, one):
        made.pop("manifest.jsonl")  # its paths start from another folder
    assert resumed == one


def test_an_interrupted_run_says_how_it_goes_on(model, data, tmp_path):
    class Stopping:
        """A list of samples whose second one is Ctrl-C."""

        def __init__(self, samples: Any) -> None:
            self.samples = samples

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            yield self.samples[0]
            raise KeyboardInterrupt

    pipe = SwiftI2VPipeline.from_pretrained(model, device="cpu")
    config = TransitionConfig(generation=pipe.config)
    store, name = TransitionStore(tmp_path / "out"), {"name": "tiny", "loras": []}
    job = TransitionJob(pipe, config, store, name, print)
    samples: Any = Stopping(read_manifest(data / "list.jsonl").samples)
    with pytest.raises(KeyboardInterrupt) as caught:
        job.run(Manifest(samples, ()), {}, Interruption())
    (note,) = caught.value.__notes__
    assert note == "1 finished samples are kept; run the same command again to continue"


def test_a_dry_run_tells_the_settings_and_writes_nothing(model, data, tmp_path):
    result = succeed(run(model, data, tmp_path / "out", "--dry-run", "--json"))
    plan = json.loads(result.stdout)
    assert plan["sizes"] == {
        "clip": [SIZE, SIZE], "reference": [SIZE // 4, SIZE // 4],
        "num_frames": NUM_FRAMES, "fps": 16,
    }  # fmt: skip
    assert (plan["num_clips"], plan["num_finished"]) == (6, 0)
    assert [reject["id"] for reject in plan["rejects"]] == ["gone.mkv"]
    assert "sigma_low: 0.2" in succeed(run(model, data, tmp_path / "out", "--dry-run")).stdout
    assert not (tmp_path / "out").exists()


def test_it_is_an_error_if_no_clip_can_be_used(model, data, tmp_path):
    result = run(model, data, tmp_path, "--num-frames", 81)
    line = error_line(result)
    assert "no sample was made: all 7 clips were refused" in line
    assert result.stderr.count("refused a.mkv: too short") == 1
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigma", "high"], "sigma 'high' is not LOW:HIGH"),
        (["--sigma", "0.6:0.2"], "the sigma range is 0.6 to 0.2"),
        (["--shard", "3/2"], "shard '3/2' is not I/N"),
        (["--height", 72], "height 72 does not fit"),
        (["--num-frames", 18], "--num-frames 18 does not fit"),
        (["--lora", "gone.safetensors"], "LoRA gone.safetensors does not exist"),
        (["--set", "stage1.colour=1"], "stage1.colour"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--split", "train"], "no split 'train'"),
        (["--model", "no/model/here"], "no/model/here"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(model, data, tmp_path, options, message):
    assert message in error_line(run(model, data, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_one_number_is_a_range_too(model, data, tmp_path):
    succeed(run(model, data, tmp_path, "--sigma", "0.5", "--shard", "1/2"))
    records = [json.loads(path.read_text()) for path in tmp_path.glob("clips/*.json")]
    assert records
    assert {record["sigma"] for record in records} == {0.5}


@pytest.mark.parametrize(("sigma", "is_lost"), [(1, True), (0.01, False)])
def test_lost_motion_is_told_of(model, data, tmp_path, sigma, is_lost):
    result = succeed(run(model, data, tmp_path, "--sigma", sigma, "--shard", "1/2", "--json"))
    report = json.loads(result.stdout)
    assert (report["psnr"] < report["still_psnr"] + 1) == is_lost
    assert ("did not keep the motion" in result.stderr) == is_lost
