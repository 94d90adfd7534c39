import numpy as np
import torch

from swifti2v.cli.report import Pace, ProgressDisplay
from swifti2v.pipelines.decoding import SegmentOutput
from swifti2v.pipelines.progress import Progress


def test_the_time_left_is_that_of_the_steps_left():
    now = iter([100.0, 110.0, 130.0, 140.0])
    pace = Pace(lambda: next(now))

    said = [pace.find_left(done, 4) for done in (1, 2, 3, 4)]

    assert said == ["", ", 0:00:20 left", ", 0:00:15 left", ""]


def test_a_run_that_continues_counts_only_what_is_made_now():
    now = iter([0.0, 3.0])
    pace = Pace(lambda: next(now))

    assert [pace.find_left(done, 100) for done in (90, 91)] == ["", ", 0:00:27 left"]


def test_segments_say_the_time_left(capsys):
    with ProgressDisplay(2) as display:
        for segment in range(2):
            for step in (1, 2):
                display.on_progress(
                    Progress(
                        stage="stage2", step=step, num_steps=2, segment=segment, num_segments=2
                    )
                )
            frames, nothing = np.zeros((5, 1, 1, 3), np.uint8), torch.zeros(0)
            display.on_segment(SegmentOutput(segment, frames, (0, 1), 1.25, nothing))

    first, second = capsys.readouterr().err.splitlines()
    assert first == "segment 1 of 2 done: 5 frames, 1.2 s, 0:00:00 left"
    assert second == "segment 2 of 2 done: 5 frames, 1.2 s"
