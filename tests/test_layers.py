"""The layers of the house, read from the source: who may import whom, and how long code may be."""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module belongs to the longest name here that it is or lies under, and imports its own layer or
# lower ones. What stands under no name (gradengine itself, the command line) is above all.
LAYERS = {
    "gradengine.backends": 0,
    "gradengine.devices": 0,
    "gradengine.kernels": 0,
    "gradengine.autocast_mode": 1,
    "gradengine.backward_walk": 1,
    "gradengine.dtypes": 1,
    "gradengine.elementwise": 1,
    "gradengine.grad_mode": 1,
    "gradengine.in_place": 1,
    "gradengine.operation": 1,
    "gradengine.ops": 1,
    "gradengine.precision": 1,
    "gradengine.source_lines": 1,
    "gradengine.tape": 1,
    "gradengine.views": 1,
    "gradengine.factories": 2,
    "gradengine.functional": 2,
    "gradengine.printing": 2,
    "gradengine.random": 2,
    "gradengine.tensor": 2,
    "gradengine.autograd": 3,
    "gradengine.cuda": 3,
    "gradengine.func": 4,
    "gradengine.amp": 4,
    "gradengine.nn": 4,
    "gradengine.optim": 4,
    "gradengine.data": 5,
    "gradengine.models": 5,
    "gradengine.weights": 5,
    "gradengine": 6,
    "gradengine.examples": 7,
    "gradengine.__main__": 7,
    "gradengine.doctor": 7,
    "gradengine.precompile": 7,
}

# Who alone may import a package, as module names; nobody may import PyTorch.
IMPORTERS = {
    "cupy": ("gradengine.devices", "gradengine.kernels.cuda"),
    "cupyx": ("gradengine.kernels.cuda",),
    "numba": ("gradengine.kernels.cpu", "gradengine.doctor"),
    "torch": (),
}

LONGEST_FUNCTION = 40  # lines of code
NAMELESS = {"common", "helper", "helpers", "misc", "util", "utils"}
TOP_LEVEL = {
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "benchmarks",
    "gradengine",
    "kernels",
    "pyproject.toml",
    "tests",
}


def source_files() -> dict[str, Path]:
    """Give the file of every module, by name; kernels/ is gradengine.kernels."""
    files = {}
    for folder in ("gradengine", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] == ("gradengine", "kernels"):  # the link
                continue
            if folder == "kernels":
                parts = ("gradengine", *parts)
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


FILES = source_files()
MODULES = pytest.mark.parametrize("module", FILES)


