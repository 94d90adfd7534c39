"""What ``swifti2v train`` can train on its own: settings, prediction and training of each part."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from swifti2v.training.costs.plan import TrainingPlan
from swifti2v.training.data.record import require_same_clips
from swifti2v.training.engine.session import Session
from swifti2v.training.nano.config import TextEncoderConfig
from swifti2v.training.nano.plan import plan_text_encoder
from swifti2v.training.nano.text_encoder import train_text_encoder
from swifti2v.training.relay.training import RelayTraining, plan_relay, train_relay
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.fine_tuning import FineTuning, plan_stage
from swifti2v.training.vae.training import VaeTrainingConfig, plan_vae, train_vae


class Part(NamedTuple):
    """Something to train."""

    settings: type[Any]
    """Its configuration; has ``run``."""
    plan: Callable[[Any], Sequence[TrainingPlan]]
    """Predicts what it takes, one training after the other."""
    train: Callable[[Any, Session], Path]
    """Trains it and says what was written."""


def fine_tune(config: Stage1FineTuning | Stage2FineTuning, session: Session) -> Path:
    """Train a stage of a model that is there."""
    tuning = FineTuning(config, session.directory, session.ranks)
    require_same_clips(tuning.clips, session)
    return tuning.run(
        resume=session.resume,
        max_steps=session.max_steps,
        trackers=session.trackers,
        on_step=session.on_step,
    )


PARTS = {
    "stage1": Part(Stage1FineTuning, lambda config: [plan_stage(config)], fine_tune),
    "stage2": Part(Stage2FineTuning, lambda config: [plan_stage(config)], fine_tune),
    "relay": Part(RelayTraining, plan_relay, train_relay),
    "vae": Part(VaeTrainingConfig, lambda config: [plan_vae(config)], train_vae),
    "text": Part(TextEncoderConfig, lambda config: [plan_text_encoder(config)], train_text_encoder),
}
