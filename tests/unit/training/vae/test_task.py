"""The loss of a video VAE, with the perceptual distance."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from swifti2v.training.engine.draws import Draw
from swifti2v.training.stages.batches import VideoBatch
from swifti2v.training.vae.task import VaeObjective, VaeTask

VGG_FILE = "hub/checkpoints/vgg16-397923af.pth"
"""Where torchvision keeps the weights it has downloaded, below ``TORCH_HOME``."""
DRAW = Draw(seed=0, step=0, batch_size=2, indices=(0, 1))


@pytest.fixture
def vgg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG16 with random weights in the place of the ones that LPIPS would download."""
    pytest.importorskip("lpips")
    models: Any = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in models.vgg16().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.startswith("features") and len(shape) == 4:
            state[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
    (tmp_path / VGG_FILE).parent.mkdir(parents=True)
    torch.save(state, tmp_path / VGG_FILE)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def make_task(lpips_weight: float) -> VaeTask:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return VaeTask(vae, (), None, VaeObjective(lpips_weight=lpips_weight))


def loss_of(task: VaeTask) -> Tensor:
    video = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return task.loss(
        VideoBatch(ids=("a", "b"), num_replaced=0, prompts=("", ""), video=video), DRAW
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum")
def test_the_perceptual_distance_is_added_by_its_weight_and_reaches_the_vae(
    vgg: None, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, tasks = make_task(0.0), [make_task(weight) for weight in (0.5, 1.0)]
    base, half, whole = (loss_of(task) for task in (plain, *tasks))
    distance = whole - base
    assert distance.shape == (2,)
    assert (distance > 0).all()
    assert distance[0] != distance[1]  # each sample has its own
    torch.testing.assert_close(half, base + 0.5 * distance, rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().out == ""  # the command prints its result there

    task = tasks[1]
    (distance_gradient,) = torch.autograd.grad(whole.sum(), [task.model.decoder.conv_out.weight])
    (gradient,) = torch.autograd.grad(base.sum(), [plain.model.decoder.conv_out.weight])
    assert not torch.allclose(distance_gradient, gradient)
    assert task.lpips is not None
    assert not any(value.requires_grad for value in task.lpips.parameters())
    assert task.lpips not in task.model.modules()  # it is neither trained nor saved