def is_under(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def layer(module: str) -> int:
    names = [name for name in LAYERS if name != "gradengine" and is_under(module, name)]
    if module != "gradengine" and not names:
        raise AssertionError(f"{module} has no layer: give it one in LAYERS")
    return LAYERS[max(names, key=len)] if names else LAYERS["gradengine"]


def is_import_function(function: ast.expr) -> bool:
    return ast.unparse(function).endswith(("import_module", "__import__"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of all that is imported anywhere in a module, as the code spells it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            match node.args:
                case [ast.Constant(str(name)), *_] if is_import_function(node.func):
                    yield name


def module_of(name: str) -> str:
    """Give the module of gradengine that an imported name is or lies in."""
    while name not in FILES and name not in LAYERS and "." in name:
        name = name.rpartition(".")[0]
    return name


def import_faults(module: str, source: str) -> list[str]:
    faults = []
    for name in imports(ast.parse(source)):
        package = name.partition(".")[0]
        if package == "":
            faults.append(f"{module} imports {name}: relative")
        elif package == "kernels":
            faults.append(f"{module} imports {name}: its name is gradengine.kernels")
        elif package == "gradengine":
            faults += [f"{module} imports {name}: {fault}" for fault in upward(module, name)]
        elif not any(is_under(module, user) for user in IMPORTERS.get(package, ("gradengine",))):
            faults.append(f"{module} imports {name}: only {IMPORTERS[package]} may")
    return faults


def upward(module: str, name: str) -> Iterator[str]:
    """Yield what is wrong with `module` importing `name` of gradengine."""
    target = module_of(name)
    if module == "gradengine.devices":
        yield "device knows nothing of gradengine"
    elif layer(target) > layer(module):
        yield f"layer {layer(module)} imports layer {layer(target)}"


@cache
def lines_without_comments(source: str) -> frozenset[int]:
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    return frozenset(lines)


def code_lines(source: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function that hold code: no docstring, comments or empty lines."""
    lines = set(range(function.lineno, (function.end_lineno or 0) + 1))
    lines &= lines_without_comments(source)
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        lines.difference_update(range(text.lineno, (text.end_lineno or 0) + 1))
    return len(lines)


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name} has {code_lines(source, node)} lines of code"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and code_lines(source, node) > LONGEST_FUNCTION
    ]


def nameless(module: str) -> set[str]:
    return NAMELESS.intersection(module.split("."))


def foreign_entries(paths: list[str]) -> set[str]:
    entries = {path.partition("/")[0] for path in paths}
    return {entry for entry in entries - TOP_LEVEL if not entry.startswith(".")}


@MODULES
def test_imports_point_downwards(module: str) -> None:
    assert import_faults(module, FILES[module].read_text()) == []


@MODULES
def test_functions_are_short(module: str) -> None:
    assert long_functions(FILES[module].read_text()) == []


@MODULES
def test_modules_are_named_after_something(module: str) -> None:
    assert nameless(module) == set()


def test_top_level_holds_the_agreed_entries_only() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert foreign_entries(listing.stdout.splitlines()) == set()


def test_both_folders_are_read() -> None:
    assert {"gradengine.devices", "gradengine.kernels"} <= FILES.keys()
    assert (ROOT / "gradengine" / "kernels").resolve() == ROOT / "kernels"


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("gradengine.ops.shape", "from gradengine import Tensor", "layer 1 imports layer 6"),
        ("gradengine.ops.shape", "import gradengine.nn.linear", "layer 1 imports layer 4"),
        ("gradengine.devices", "import gradengine.kernels", "device knows nothing"),
        ("gradengine.kernels.cpu.conv2d", "import gradengine.tape", "layer 0 imports layer 1"),
        ("gradengine.tape", "def f():\n    import gradengine.doctor", "layer 1 imports layer 7"),
        ("gradengine.nn.linear", "from . import module", "relative"),
        ("gradengine.nn.linear", "from ..tensor import Tensor", "relative"),
        ("gradengine.nn.linear", "import kernels.cpu", "its name is gradengine.kernels"),
        ("gradengine.nn.linear", "import cupy.cuda", "only ("),
        ("gradengine.kernels.cpu.conv2d", "from cupyx.scipy import special", "only ("),
        ("gradengine.kernels.cuda.conv2d", "from numba import njit", "only ("),
        ("gradengine.weights.pth", "import torch", "only ("),
        ("gradengine.nn.linear", "importlib.import_module('cupy')", "only ("),
    ],
)
def test_a_bad_import_is_found(module: str, source: str, fault: str) -> None:
    (found,) = import_faults(module, source)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gradengine.doctor", "import numba"),
        ("gradengine.kernels.cpu.conv2d", "import numba.np\nfrom gradengine.devices import CPU"),
        ("gradengine.kernels.cuda.special", "from cupyx.scipy.special import erf"),
        ("gradengine.nn.linear", "from gradengine import devices\nimport numpy"),
        ("gradengine", "from gradengine.devices import device"),
    ],
)
def test_a_good_import_is_no_fault(module: str, source: str) -> None:
    assert import_faults(module, source) == []


def test_a_module_without_a_layer_is_found() -> None:
    with pytest.raises(AssertionError, match="has no layer"):
        layer("gradengine.attic")


def test_code_lines_are_counted_without_docstring_and_comments() -> None:
    source = '''
@decorator
def f(
    x,
):
    """Sentence.

    More.
    """
    # A comment.

    text = """two
    lines"""
    return text  # the sixth line of code
'''
    tree = ast.parse(source)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    assert code_lines(source, function) == 6
    body = "    x += 1\n" * 39
    assert long_functions(f"def f(x):\n{body}") == []
    assert long_functions(f"def f(x):\n{body}    x += 1\n") == ["f has 41 lines of code"]


def test_bad_names_and_foreign_entries_are_found() -> None:
    assert nameless("gradengine.nn.utils") == {"utils"}
    assert foreign_entries(["docs/index.md", "README.md", ".gitignore", "setup.py"]) == {
        "docs",
        "setup.py",
    }
