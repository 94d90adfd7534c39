import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from swifti2v.errors import LoadingError, NumericalError, ShapeError
from swifti2v.models.image_encoder import (
    encode_image,
    load_image_processor,
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
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def make_photo(width: int = 60, height: int = 40) -> Image.Image:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_embeddings_equal_those_of_diffusers():
    encoder, processor = make_encoder(), make_processor()
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": None}
    make_pipeline: Any = WanImageToVideoPipeline
    pipeline = make_pipeline(**parts, image_encoder=encoder, image_processor=processor)
    with torch.no_grad():
        expected = pipeline.encode_image(make_photo(), device=torch.device("cpu"))
    got = encode_image(encoder, processor, make_photo())
    assert torch.equal(got, expected)
    assert got.shape == (1, 2 * 2 + 1, 16)
    assert not got.requires_grad


def spoil_layer(encoder: CLIPVisionModel, index: int) -> None:
    layer: Any = encoder.encoder.layers[index]
    layer.mlp.fc2.weight.data.fill_(9.0)


def test_embeddings_are_the_states_before_the_last_layer():
    encoder, processor = make_encoder(), make_processor()
    got = encode_image(encoder, processor, make_photo())
    spoil_layer(encoder, -1)
    assert torch.equal(encode_image(encoder, processor, make_photo()), got)
    spoil_layer(encoder, -2)
    assert not torch.equal(encode_image(encoder, processor, make_photo()), got)


def test_preprocessing_is_bicubic_centre_crop_and_normalisation():
    photo, processor = make_photo(60, 40), make_processor(28)
    resized = photo.resize((42, 28), Image.Resampling.BICUBIC)
    crop = np.asarray(resized.crop((7, 0, 35, 28)), np.float32) / 255
    expected = (crop - np.array(processor.image_mean)) / np.array(processor.image_std)
    got = preprocess_for_clip(processor, photo)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(28, 28), (300, 20), (20, 300), (1, 1), (2560, 1408)])
def test_any_size_becomes_the_encoder_s_square(size):
    assert preprocess_for_clip(make_processor(), make_photo(*size)).shape == (1, 3, 28, 28)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode_is_read_as_rgb(mode):
    photo = make_photo().convert(mode)
    expected = preprocess_for_clip(make_processor(), photo.convert("RGB"))
    assert torch.equal(preprocess_for_clip(make_processor(), photo), expected)


def test_an_empty_image_and_a_foreign_processor_are_refused():
    with pytest.raises(ShapeError, match="0 x 5"):
        preprocess_for_clip(make_processor(), Image.new("RGB", (0, 5)))
    with pytest.raises(LoadingError, match="takes 28 x 28"):
        encode_image(make_encoder(), make_processor(42), make_photo())


def test_nan_in_the_encoder_is_reported():
    encoder = make_encoder()
    encoder.pre_layrnorm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        encode_image(encoder, make_processor(), make_photo())


def test_embeddings_take_the_encoder_s_dtype():
    encoder = make_encoder().double()
    assert encode_image(encoder, make_processor(), make_photo()).dtype == torch.float64


def test_processor_round_trip_through_its_folder(tmp_path):
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    loaded = load_image_processor(tmp_path)
    photo = make_photo()
    assert torch.equal(preprocess_for_clip(loaded, photo), preprocess_for_clip(processor, photo))


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
    assert preprocess_for_clip(load_image_processor(tmp_path), make_photo()).shape[-1] == 224


def test_a_missing_or_broken_processor_config_is_refused(tmp_path):
    with pytest.raises(LoadingError, match=r"no preprocessor_config\.json"):
        load_image_processor(tmp_path)
    write_config(tmp_path, "{")
    with pytest.raises(LoadingError, match="cannot read"):
        load_image_processor(tmp_path)
