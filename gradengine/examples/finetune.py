"""Finetune a ResNet-18 on images of your own: freeze it, give it a new last layer, train that.

    python -m gradengine.examples.finetune
    python -m gradengine.examples.finetune --data flowers --weights DEFAULT
    python -m gradengine.examples.finetune --data flowers --weights DEFAULT --unfreeze layer4
    python -m gradengine.examples.finetune --resume

The first line needs no files: it trains a network from scratch on the handwritten digits 0 to 4,
freezes it, and finetunes a new last layer on all ten. That takes a few minutes on two cores. The
second starts from ImageNet's weights (45 MB, downloaded once) and finetunes them on `flowers`, which
holds one folder of images a class. Without --weights, half of the classes serve to train the network
first, as with the digits. Accuracies are of images that are never trained on.

The folder --out gets model.pth (the weights), history.json, curves.png, and last.pth, from which
--resume goes on where a run was interrupted: to the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import gradengine as ge
from gradengine import data, nn
from gradengine.models import ResNet, ResNet18_Weights, resnet18
from gradengine.nn import functional as F
from gradengine.weights.replacing import replacing

# The options that decide a run's numbers, and so must not change when it is resumed.
DEFAULTS: dict[str, Any] = {
    "data": None,  # a folder; None for the digits
    "weights": None,  # a file, or DEFAULT for ImageNet's; None for random ones
    "unfreeze": None,  # the first layer that trains in the second stage; None for the new one alone
    "epochs": 4,  # of each stage
    "batch_size": 32,  # images a step
    "lr": 0.01,  # learning rate of the first epoch; it falls by the same amount with each
    "image_size": 32,  # pixels; the digits have 8 x 8
    "seed": 0,  # of weights, the choice of held-out images, and the order of the others
}
PHOTO_SIZE = 224  # pixels, for --data; what ImageNet's weights were trained on
MOMENTUM = 0.9
HELD_OUT = 0.25  # share of each class that is never trained on
COMMAND = "python -m gradengine.examples.finetune"
BACKBONE, HEAD = "backbone", "head"  # the stages: all layers from scratch, then the last one
RESULTS = CHECKPOINT, MODEL, HISTORY, CURVES = "last.pth", "model.pth", "history.json", "curves.png"


class BadInputError(Exception):
    """Say, in one line, what the caller must change."""


# ---- the command line ----------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, low: float) -> Callable[[str], Any]:
    """Return the function that reads a finite number of at least `low`."""

    def read(text: str) -> Any:
        value = kind(text)
        if not (low <= value < math.inf):
            raise argparse.ArgumentTypeError(f"must be at least {low:g}; got {text}")
        return value

    read.__name__ = kind.__name__  # argparse names it where `text` is no number at all
    return read


def path(text: str) -> str:
    """Refuse the empty name, which would be the folder that the program runs in."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options; of DEFAULTS only those that were given."""
    about = (__doc__ or "").splitlines()[0]
    parser = OneLineParser("finetune", description=about, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add(
        "--data", type=path, metavar="FOLDER", help="one folder of images a class (default: digits)"
    )
    add(
        "--weights",
        type=path,
        metavar="FILE|DEFAULT",
        help="start from these instead of from scratch",
    )
    add("--unfreeze", metavar="LAYER", help="train this layer and all after it too, e.g. layer4")
    add("--epochs", type=number(int, 1), help=f"of each stage ({DEFAULTS['epochs']})")
    # Two, for batch normalisation needs more than one value a channel.
    add("--batch-size", type=number(int, 2), help=f"images a step ({DEFAULTS['batch_size']})")
    add("--lr", type=number(float, 1e-12), help=f"learning rate at the start ({DEFAULTS['lr']})")
    add("--image-size", type=number(int, 32), help=f"pixels (digits 32, --data {PHOTO_SIZE})")
    add("--seed", type=number(int, 0), help="of all that is random (0)")
    add("--device", default=None, help="cpu, cuda or cuda:<index> (cuda where it is usable)")
    out = "finetune-out"
    add("--out", type=path, metavar="FOLDER", default=out, help=f"where results go ({out})")
    add("--resume", action="store_true", default=False, help="go on with the run in --out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 for bad input, 130 after Ctrl-C."""
    given = parse(arguments)
    try:
        finetune(given)
    except KeyboardInterrupt:
        again = "nothing was saved yet"
        if (Path(given.out) / CHECKPOINT).exists():
            device = ["--device", given.device] if given.device else []
            again = f"go on with: {COMMAND} {shlex.join(['--resume', '--out', given.out, *device])}"
        print(f"finetune: interrupted; {again}", file=sys.stderr)
        return 130
    except MemoryError:
        print("finetune: out of memory; lower --batch-size or --image-size", file=sys.stderr)
        return 2
    except (BadInputError, data.DataError, OSError) as error:
        print(f"finetune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def blaming(option: str) -> Iterator[None]:
    """Turn what the library refuses inside the block into a line that names the option."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError) as error:
        raise BadInputError(f"{option}: {str(error)[:500]}") from error


# ---- the run -------------------------------------------------------------------------------------


def finetune(given: argparse.Namespace) -> None:
    """Do all that the command line asks for: check it, train both stages, write the results."""
    with blaming("--device"):
        ge.set_default_device(given.device or ge.default_device())
    run = Run(given)
    classes = run.dataset.classes
    some = max(2, len(classes) // 2)
    model = starting_model(run, some)
    run.open_folder()
    if run.options["weights"] is None:
        print(f"backbone: all layers, from scratch, on classes {', '.join(classes[:some])}")
        run.train(BACKBONE, model, of_first(some, run.train_set), of_first(some, run.held_out))
    replace_head(model, len(classes), run.options["unfreeze"])
    count = sum(parameter.numel() for parameter in model.trainable_parameters())
    print(f"head: {count:,} parameters to train, on all {len(classes)} classes")
    run.train(HEAD, model, run.train_set, run.held_out)
    run.write_results(model)


class Run:
    """The images and options of one run, what it has measured so far, and where it writes."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out = Path(given.out)
        self.saved = read_checkpoint(self.out) if given.resume else None
        if not given.resume:
            refuse_earlier_run(self.out)
        self.options = settle(given, self.saved)
        self.dataset = open_dataset(self.options)
        self.history: list[dict[str, Any]] = []
        if self.saved is not None:
            self.history = self.saved["history"]
            if self.saved["labels"] != self.dataset.labels.tolist():
                raise BadInputError("--resume: the images are not those that the run began with")
        seed = self.options["seed"]
        self.train_set, self.held_out = data.held_out_split(self.dataset, HELD_OUT, seed)
        ge.manual_seed(seed)

    def open_folder(self) -> None:
        """Make the folder for results; remove what a killed run left there half written."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not os.access(self.out, os.W_OK):
            raise BadInputError(f"--out: this folder cannot be written to; got {self.out}")
        for name in RESULTS:
            for left_over in self.out.glob(f"{name}.*.partial"):
                left_over.unlink()

    def train(
        self, stage: str, model: ResNet, train_set: data.Subset, held_out: data.Subset
    ) -> None:
        """Train what is not frozen for all epochs of a stage that are not done yet."""
        lr, epochs = self.options["lr"], self.options["epochs"]
        optimizer = ge.optim.SGD(model.trainable_parameters(), lr=lr, momentum=MOMENTUM)
        done = self.restore(stage, model, optimizer)
        if done is None:  # a stage that has not begun: measure what it begins with
            self.note(stage, 0, accuracy(model, held_out))
            self.save(stage, model, optimizer)
            done = 0
        batch_size = min(self.options["batch_size"], len(train_set))
        batches = data.DataLoader(
            train_set, batch_size, shuffle=True, drop_last=True, seed=self.options["seed"]
        )
        for epoch in range(done + 1, epochs + 1):
            batches.epoch = epoch
            optimizer.param_groups[0]["lr"] = lr * (1 - (epoch - 1) / epochs)
            loss, rate = train_epoch(model, optimizer, batches, f"{stage} {epoch}/{epochs}")
            right = accuracy(model, held_out)
            self.note(stage, epoch, right, loss=loss, images_per_second=rate)
            self.save(stage, model, optimizer)
            print(
                f"{stage} epoch {epoch}/{epochs}: loss {loss:.4f}, {right:.4f} of "
                f"{len(held_out)} held-out images right, {rate:.0f} images/s",
                flush=True,
            )

    def note(self, stage: str, epoch: int, right: float, **more: float) -> None:
        self.history.append({"stage": stage, "epoch": epoch, "accuracy": right, **more})

    def save(self, stage: str, model: ResNet, optimizer: ge.optim.Optimizer) -> None:
        """Write the checkpoint, then the history; each replaces the old one only when complete."""
        checkpoint = {
            "options": self.options,
            "labels": self.dataset.labels.tolist(),
            "stage": stage,
            "history": self.history,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": ge.get_rng_state(),
        }
        ge.save(checkpoint, self.out / CHECKPOINT)
        with replacing(self.out / HISTORY) as partial:
            partial.write_text(json.dumps(self.history, indent=1) + "\n")

    def restore(self, stage: str, model: ResNet, optimizer: ge.optim.Optimizer) -> int | None:
        """Go back to the checkpoint; return its last epoch of this stage, None if it has none."""
        epochs = [entry["epoch"] for entry in self.history if entry["stage"] == stage]
        if not epochs:
            return None
        if self.saved is not None and self.saved["stage"] == stage:
            with blaming("--resume"):
                model.load_state_dict(self.saved["model"])
                optimizer.load_state_dict(self.saved["optimizer"])
                ge.set_rng_state(self.saved["random"])
        return epochs[-1]

    def write_results(self, model: ResNet) -> None:
        ge.save(model.state_dict(), self.out / MODEL)
        draw(self.history, self.out / CURVES)
        rights = [entry["accuracy"] for entry in self.history if entry["stage"] == HEAD]
        print(
            f"{rights[0]:.4f} of {len(self.held_out)} held-out images right before finetuning, "
            f"{rights[-1]:.4f} after; {MODEL} and {CURVES} are in {self.out}"
        )


def read_checkpoint(out: Path) -> dict[str, Any]:
    path = out / CHECKPOINT
    if not path.is_file():
        raise BadInputError(f"--resume: there is no run to go on with; no file {path}")
    with blaming("--resume"):
        saved: Any = ge.load(path)
    if not isinstance(saved, dict) or not {"options", "labels", "stage"} <= saved.keys():
        raise BadInputError(f"--resume: {path} was not written by this program")
    return saved


def refuse_earlier_run(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BadInputError(f"--out: this is not a folder; got {out}")
    if any((out / name).exists() for name in RESULTS):
        raise BadInputError(
            f"--out: {out} holds an earlier run; --resume it or choose another --out"
        )


def settle(given: argparse.Namespace, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Return the options that count: those of the run to resume, or what was given and defaults."""
    chosen = {name: value for name, value in vars(given).items() if name in DEFAULTS}
    for name in ("data", "weights"):  # the run may be resumed from another folder
        if name in chosen and chosen[name] not in ResNet18_Weights.__members__:
            chosen[name] = os.path.abspath(chosen[name])
    if saved is None:
        return DEFAULTS | ({"image_size": PHOTO_SIZE} if "data" in chosen else {}) | chosen
    for name, value in chosen.items():
        if value != saved["options"][name]:
            began = f"{name}={saved['options'][name]}"
            raise BadInputError(f"--resume: the run began with {began}; got {name}={value}")
    return saved["options"]


# ---- images --------------------------------------------------------------------------------------


def open_dataset(options: dict[str, Any]) -> data.LabelledDataset:
    needed = ["matplotlib", "PIL", "tqdm", *([] if options["data"] else ["sklearn"])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise BadInputError(f"{missing[0]} is missing: pip install 'gradengine[examples]'")
    size = options["image_size"]
    if options["data"] is None:
        return data.Digits(data.ImageClassification(size, size))
    # The middle is cut out, in the proportion that ImageNet's weights were trained with.
    dataset = data.ImageFolder(options["data"], data.ImageClassification(size, size * 256 // 224))
    if len(dataset.classes) < 2:
        raise BadInputError(f"--data: there must be two classes at least; got {dataset.classes}")
    return dataset


def of_first(count: int, images: data.Subset) -> data.Subset:
    """Return the images of the first `count` classes."""
    return data.Subset(images, (images.labels < count).nonzero()[0])


# ---- the model -----------------------------------------------------------------------------------


def starting_model(run: Run, num_classes: int) -> ResNet:
    """Return the network with the weights asked for, or with random ones for the first stage."""
    weights = run.options["weights"]
    if weights is None or run.saved is not None:  # a checkpoint will fill it
        model = resnet18(num_classes=num_classes)
    else:
        with blaming("--weights"):
            model = resnet18(weights)
    layers = layer_names(model)
    if run.options["unfreeze"] not in (None, *layers):
        raise BadInputError(
            f"--unfreeze: LAYER must be one of {', '.join(layers)}; got {run.options['unfreeze']}"
        )
    return model


def layer_names(model: ResNet) -> list[str]:
    """Return the names of all layers with parameters but the last, which always trains."""
    return [name for name, layer in model.named_children() if [*layer.parameters()]][:-1]


def replace_head(model: ResNet, num_classes: int, unfreeze: str | None) -> None:
    """Freeze all layers before `unfreeze` and put a new, random last layer at the end."""
    model.freeze()  # batch normalisation too: it normalises by the statistics that it has learnt
    layers = layer_names(model)
    for name in layers[layers.index(unfreeze) :] if unfreeze else []:
        model.get_submodule(name).unfreeze()
    model.fc = nn.Linear(model.fc.in_features, num_classes)


def train_epoch(
    model: ResNet, optimizer: ge.optim.Optimizer, batches: data.DataLoader, title: str
) -> tuple[float, float]:
    """Show the model each image once; return the mean loss and the images a second."""
    from tqdm import tqdm

    model.train()
    total, start = 0.0, time.perf_counter()
    count = len(batches) * batches.batch_size
    # Only a terminal gets the bar.
    with tqdm(total=count, desc=title, unit=" images", leave=False, disable=None) as bar:
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update(len(labels))
    return total / len(batches), count / (time.perf_counter() - start)


def accuracy(model: ResNet, dataset: data.Subset) -> float:
    """Return the share of images whose label gets the highest score."""
    model.eval()
    right = 0
    with ge.no_grad():
        for images, labels in data.DataLoader(dataset, DEFAULTS["batch_size"]):
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(dataset)


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and held-out accuracy over the epochs of both stages, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for stage in dict.fromkeys(entry["stage"] for entry in history):
            points = [e for e in history if e["stage"] == stage and name in e]
            axes.plot([e["epoch"] for e in points], [e[name] for e in points], "o-", label=stage)
        axes.set(xlabel="epoch", ylabel=name)
        axes.locator_params(axis="x", integer=True)
        axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


if __name__ == "__main__":
    sys.exit(main())
