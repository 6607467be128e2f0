"""Layers, losses, initial values, and Module, of which all are made."""

from gradengine.nn import functional, init
from gradengine.nn.activation import (
    ELU,
    GELU,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from gradengine.nn.clipping import clip_grad_norm_
from gradengine.nn.container import ModuleDict, ModuleList, Sequential
from gradengine.nn.convolution import Conv1d, Conv2d
from gradengine.nn.dropout import Dropout
from gradengine.nn.freezing import FrozenAudit, audit_frozen
from gradengine.nn.fusion import conv_norm
from gradengine.nn.linear import Identity, Linear
from gradengine.nn.loss import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    L1Loss,
    MSELoss,
    NLLLoss,
    SmoothL1Loss,
)
from gradengine.nn.module import Module
from gradengine.nn.normalization import BatchNorm1d, BatchNorm2d, LayerNorm
from gradengine.nn.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from gradengine.nn.shape import Flatten, Unflatten, Upsample
from gradengine.tensor import Parameter

__all__ = [
    "ELU",
    "GELU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Flatten",
    "FrozenAudit",
    "Identity",
    "L1Loss",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool2d",
    "Module",
    "ModuleDict",
    "ModuleList",
    "NLLLoss",
    "Parameter",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SmoothL1Loss",
    "Softmax",
    "Softplus",
    "Tanh",
    "Unflatten",
    "Upsample",
    "audit_frozen",
    "clip_grad_norm_",
    "conv_norm",
    "functional",
    "init",
]
