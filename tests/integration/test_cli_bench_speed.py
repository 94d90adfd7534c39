import json

import pytest

from tests.helpers.command_line import error_line, generate, succeed, swifti2v

FAST = ("--height", 64, "--width", 64, "--num-frames", 9, "--warmups", 0, "--repeats", 1)


@pytest.mark.slow
def test_a_table_and_plain_values(monkeypatch):
    monkeypatch.setattr("sys.argv", ["swifti2v", "bench", "speed", "--more"])
    table = succeed(swifti2v("bench", "speed", "--stages", "stage2", *FAST)).stdout.splitlines()
    assert table[0].startswith("`swifti2v bench speed --more`: ")
    assert [line.split("|")[2].strip() for line in table[4:]] == [
        "diffusers, float32",
        "swifti2v, float32",
        "swifti2v, bfloat16",
    ]
    values = json.loads(
        succeed(swifti2v("bench", "speed", "--stages", "stage2", *FAST, "--json")).stdout
    )
    assert {"arguments", "machine", "rows"} == set(values)
    for row in values["rows"]:
        assert row["timing"]["seconds"] > 0
        assert row["flops"] > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stages", "wheels"), "part wheels is unknown"),
        (("--device", "tpu9"), "device 'tpu9' is unknown"),
        (("--cap-gb", "24", "--device", "cpu"), "this machine has none"),
        (("--cap-gb", "-1"), "leaves nothing"),
        (("--width", "70"), "width 70 does not fit"),
        (("--set", "stage2.speed.linear=int2"), "stage2.speed.linear"),
    ],
)
def test_what_cannot_be_measured(arguments, message):
    assert message in error_line(swifti2v("bench", "speed", "--stages", "stage2", *arguments))


@pytest.mark.slow
def test_a_lever_from_the_command_line(model, photo, tmp_path):
    plain, levers = tmp_path / "a.mp4", tmp_path / "b.mp4"
    succeed(generate(model, photo, plain))
    result = generate(
        model, photo, levers, "--set", "stage2.speed.linear=int8",
        "--set", "stage1.speed.attention=math",
    )  # fmt: skip
    succeed(result)
    again = succeed(
        generate(model, photo, tmp_path / "c.mp4", "--like", levers, "--dry-run", "--json")
    )
    config = json.loads(again.stdout)["settings"]["config"]
    assert config["stage2"]["speed"]["linear"] == "int8"
    assert config["stage1"]["speed"]["attention"] == "math"
    refused = error_line(
        generate(model, photo, tmp_path / "d.mp4", "--set", "stage2.speed.linear=float8")
    )
    assert "no layer of SegmentTransformer3DModel can be float8" in refused
