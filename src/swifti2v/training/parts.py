"""Parts that ``swifti2v train`` can train alone: settings, prediction and training of each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from swifti2v.training.costs.plan import TrainingPlan
from swifti2v.training.engine.session import Session
from swifti2v.training.nano.config import TextEncoderConfig
from swifti2v.training.nano.plan import plan_text_encoder
from swifti2v.training.nano.text_encoder import train_text_encoder
from swifti2v.training.relay.training import RelayTraining, plan_relay, train_relay
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.fine_tuning import fine_tune, plan_stage
from swifti2v.training.vae.training import VaeTrainingConfig, plan_vae, train_vae


class TrainingPart(NamedTuple):
    """Something to train."""

    settings: type[Any]
    """Class of its configuration, with the field ``run``."""
    plan: Callable[[Any], Sequence[TrainingPlan]]
    """Predicts what it takes, one training after the other."""
    train: Callable[[Any, Session], Path]
    """Trains it and says what was written."""


PARTS = {
    "stage1": TrainingPart(Stage1FineTuning, lambda config: [plan_stage(config)], fine_tune),
    "stage2": TrainingPart(Stage2FineTuning, lambda config: [plan_stage(config)], fine_tune),
    "relay": TrainingPart(RelayTraining, plan_relay, train_relay),
    "vae": TrainingPart(VaeTrainingConfig, lambda config: [plan_vae(config)], train_vae),
    "text": TrainingPart(
        TextEncoderConfig, lambda config: [plan_text_encoder(config)], train_text_encoder
    ),
}
