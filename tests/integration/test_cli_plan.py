import json
from typing import Any

import pytest
import torch
import yaml
from torch.nn.modules.module import register_module_forward_pre_hook

from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.planning.measurement import memory_bytes
from swifti2v.shipped import PACKAGE
from swifti2v.units import GB
from tests.helpers.command_line import (
    LOSSLESS,
    assert_same_frames,
    error_line,
    generate,
    succeed,
    swifti2v,
)


def test_plan_prints_every_option_and_the_choice(model):
    result = succeed(swifti2v("plan", "--model", model, "--device", "rtx4090", "--width", 128))

    assert result.stdout.startswith(f"{model} on GeForce RTX 4090, bfloat16, width 128\n")
    for line in ("* resident", "  streamed", "  offloaded", "- 8-bit", "chosen: resident"):
        assert f"\n{line}" in result.stdout


def test_plan_as_json():
    plan = json.loads(
        succeed(swifti2v("plan", "--model", "nano", "--device", "h100", "--json")).stdout
    )

    assert plan["fits"]
    assert plan["placement"] == "resident"
    stages = ["text", "image", "stage1", "reference", "stage2", "decode"]
    assert [*plan["seconds"]] == [*plan["flops"]] == [*stages, "total"]
    assert [*plan["peak_device_bytes"]] == [*stages, "peak"]
    assert plan["host_bytes"] > 0


@pytest.mark.slow
def test_a_budget_that_holds_nothing_is_said_so(model):
    arguments = ("plan", "--model", model, "--device", "h100", "--memory", 0.1)
    plan = json.loads(succeed(swifti2v(*arguments, "--json")).stdout)

    assert not plan["fits"]
    assert plan["placement"] is None
    assert "does not fit: nothing fits into 0.1 GB" in succeed(swifti2v(*arguments)).stdout


@pytest.mark.slow
def test_memory_auto_is_what_is_free_here_and_all_of_a_named_card(model):
    arguments = ("plan", "--model", model)
    here, card = (
        json.loads(
            succeed(swifti2v(*arguments, "--device", device, "--memory", "auto", "--json")).stdout
        )
        for device in ("cpu", "rtx3060")
    )

    assert 0 < here["budget_bytes"] < memory_bytes(torch.device("cpu"))
    assert card["budget_bytes"] == 12 * GB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "rtx9090"), "device 'rtx9090' is unknown; use one of rtx3060"),
        (
            ("--device", "h100", "--memory", -1),
            "--memory '-1' is neither 'auto' nor a number of GB",
        ),
        (("--device", "h100", "--width", 333), "width 333 does not fit"),
        (("--device", "h100", "--num-frames", 32), "the nearest are 29 and 33"),
        (("--device", "h100", "--model", "nowhere"), "unknown model 'nowhere'"),
    ],
)
def test_plans_that_cannot_be_made(arguments, message):
    assert message in error_line(swifti2v("plan", "--model", "nano", *arguments))


@pytest.mark.slow
def test_generate_with_enough_memory_is_what_it_is_without_asking(model, photo, tmp_path):
    plain, planned = tmp_path / "plain.mkv", tmp_path / "planned.mkv"
    succeed(generate(model, photo, plain, *LOSSLESS))

    for memory in ("auto", "64"):
        result = succeed(generate(model, photo, planned, *LOSSLESS, "--memory", memory))

        assert_same_frames(plain, planned)
        assert "placement: resident: the fastest that fits" in result.stdout


def test_generate_refuses_before_loading_what_does_not_fit(model, photo, tmp_path):
    result = generate(model, photo, tmp_path / "out.mp4", "--memory", 0.2)

    line = error_line(result)
    assert "nothing fits into 0.2 GB: the smallest, resident" in line
    assert "GB or more" in line
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("memory", ["0", "-3", "lots", "nan"])
def test_memory_is_auto_or_a_number(model, photo, tmp_path, memory):
    result = generate(model, photo, tmp_path / "out.mp4", f"--memory={memory}")

    assert f"--memory {memory!r} is neither 'auto' nor a number of GB above 0" in error_line(result)


@pytest.mark.slow
def test_memory_keeps_what_is_given(model, photo, tmp_path):
    flags = ("--placement", "streamed", "--set", "stage2.vae_tile=8", "--memory", "64", "--dry-run")
    result = succeed(generate(model, photo, tmp_path / "out.mp4", *flags, "--json"))

    plan = json.loads(result.stdout)
    assert plan["settings"]["config"]["stage2"]["vae_tile"] == 8
    assert any("placement: streamed, VAE tiles of 8: the fastest" in note for note in plan["notes"])


