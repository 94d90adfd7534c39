"""Parts of nano's Stage II training that its ablations share: the start, and redrawn motions."""

from collections.abc import Sequence

import numpy as np
import torch

from swifti2v.config import GenerationConfig, Stage2Config
from swifti2v.media import Frames, video_to_frames
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.pipelines.camera_moves import MOVES
from swifti2v.pipelines.course import draw_course
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.data.camera_motion import Scene, draw_view, render_move
from swifti2v.training.data.motion_prompts import ask_for
from swifti2v.training.engine.draws import draws_of_step, split_batch
from swifti2v.training.engine.precision import compute_in
from swifti2v.training.engine.run_config import RunConfig
from swifti2v.training.nano.config import RedrawConfig
from swifti2v.training.nano.initialization import initialize_stage2
from swifti2v.training.nano.material_source import MaterialSource, TransitionClip
from swifti2v.training.stages.encoded_clips import EncodedStage2
from swifti2v.training.stages.stage2 import Stage2Objective, Stage2Task
from swifti2v.training.transition.samples import TransitionConfig, draw_for, make_transition_sample

NUM_START_BATCHES = 12
"""Batches whose references the start of Stage II is measured on."""


def make_stage2_task(
    transformer: SegmentTransformer3DModel,
    codec: BlockCodec,
    objective: Stage2Objective,
    stage2: Stage2Config,
    sources: Sequence[MaterialSource],
) -> Stage2Task:
    """Nano's Stage II, which no prompt reaches: most of its clips have no captions."""
    no_text = torch.zeros(1, 1, transformer.config["text_dim"], device=transformer.device)
    return Stage2Task(
        transformer,
        codec,
        tuple(EncodedStage2(source, codec) for source in sources),
        objective,
        stage2,
        lambda prompts: no_text.expand(len(prompts), -1, -1),
    )


def start_stage2(task: Stage2Task, run: RunConfig) -> None:
    """Write the start into the new transformer of a task, see ``initialize_stage2``.

    Its batches are drawn where training does not reach.
    """
    parts = split_batch(run.batch_size, 1, 1)
    draws = (draws_of_step(run.seed, 2**40 + k, parts, 0)[0] for k in range(NUM_START_BATCHES))
    references = (task.source.encode(task.load_batch(draw))[1] for draw in draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        initialize_stage2(task.model, references)


def redraw_motions(
    pipe: SwiftI2VPipeline,
    pictures: Sequence[Frames],
    size: tuple[int, int],
    settings: GenerationConfig,
    config: RedrawConfig,
) -> list[TransitionClip]:
    """Camera motions over pictures, ``[H, W, 3]`` each, and Stage I's version of their small clips."""
    transition = TransitionConfig(
        generation=settings, sigma_low=config.sigma[0], sigma_high=config.sigma[1], seed=config.seed
    )
    clips = []
    for index in range(config.num_clips):
        rng = np.random.default_rng((config.seed, index))
        motion = list(MOVES)[index % len(MOVES)]
        picture = pictures[int(rng.integers(len(pictures)))]
        view = draw_view(picture.shape[:2], size, rng)
        # The course that Stage I is shown as well, so that both move alike.
        course = draw_course(settings.num_frames, draw_for(transition, f"{index}").seed)
        video, _ = render_move(Scene(picture, None, None), view, MOVES[motion], course, size)
        frames = video_to_frames(video[None])
        prompt = ask_for(motion, rng)
        with compute_in("bfloat16", pipe.components.device):
            low = make_transition_sample(pipe, frames, prompt, f"{index}", transition).frames
        clips.append(TransitionClip(f"{prompt} ({index})", frames, low, prompt))
    return clips
