import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from swifti2v.errors import LoadingError, NumericalError, ShapeError
from swifti2v.models.image_encoder import (
    encode_image,
    load_image_processor,
    make_image_processor,
    preprocess_for_clip,
)


def make_encoder() -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    encoder: CLIPVisionModel = CLIPVisionModel(config)
    encoder.train(False)
    return encoder


def make_processor(side: int = 28) -> CLIPImageProcessorPil:
    """Image processor of diffusers' repositories, with a crop."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def make_photo(width: int = 60, height: int = 40) -> Image.Image:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def official_pixels(photo: Image.Image, side: int) -> torch.Tensor:
    """The recipe of Wan 2.1, written out: https://github.com/Wan-Video/Wan2.1."""
    image = torch.tensor(np.asarray(photo.convert("RGB")), dtype=torch.float64).permute(2, 0, 1)
    image = (image / 255 - 0.5) / 0.5
    square = torch.nn.functional.interpolate(
        image[None], size=(side, side), mode="bicubic", align_corners=False
    )
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    return (square.mul(0.5).add(0.5) - mean) / std


@pytest.mark.parametrize("size", [(60, 40), (224, 224), (640, 352), (90, 300)])
def test_pixels_are_those_of_the_official_code(size):
    photo = make_photo(*size)
    got = preprocess_for_clip(make_image_processor(224), photo)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), official_pixels(photo, 224), atol=1e-5, rtol=0)


def test_what_diffusers_would_cut_off_is_seen():
    photo = make_photo(400, 220)
    changed = photo.copy()
    changed.paste((255, 0, 0), (0, 0, 80, 220))
    for processor in (make_image_processor(28), make_processor()):
        differs = preprocess_for_clip(processor, photo) != preprocess_for_clip(processor, changed)
        assert differs[..., :4].any()


def test_embeddings_equal_those_of_diffusers_for_the_same_pixels():
    encoder = make_encoder()
    with torch.no_grad():
        states = encoder(official_pixels(make_photo(), 28).float(), output_hidden_states=True)
    got = encode_image(encoder, make_image_processor(28), make_photo())
    torch.testing.assert_close(got, states.hidden_states[-2], atol=1e-5, rtol=1e-5)
    assert got.shape == (1, 2 * 2 + 1, 16)
    assert not got.requires_grad


def spoil_layer(encoder: CLIPVisionModel, index: int) -> None:
    layer: Any = encoder.encoder.layers[index]
    layer.mlp.fc2.weight.data.fill_(9.0)


def test_embeddings_are_the_states_before_the_last_layer():
    encoder, processor = make_encoder(), make_image_processor(28)
    got = encode_image(encoder, processor, make_photo())
    spoil_layer(encoder, -1)
    assert torch.equal(encode_image(encoder, processor, make_photo()), got)
    spoil_layer(encoder, -2)
    assert not torch.equal(encode_image(encoder, processor, make_photo()), got)


@pytest.mark.parametrize("size", [(28, 28), (300, 20), (20, 300), (1, 1), (2560, 1408)])
def test_any_size_becomes_the_encoder_s_square(size):
    assert preprocess_for_clip(make_image_processor(28), make_photo(*size)).shape == (1, 3, 28, 28)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode_is_read_as_rgb(mode):
    photo = make_photo().convert(mode)
    processor = make_image_processor(28)
    expected = preprocess_for_clip(processor, photo.convert("RGB"))
    assert torch.equal(preprocess_for_clip(processor, photo), expected)


def test_an_empty_image_and_a_foreign_processor_are_refused():
    with pytest.raises(ShapeError, match="0 x 5"):
        preprocess_for_clip(make_image_processor(28), Image.new("RGB", (0, 5)))
    with pytest.raises(LoadingError, match="takes 28 x 28"):
        encode_image(make_encoder(), make_image_processor(42), make_photo())


def test_nan_in_the_encoder_is_reported():
    encoder = make_encoder()
    encoder.pre_layrnorm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        encode_image(encoder, make_image_processor(28), make_photo())


def test_embeddings_take_the_encoder_s_dtype():
    encoder = make_encoder().double()
    assert encode_image(encoder, make_image_processor(28), make_photo()).dtype == torch.float64


def test_what_is_saved_shows_diffusers_the_whole_picture(tmp_path):
    photo, processor = make_photo(400, 220), make_image_processor(28)
    processor.save_pretrained(tmp_path)
    got = preprocess_for_clip(load_image_processor(tmp_path), photo)
    assert torch.equal(got, preprocess_for_clip(processor, photo))
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)
    pixels = theirs(images=photo, return_tensors="pt")["pixel_values"]
    assert (pixels - got).abs().mean() < 0.1
    cropped = make_processor()(images=photo, return_tensors="pt")["pixel_values"]
    assert (cropped - got).abs().mean() > 0.3


def write_config(directory: Path, text: str) -> None:
    (directory / "preprocessor_config.json").write_text(text)


def test_the_hub_s_processor_config_is_read(tmp_path):
    wan = {  # the keys of Wan2.1-I2V's image_processor
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 224},
    }
    write_config(tmp_path, json.dumps(wan))
    got = preprocess_for_clip(load_image_processor(tmp_path), make_photo())
    assert torch.equal(got, preprocess_for_clip(make_image_processor(224), make_photo()))


def test_a_missing_or_broken_processor_config_is_refused(tmp_path):
    with pytest.raises(LoadingError, match=r"no preprocessor_config\.json"):
        load_image_processor(tmp_path)
    write_config(tmp_path, "{")
    with pytest.raises(LoadingError, match="cannot read"):
        load_image_processor(tmp_path)
