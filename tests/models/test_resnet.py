"""ResNets by themselves: structure, initial values, what a frozen backbone costs, and that they learn."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional as F
from gradengine import kernels, models, nn, optim
from gradengine.tape import Node


@pytest.fixture
def model():
    ge.manual_seed(0)
    return models.resnet18()


def nodes(tensor: ge.Tensor) -> set[Node]:
    """Return every node of the graph that ends in a tensor."""
    found: set[Node] = set()
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return found


def test_structure(model):
    state = model.state_dict()
    assert len(state) == 122
    assert len(list(model.parameters())) == 62
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512
    names = list(state)
    assert names[:6] == [
        *("conv1.weight", "bn1.weight", "bn1.bias"),
        *("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"),
    ]
    assert names[-2:] == ["fc.weight", "fc.bias"]
    assert state["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert [name for name, _ in model.named_children()] == [
        *("conv1", "bn1", "relu", "maxpool"),
        *("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"),
    ]


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (models.resnet34, 21_797_672),
        (models.resnet50, 25_557_032),
        (models.resnet101, 44_549_160),
        (models.resnet152, 60_192_808),
    ],
)
def test_parameters_of_other_depths(make, count):
    assert sum(parameter.numel() for parameter in make().parameters()) == count


def test_initial_values(model):
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            std = module.weight.detach().array.std()
            assert std == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight.array == 1).all()
            assert (module.bias.array == 0).all()
    assert abs(model.fc.weight.array).max() <= 1 / math.sqrt(512)


def test_repr_shows_blocks(model):
    text = repr(model)
    assert "(layer1): Sequential(\n    (0): BasicBlock(\n" in text
    assert (
        "(conv1): Conv2d(3, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False)"
        in text
    )
    assert "(fc): Linear(in_features=512, out_features=1000, bias=True)" in text


def test_shapes_and_classes():
    small = models.resnet18(num_classes=10).eval()
    with ge.no_grad():
        assert small(ge.randn(2, 3, 33, 40)).shape == (2, 10)
        assert models.resnet50(num_classes=4).eval()(ge.randn(1, 3, 32, 32)).shape == (1, 4)


def test_training_needs_more_than_one_value_per_channel(model):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(ge.randn(1, 3, 32, 32))
    assert model(ge.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_the_training_graph_is_small(model):
    loss = F.cross_entropy(model(ge.randn(2, 3, 64, 64)), ge.tensor([1, 2]))
    assert len(nodes(loss)) <= 109  # PyTorch's has 134: a batch norm, a sum and a ReLU are one here


def test_one_batch_overfits():
    ge.manual_seed(0)
    model = models.resnet18(num_classes=4)
    optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    images, labels = ge.randn(8, 3, 32, 32), ge.arange(8) % 4
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < 0.05
    with ge.no_grad():
        assert model(images).argmax(1).tolist() == labels.tolist()


# ---- one step for each convolution ---------------------------------------------------------------

MODELS = {"resnet18": (20, 17, 8), "resnet50": (53, 49, 16)}  # convolutions, ReLUs, residuals


def note_calls(monkeypatch, name):
    """Note the arguments of each call of a kernel, by name."""
    calls = []
    kernel = getattr(kernels, name)

    def noted(*args, **options):
        bound = inspect.signature(kernel).bind(*args, **options)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return kernel(*args, **options)

    monkeypatch.setattr(kernels, name, noted)
    return calls


@pytest.mark.parametrize("depth", MODELS)
def test_without_gradients_convolutions_do_all_of_a_block(monkeypatch, depth):
    model = getattr(models, depth)(num_classes=4).eval()
    convolutions = note_calls(monkeypatch, "conv2d")
    others = note_calls(monkeypatch, "scale_shift"), note_calls(monkeypatch, "batch_norm_act")
    with ge.no_grad():
        model(ge.randn(1, 3, 32, 32))
    relus = sum(given["relu"] for given in convolutions)
    residuals = sum(given["residual"] is not None for given in convolutions)
    assert (len(convolutions), relus, residuals) == MODELS[depth]
    assert others == ([], [])


def test_in_training_statistics_come_from_the_convolutions(model, monkeypatch):
    convolutions = note_calls(monkeypatch, "conv2d_moments")
    norms = note_calls(monkeypatch, "batch_norm_act")
    stems = note_calls(monkeypatch, "batch_norm_relu_max_pool")
    model(ge.randn(2, 3, 32, 32))
    assert len(convolutions) == len(norms) + len(stems) == 20
    assert len(stems) == 1
    assert sum(given["relu"] for given in norms) == 16
    assert sum(given["residual"] is not None for given in norms) == 8
    assert all(given["moments"] is not None for given in norms + stems)


@pytest.mark.parametrize("block", [models.resnet.BasicBlock, models.resnet.Bottleneck])
@pytest.mark.parametrize("training", [True, False])
def test_a_block_is_its_layers_one_after_the_other(block, training):
    ge.manual_seed(0)
    downsample = nn.Sequential(
        nn.Conv2d(6, 4 * block.expansion, 1, stride=2), nn.BatchNorm2d(4 * block.expansion)
    )
    layer = block(6, 4, 2, downsample).double().train(training)
    x = ge.randn(3, 6, 8, 8, dtype="float64")
    out = layer.bn1(layer.conv1(x)).relu()
    out = layer.bn2(layer.conv2(out))
    if block is models.resnet.Bottleneck:
        out = layer.bn3(layer.conv3(out.relu()))
    expected = (out + downsample[1](downsample[0](x))).relu()
    for recorded in (True, False):
        with ge.set_grad_enabled(recorded):
            found = layer(x)
        np.testing.assert_allclose(
            found.detach().array, expected.detach().array, rtol=1e-11, atol=1e-11
        )


def test_a_blocks_activation_may_be_replaced_or_hooked(model):
    block = model.layer1[0].eval()
    calls = []
    x = ge.randn(1, 64, 8, 8)
    with ge.no_grad():
        expected = block(x)
        block.relu.register_forward_hook(lambda module, args, output: calls.append(output))
        np.testing.assert_allclose(block(x).array, expected.array, rtol=1e-5, atol=1e-5)
        assert len(calls) == 2
        block.relu = nn.Tanh()
        assert abs(block(x).array).max() <= 1


# ---- a frozen backbone ---------------------------------------------------------------------------


def count_calls(monkeypatch, name):
    """Count the calls of a kernel."""
    calls = []
    kernel = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args: calls.append(args) or kernel(*args))
    return calls


@pytest.mark.filterwarnings("ignore:BatchNorm")
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_frozen_backbone_costs_no_graph_and_no_gradient_kernel(model, monkeypatch, by_hand):
    if by_hand:
        for parameter in model.parameters():
            parameter.requires_grad = False
    else:
        model.freeze()
    model.fc = nn.Linear(512, 10)
    grad_kernels = [
        count_calls(monkeypatch, name)
        for name in (
            "conv2d_grad_weight",
            "conv2d_grad_input",
            "batch_norm_act_grad",
            "batch_norm_relu_max_pool_grad",
            "max_pool2d_scatter",
        )
    ]
    loss = F.cross_entropy(model(ge.randn(2, 3, 64, 64)), ge.tensor([1, 2]))
    assert len(nodes(loss)) <= 6
    loss.backward()
    assert not any(grad_kernels)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        *("fc.weight", "fc.bias")
    }


def test_a_partly_frozen_model_runs_the_kernels_of_what_trains(model, monkeypatch):
    model.freeze()
    model.layer4.unfreeze()
    model.fc.unfreeze()
    weight_calls = count_calls(monkeypatch, "conv2d_grad_weight")
    input_calls = count_calls(monkeypatch, "conv2d_grad_input")
    F.cross_entropy(model(ge.randn(2, 3, 64, 64)), ge.tensor([1, 2])).backward()
    assert len(weight_calls) == 5
    assert len(input_calls) == 3  # not for the two convolutions that take the frozen part's result


def test_a_frozen_weight_inside_needs_no_gradient_kernel(model, monkeypatch):
    model.layer2[0].conv2.weight.requires_grad = False
    weight_calls = count_calls(monkeypatch, "conv2d_grad_weight")
    F.cross_entropy(model(ge.randn(2, 3, 64, 64)), ge.tensor([1, 2])).backward()
    assert len(weight_calls) == 19


def test_only_the_new_head_moves(model):
    model.freeze()
    model.fc = nn.Linear(512, 10)
    before = {name: tensor.array.copy() for name, tensor in model.state_dict().items()}
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with nn.audit_frozen(model) as audit:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(ge.randn(2, 3, 64, 64)), ge.tensor([1, 2])).backward()
            optimizer.step()
    assert len(audit.names) == 120
    moved = [n for n, t in model.state_dict().items() if not np.array_equal(t.array, before[n])]
    assert moved == ["fc.weight", "fc.bias"]
    assert len(optimizer.state) == 2


def test_freezing_by_hand_is_pytorchs_and_warns_of_all_twenty_layers(model):
    model.requires_grad_(False)
    before = {name: tensor.array.copy() for name, tensor in model.state_dict().items()}
    with pytest.warns(
        UserWarning, match=r"statistics: bn1, layer1\.0\.bn1.*layer4\.1\.bn2; call"
    ) as caught:
        model(ge.randn(2, 3, 64, 64))
    assert len(caught) == 1
    assert str(caught[0].message).count("bn") + str(caught[0].message).count("downsample") == 20
    moved = [n for n, t in model.state_dict().items() if not np.array_equal(t.array, before[n])]
    assert len(moved) == 60


@pytest.mark.gpu
def test_the_gpu_gives_the_cpus_logits(model, monkeypatch):
    monkeypatch.setattr(ge.backends.cuda, "conv_tf32", False)  # its 10 bits err by 4e-3
    images = ge.randn(2, 3, 64, 64)
    expected = model(images)
    model.cuda()
    found = model(images.cuda())
    np.testing.assert_allclose(
        found.detach().cpu().array, expected.detach().array, rtol=1e-3, atol=1e-3
    )
