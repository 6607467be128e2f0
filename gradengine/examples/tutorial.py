"""A first look at automatic differentiation: one training step, the tape, and a frozen network.

    python -m gradengine.examples.tutorial

It follows PyTorch's "A Gentle Introduction to torch.autograd" with this package's names.
"""

from __future__ import annotations

import gradengine as ge
from gradengine import nn
from gradengine.models import resnet18


def one_training_step() -> None:
    """Send one image through a ResNet-18, and its weights one step down the gradient."""
    print("== One training step")
    model = resnet18(
        weights=None
    )  # random weights, which need no download; "DEFAULT" fetches ImageNet's
    data = ge.rand(1, 3, 64, 64)  # one image: 3 channels of 64 x 64 pixels
    labels = ge.rand(1, 1000)

    prediction = model(data)  # forward: every operation leaves a node on the tape
    loss = (prediction - labels).sum()
    print("loss:", loss)

    loss.backward()  # backward: each parameter's gradient is now in its .grad
    print("gradient of conv1.weight:", model.conv1.weight.grad.shape)

    optimizer = ge.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    before = model.conv1.weight.detach().clone()
    optimizer.step()  # each parameter moves by -lr times its gradient
    moved = before - 1e-2 * model.conv1.weight.grad
    print("conv1.weight moved against its gradient:", ge.allclose(model.conv1.weight, moved))


def the_tape() -> None:
    """Look at what a result remembers of how it was made."""
    print("\n== The tape")
    model = resnet18(weights=None)
    loss = (model(ge.rand(1, 3, 64, 64)) - ge.rand(1, 1000)).sum()
    print("a parameter is a leaf:", model.fc.weight.is_leaf, model.fc.weight.grad_fn)
    print("the loss is none:", loss.is_leaf, loss.grad_fn)

    node = loss.grad_fn
    names = []
    while node is not None:  # along the first input of each operation
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    print("the way back:", " <- ".join(names[:6]), "<- ... <-", names[-1])
    print("the labels need no gradient:", loss.grad_fn.next_functions[0][0].next_functions[1])


def gradients_by_hand() -> None:
    """Compare gradients with those that calculus gives."""
    print("\n== Gradients by hand")
    a = ge.tensor([2.0, 3.0], requires_grad=True)
    b = ge.tensor([6.0, 4.0], requires_grad=True)
    Q = 3 * a**3 - b**2  # noqa: N806 - the tutorial's name
    print("Q:", Q)

    # Q has two elements, so backward needs the gradient of some scalar by Q: here of Q's sum.
    external_grad = ge.tensor([1.0, 1.0])
    Q.backward(gradient=external_grad)
    print("dQ/da = 9a^2:", a.grad, 9 * a**2 == a.grad)
    print("dQ/db = -2b: ", b.grad, -2 * b == b.grad)


def what_is_left_out() -> None:
    """Keep what needs no gradient out of the tape."""
    print("\n== What is left out of the tape")
    x = ge.rand(5, 5)
    y = ge.rand(5, 5)
    z = ge.rand(5, 5, requires_grad=True)
    print("does x + y require gradients?", (x + y).requires_grad)
    print("does x + z?", (x + z).requires_grad)
    with ge.no_grad():
        print("and under no_grad?", (x + z).requires_grad)


def a_frozen_network() -> None:
    """Freeze a network, give it a new last layer, and train that layer alone."""
    print("\n== A frozen network")
    model = resnet18(weights=None)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.eval()  # or else batch normalisation would still learn its statistics; model.freeze() does both
    model.fc = nn.Linear(512, 10)  # new layers require gradients

    optimizer = ge.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = nn.functional.cross_entropy(model(ge.rand(2, 3, 64, 64)), ge.tensor([3, 7]))
    loss.backward()
    optimizer.step()  # parameters without a gradient are passed over

    moved = [
        name for name, tensor in model.state_dict().items() if not ge.equal(tensor, before[name])
    ]
    assert moved == ["fc.weight", "fc.bias"]
    print(f"moved: {' and '.join(moved)}, of {len(before)} tensors")


def main() -> None:
    ge.manual_seed(0)
    one_training_step()
    the_tape()
    gradients_by_hand()
    what_is_left_out()
    a_frozen_network()


if __name__ == "__main__":
    main()
