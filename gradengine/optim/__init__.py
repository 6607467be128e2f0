"""Optimizers and learning rate schedules."""

from gradengine.optim.adam import Adam, AdamW
from gradengine.optim.optimizer import Optimizer
from gradengine.optim.schedule import (
    CosineAnnealingLR,
    LambdaLR,
    MultiStepLR,
    Schedule,
    StepLR,
)
from gradengine.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CosineAnnealingLR",
    "LambdaLR",
    "MultiStepLR",
    "Optimizer",
    "Schedule",
    "StepLR",
]
