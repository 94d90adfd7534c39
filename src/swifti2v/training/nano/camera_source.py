"""Training clips of Stage I: camera moves over pictures."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from swifti2v.pipelines.camera_moves import CameraMove
from swifti2v.pipelines.course import draw_course, stack_courses
from swifti2v.shapes import FrameSize, pixel_frames
from swifti2v.training.data.camera_motion import Scene, draw_thing, draw_view, render_move
from swifti2v.training.data.motion_prompts import draw_prompt
from swifti2v.training.engine.draws import Draw, choose, draw_share
from swifti2v.training.stages.batches import Stage1Frames


class CameraMoveSource:
    """Camera moves over pictures, each with a sentence that asks for it.

    The pictures have at least the clips' size. Sizes, lengths in latent frames and the number of
    frames that a step draws besides the photo's come with the share of the steps that take each.
    The chart tells the time of the drawn frames.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        sizes: Mapping[FrameSize, float],
        lengths: Mapping[int, float],
        num_drawn: Mapping[int, float],
    ) -> None:
        self.scenes, self.sizes = scenes, sizes
        self.lengths, self.num_drawn = lengths, num_drawn

    def load(self, draw: Draw) -> Stage1Frames:
        """See ``FrameSource``."""
        rng = draw.shared()
        size = draw_share(self.sizes, rng)
        num_latent_frames = draw_share(self.lengths, rng)
        number = min(draw_share(self.num_drawn, rng), num_latent_frames - 1)
        drawn = 1 + rng.permutation(num_latent_frames - 1)[:number]
        frames = (0, *sorted(int(frame) for frame in drawn))
        pixels = [pixel for frame in frames for pixel in pixel_frames(frame)]
        last = pixel_frames(num_latent_frames - 1)[-1]
        names, prompts, videos, courses, ways = [], [], [], [], []
        for rng in draw.samples():
            prompt = draw_prompt(rng)
            scene = self._draw_scene(prompt.move, rng)
            course = draw_course(last + 1, int(rng.integers(2**62))).at(pixels)
            view = draw_view(scene.picture.shape[:2], size, rng)
            video, way = render_move(scene, view, prompt.move, course, size)
            names.append(prompt.text)
            prompts.append(prompt.text)
            videos.append(video)
            courses.append(course)
            ways.append(way)
        return Stage1Frames(
            ids=tuple(names),
            num_replaced=0,
            video=torch.stack(videos),
            prompts=tuple(prompts),
            course=stack_courses(courses),
            displacement=torch.stack(ways),
        )

    def _draw_scene(self, move: CameraMove, rng: np.random.Generator) -> Scene:
        """Any; where near and far differ, one with something in front, real or drawn."""
        if move.dolly == move.orbit == 0:
            return choose(self.scenes, rng)
        with_front = [scene for scene in self.scenes if scene.front is not None]
        if with_front and rng.random() < 0.4:
            return choose(with_front, rng)
        first, second = choose(self.scenes, rng), choose(self.scenes, rng)
        return draw_thing(first.picture, second.picture, rng) if rng.random() < 0.4 else first