@pytest.mark.slow
def test_8_bit_layers_are_planned():
    arguments = ("plan", "--model", "paper", "--height", 128, "--width", 192, "--num-frames", 9)
    plain, small = (
        json.loads(succeed(swifti2v(*arguments, "--device", "h100", *more, "--json")).stdout)
        for more in ((), ("--linear", "float8"))
    )
    assert small["flops"] == plain["flops"]
    assert small["disk_bytes"] < 0.75 * plain["disk_bytes"]  # of the text encoder all is left
    assert small["peak_device_bytes"]["peak"] < 0.75 * plain["peak_device_bytes"]["peak"]
    assert plain["options"][-1]["placement"] == "8-bit"
    assert small["options"][-1]["placement"] != "8-bit"


@pytest.mark.slow
def test_8_bit_layers_that_a_device_does_not_have_are_refused():
    arguments = ("plan", "--model", "nano", "--device", "rtx3090", "--linear", "float8")
    refused = error_line(swifti2v(*arguments))
    assert "has no 8-bit floating point; use int8" in refused


@pytest.mark.slow
def test_a_device_that_runs_out_of_memory_keeps_what_is_finished(model, photo, tmp_path):
    output, flags = tmp_path / "out.mkv", (*LOSSLESS, "--work-dir", tmp_path / "work")
    calls = []

    def run_out(module: torch.nn.Module, inputs: Any) -> None:
        if isinstance(module, SegmentTransformer3DModel):
            calls.append(inputs)
            if len(calls) == 4:  # the second segment's second step
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = register_module_forward_pre_hook(run_out)
    try:
        line = error_line(generate(model, photo, output, *flags))
    finally:
        hook.remove()

    assert "out of memory in stage stage2 (CUDA out of memory. Tried to allocate 2.00 GiB)" in line
    assert "--placement" in line or "choose a smaller size" in line
    assert "1 of 4 segments (5 frames) are kept" in line
    succeed(generate(model, photo, output, *flags, "--resume"))
    succeed(generate(model, photo, tmp_path / "whole.mkv", *LOSSLESS))
    assert_same_frames(output, tmp_path / "whole.mkv")


def test_a_plan_compares_the_files_and_counts_the_host():
    arguments = ("plan", "--model", "paper", "--device", "rtx4090", "--host-memory", 32)
    plan = json.loads(succeed(swifti2v(*arguments, "--variant", "fp8", "--json")).stdout)

    assert plan["fits"]
    assert plan["model"] == "paper:fp8"
    assert [*plan["variants"]] == ["bf16", "fp8", "gguf-q4"]
    assert [found["fits"] for found in plan["variants"].values()] == [False, True, True]
    mine = plan["variants"]["fp8"]
    assert mine["host_bytes"] == plan["host_bytes"] < 32 * GB
    assert mine["peak_device_bytes"] == plan["peak_device_bytes"]["peak"]
    assert "loaded part after part for each clip" in mine["kept"]
    text = succeed(swifti2v(*arguments)).stdout
    assert "does not fit: nothing fits into 24.0 GB with 32.0 GB of host memory" in text
    assert "\nfp8          yes" in text


def test_variants_are_those_of_the_model(tmp_path):
    arguments = ("plan", "--model", "nano", "--device", "rtx4090")
    assert [*json.loads(succeed(swifti2v(*arguments, "--json")).stdout)["variants"]] == ["bf16"]
    message = error_line(swifti2v(*arguments, "--variant", "fp8"))
    assert "variant 'fp8' is unknown; there are bf16" in message
    message = error_line(swifti2v("plan", "--model", "paper:fp4", "--device", "rtx4090"))
    assert "variant 'fp4' is unknown; there are bf16, fp8, gguf-q4" in message
    values = yaml.safe_load((PACKAGE / "presets/paper.yaml").read_text())
    values["components"]["stage1_transformer"]["variants"] = {
        "q8": {"source": "people/gguf/stage1-Q8_0.gguf", "form": "Q8_0"}
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    own = ("plan", "--model", f"{tmp_path / 'own.yaml'}:q8", "--device", "rtx4090", "--json")
    plan = json.loads(succeed(swifti2v(*own)).stdout)
    assert {*plan["variants"]} == {"bf16", "fp8", "gguf-q4", "q8"}
    assert plan["disk_bytes"] == plan["variants"]["q8"]["disk_bytes"]
    assert plan["disk_bytes"] < plan["variants"]["bf16"]["disk_bytes"] - 10 * GB


@pytest.mark.parametrize("amount", [0, -3])
def test_host_memory_is_above_0(amount):
    arguments = ("plan", "--model", "nano", "--device", "h100", "--host-memory", amount)
    assert "--host-memory" in error_line(swifti2v(*arguments))
