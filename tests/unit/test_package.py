"""Promises of the package as a whole."""

import subprocess
import sys

import swifti2v


def test_public_names_are_pinned():
    assert swifti2v.__all__ == [
        "PixelShape", "Segment", "SwiftI2VPipeline", "__version__", "errors", "plan_segments",
    ]  # fmt: skip
    assert all(hasattr(swifti2v, name) for name in swifti2v.__all__)


def test_names_others_hold_on_to_exist():
    from swifti2v.models.lora.merge import merge_lora
    from swifti2v.models.transformer import SegmentTransformer3DModel
    from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
    from swifti2v.training.objectives import segment_flow_loss

    names = (merge_lora, SegmentTransformer3DModel, StreamingDecoder, StreamingEncoder)
    assert all(callable(name) for name in (*names, segment_flow_loss))


def test_integers_and_settings_need_no_torch():
    code = (
        "import sys, swifti2v, swifti2v.config, swifti2v.shapes; "
        "sys.exit(bool({'torch', 'diffusers', 'av'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_keep_their_paths() -> None:
    from swifti2v.models.lora import merge_lora
    from swifti2v.models.transformer import SegmentTransformer3DModel
    from swifti2v.models.vae import StreamingDecoder, StreamingEncoder
    from swifti2v.training.objectives import hfato_loss, segment_flow_loss

    names = (
        merge_lora,
        SegmentTransformer3DModel,
        StreamingDecoder,
        StreamingEncoder,
        hfato_loss,
        segment_flow_loss,
    )
    assert all(callable(name) for name in names)
