"""``--preview-decoder``: a light decoder's look at a clip, and the VAE's from the same latents."""

import json
from pathlib import Path

import pytest

from swifti2v.jobs.settings import read_settings
from tests.helpers import hub
from tests.helpers.command_line import (
    LOSSLESS,
    assert_same_frames,
    error_line,
    frames_of,
    generate,
    save_photo,
    succeed,
    swifti2v,
)
from tests.unit.models.vae.test_light_decoder import plain_file, save


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return hub.write_preset(hub.make_hub(folder), folder)


@pytest.fixture
def decoder(tmp_path):
    return save(plain_file(48, 2), tmp_path / "taew2_2.pth")


@pytest.mark.slow
def test_a_preview_is_decoded_again_without_a_model_call(model, photo, decoder, tmp_path):
    whole, preview, after = (tmp_path / f"{name}.mkv" for name in ("whole", "preview", "after"))
    work = tmp_path / "work"
    succeed(generate(model, photo, whole, *LOSSLESS))
    light = ("--preview-decoder", decoder)

    result = succeed(generate(model, photo, preview, *LOSSLESS, *light, "--work-dir", work))

    assert f"a preview: decoded with {decoder}" in result.stdout
    assert frames_of(preview).shape == frames_of(whole).shape
    assert (frames_of(preview) != frames_of(whole)).mean() > 0.5
    record = read_settings(preview).preview_decoder
    assert record is not None
    assert record.path == str(decoder)
    result = succeed(
        generate(model, photo, after, *LOSSLESS, "--work-dir", work, "--resume", "--json")
    )
    assert json.loads(result.stdout)["seconds"]["stage1"] == 0
    assert_same_frames(after, whole)
    assert read_settings(after) == read_settings(whole)


@pytest.mark.slow
def test_like_a_preview_makes_the_full_clip_and_says_so(model, photo, decoder, tmp_path):
    whole, preview, after = (tmp_path / f"{name}.mkv" for name in ("whole", "preview", "after"))
    succeed(generate(model, photo, whole, *LOSSLESS))
    succeed(generate(model, photo, preview, *LOSSLESS, "--preview-decoder", decoder))
    result = succeed(swifti2v("generate", "--like", preview, "-o", after))
    assert f"{preview} is a preview" in result.stdout
    assert_same_frames(after, whole)


def test_what_cannot_decode_is_refused_before_anything_is_written(model, photo, tmp_path):
    output, work = tmp_path / "out.mkv", tmp_path / "work"
    other = save(plain_file(16, 1), tmp_path / "taew2_1.pth")
    for decoder, match in (
        (other, "z_dim is 16, this model's 48"),
        (tmp_path / "none.pth", "none.pth: No such file"),
        (save_photo(tmp_path / "photo.png", 8, 8), "not a weight file"),
    ):
        result = generate(model, photo, output, "--preview-decoder", decoder, "--work-dir", work)
        assert match in error_line(result)
    result = generate(Path("nano"), photo, output, "--preview-decoder", other)
    assert "leave it out" in error_line(result)
    assert not output.exists()
    assert not work.exists()
