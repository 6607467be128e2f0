"""Compiled kernels on disk: used where they fit, harmless where they do not."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradengine.kernels.cpu import code_identity

ROOT = Path(__file__).parents[2]
NOTICE = "gradengine: compiling CPU kernels"

TEAM = "team."  # what runs the workers of all kernels: the first one waits for it

# Prints the erf of 0.5 and the names of the functions that were compiled for it.
RUN = """
import numpy, gradengine.kernels as kernels
from gradengine.kernels.cpu import code_cache
names = []
if {told}:
    code_cache.on_compiled = lambda name, seconds: names.append(name)
print(kernels.erf(numpy.full(3, 0.5))[0].round(4), *names)
"""


@pytest.fixture
def copy(tmp_path):
    """Give a copy of the kernels whose sources a test may change."""
    package = tmp_path / "copy" / "gradengine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=lambda *_: ["__pycache__"])
    return package


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "gradengine"


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled") / "gradengine"
    run(folder)
    return folder


@pytest.fixture
def filled(cache, filled_once):
    """Give a cache that holds the erf already."""
    return shutil.copytree(filled_once, cache)


def start(cache, root=ROOT, *, told=True, first="", extra=None):
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(cache.parent), **(extra or {})}
    settings["PYTHONDONTWRITEBYTECODE"] = "1"  # a changed source may have the same size and time
    command = [sys.executable, "-W", "error", "-c", first + RUN.format(told=told)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=settings, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out.split(), errors


def run(cache, root=ROOT, **environment):
    """Take an erf in a process of its own; give the result, then the kernels it compiled."""
    out, errors = finish(start(cache, root, extra=environment))
    assert errors == ""
    return without_team(out)


def without_team(words):
    return [word for word in words if not word.startswith(TEAM)]


def entries(cache):
    """Return the files of kernels, the team's aside."""
    files = (path for path in cache.iterdir() if path.suffix == ".kernel")
    return sorted(path for path in files if not path.name.startswith(TEAM))


def test_a_second_process_compiles_nothing(cache):
    assert run(cache) == ["0.5205", "special._erf"]
    assert run(cache) == ["0.5205"]
    assert len(entries(cache)) == 1
    assert len(list(cache.parent.iterdir())) == 1  # nothing in Numba's own way
    assert cache.stat().st_mode & 0o777 == 0o700


def test_no_two_processes_name_functions_alike(tmp_path):
    """Else the linker, to whom a third gives code of both, would take one's function for the other's."""
    names = []
    for folder in (tmp_path / "one" / "gradengine", tmp_path / "other" / "gradengine"):
        run(folder)
        (entry,) = entries(folder)
        names.append(set(re.findall(rb"_ZN10gradengine\w+_erf\w+", entry.read_bytes())))
    assert names[0]
    assert names[0].isdisjoint(names[1])


def test_the_first_compilation_is_announced_in_one_line(cache):
    _, errors = finish(start(cache, told=False))
    assert errors.startswith(NOTICE)
    assert "python -m gradengine compile" in errors
    assert errors.count("\n") == 1
    assert finish(start(cache, told=False)) == (["0.5205"], "")


def test_a_changed_source_is_compiled_again(cache, copy):
    assert run(cache, copy.parent) == ["0.5205", "special._erf"]
    source = copy / "kernels" / "cpu" / "special.py"
    source.write_text(source.read_text().replace("math.erf(x[i])", "math.sin(x[i])"))
    assert run(cache, copy.parent) == ["0.4794", "special._erf"]
    assert run(cache) == ["0.5205"]  # both are kept


def test_a_change_in_an_imported_module_is_seen(cache, copy):
    folder = copy / "kernels" / "cpu"
    part = folder / "part.py"
    part.write_text(
        "from gradengine.kernels.cpu.launch import kernel_part\n"
        "@kernel_part\ndef part(x):\n    return x + 1\n"
    )
    source = folder / "special.py"
    text = source.read_text().replace("math.erf(x[i])", "part(x[i])")
    source.write_text(
        text.replace("import math", "import math\nfrom gradengine.kernels.cpu.part import part")
    )
    assert run(cache, copy.parent) == ["1.5", "special._erf"]
    assert run(cache, copy.parent) == ["1.5"]
    part.write_text(part.read_text().replace("x + 1", "x + 2"))
    assert run(cache, copy.parent) == ["2.5", "special._erf"]


def imported(source):
    """Return what Python's own parser finds: modules, and names that may be modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: path.stem
)
def test_every_import_is_found_in_the_text(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(("gradengine", *(part for part in parts if part != "__init__")))
    found = {name for name in imported(path.read_text()) if code_identity._is_module(name)}
    assert found == set(code_identity._imports(module))


def test_a_constant_that_the_machine_gives_is_part_of_the_name(cache, copy):
    part = copy / "kernels" / "cpu" / "part.py"
    part.write_text(
        "import os\nfrom gradengine.kernels.cpu.launch import kernel_part\n"
        "FACTOR = int(os.environ['FACTOR'])\n"
        "def closed(added):\n"
        "    @kernel_part\n    def part(x):\n        return x * FACTOR + added\n    return part\n"
        "part = closed(int(os.environ['ADDED']))\n"
    )
    source = part.with_name("special.py")
    text = source.read_text().replace("math.erf(x[i])", "part(x[i])")
    source.write_text(
        text.replace("import math", "import math\nfrom gradengine.kernels.cpu.part import part")
    )
    assert run(cache, copy.parent, FACTOR="2", ADDED="0") == ["1.0", "special._erf"]
    assert run(cache, copy.parent, FACTOR="2", ADDED="0") == ["1.0"]
    assert run(cache, copy.parent, FACTOR="3", ADDED="0") == ["1.5", "special._erf"]
    assert run(cache, copy.parent, FACTOR="2", ADDED="1") == ["2.0", "special._erf"]


def test_another_processor_has_entries_of_its_own(cache):
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert run(cache) == ["0.5205", "special._erf"]
    assert run(cache, root=ROOT, **generic) == ["0.5205", "special._erf"]
    assert run(cache) == run(cache, root=ROOT, **generic) == ["0.5205"]


@pytest.mark.parametrize("damage", ["empty", "short", "changed", "foreign"])
def test_a_damaged_file_is_replaced(damage, filled):
    (path,) = entries(filled)
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "short": whole[: len(whole) // 2],
        "changed": whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:],
        "foreign": b"not compiled code " * 100,
    }[damage]
    path.write_bytes(content)
    assert run(filled) == ["0.5205", "special._erf"]
    assert run(filled) == ["0.5205"]


def test_two_processes_may_compile_at_once(cache):
    processes = [start(cache) for _ in range(2)]
    assert [finish(process)[0][0] for process in processes] == ["0.5205"] * 2
    assert run(cache) == ["0.5205"]
    assert len(entries(cache)) == 1
    assert all(path.suffix == ".kernel" for path in cache.iterdir())


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("a file", "File exists"),
        ("others", "can be written by other users"),
        ("home", "/dev/null"),
    ],
)
def test_kernels_run_where_none_can_be_kept(obstacle, reason, cache, monkeypatch):
    environment = {}
    cache.parent.mkdir()
    if obstacle == "a file":
        cache.write_text("in the way")
    elif obstacle == "others":
        cache.mkdir()
        cache.chmod(0o777)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        environment = {"NUMBA_CACHE_DIR": "", "HOME": "/dev/null"}
    for _ in range(2):
        out, errors = finish(start(cache, told=False, extra=environment))
        assert out == ["0.5205"]
        assert errors.startswith(NOTICE)
        assert errors.count("\n") == 1
        assert "at every start" in errors
        assert reason in errors


def test_a_full_disk_costs_no_more_than_a_compilation(cache):
    pytest.importorskip("resource")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    process = start(cache, first=limit)  # no file of more than 1000 bytes: like the space left
    out, errors = finish(process)
    assert (without_team(out), errors) == (["0.5205", "special._erf"], "")
    assert list(cache.iterdir()) == []


def test_old_entries_go_when_new_ones_are_written(filled):
    (path,) = entries(filled)
    function = path.name.rpartition("-")[0]
    now = path.stat().st_mtime
    days = {f"{function}-{age}.kernel": age for age in range(1, 9)}
    days |= {"gone.kernel-0-0.kernel": 100, "kept.kernel-0-0.kernel": 80}
    days |= {"old.partial": 1, "new.partial": 0, "another file": 1000}
    for name, age in days.items():
        (filled / name).touch()
        os.utime(filled / name, (now - age * 86400,) * 2)
    path.unlink()
    run(filled)
    assert {path.name for path in filled.iterdir() if not path.name.startswith(TEAM)} == {
        path.name,
        *(f"{function}-{age}.kernel" for age in (1, 2, 3)),
        "kept.kernel-0-0.kernel",
        "new.partial",
        "another file",
    }


def test_the_command_compiles_what_a_training_step_needs():
    command = [sys.executable, "-W", "error", "-m", "gradengine", "compile"]
    last = []
    for _ in range(2):  # the first may find all in the user's cache, or nothing
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        *functions, line = result.stdout.splitlines()
        assert line.startswith(f"{len(functions)} functions compiled, ")
        last.append(functions)
    assert last[1] == []
    step = (
        "import gradengine as ge; ge.set_default_device('cpu'); net = ge.models.resnet18()\n"
        "net(ge.ones(3, 3, 96, 96)).sum().backward()"
    )
    result = subprocess.run(
        [sys.executable, "-c", step], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


PART = """
import numpy
from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel

@kernel_part
def inner(x):
    if x < 0:
        raise ValueError("negative")
    return x ** 0.5

@kernel_part
def outer(x, i):
    return inner(x[i]) + 1 // numpy.int64(x[i] + 1)

@parallel_kernel
def kernel(worker, workers, x, out):
    for i in own_range(worker, workers, x.size):
        out[i] = outer(x, i)
"""


def test_parts_of_a_kernel_run_in_it_and_from_python(cache, copy):
    (copy / "kernels" / "cpu" / "made.py").write_text(PART)
    code = (
        "import numpy; from gradengine.kernels.cpu import made\n"
        "x, out = numpy.arange(9.0), numpy.empty(9)\n"
        "made.kernel(2, x, out)\n"
        "print([made.outer(x, i) for i in range(9)] == out.tolist())\n"
        "x[8] = -1\n"  # the last worker's
        "try:\n    made.kernel(2, x, out)\nexcept RuntimeError as error:\n    print(error)\n"
    )
    expected = ["True", *["kernel:", "a", "worker", "raised", "an", "exception"]]
    out, errors = finish(start(cache, copy.parent, first=code))
    assert out[: len(expected)] == expected
    assert errors.startswith(NOTICE)
    again = finish(start(cache, copy.parent, first=code))
    assert again == ([*expected, "0.5205"], "")


LINKED = """
import numpy
from numba import types
from gradengine.kernels.cpu.launch import kernel_part, parallel_kernel
from gradengine.kernels.cpu.linked import linked
from gradengine.kernels.cpu.simd import pointer

@linked([(types.CPointer(kind), types.intp) for kind in (types.float32, types.float64)])
def fill(place, count):
    for i in range(count):
        place[i] = i + 1

@parallel_kernel
def one(worker, workers, out):
    fill(pointer(out, 0), numpy.int32(len(out)))

@parallel_kernel
def two(worker, workers, out):
    fill(pointer(out, 1), len(out) - 1)
"""


def test_linked_functions_are_compiled_once_and_loaded_with_what_calls_them(cache, copy):
    source = copy / "kernels" / "cpu" / "made.py"
    source.write_text(LINKED)
    code = (
        "import numpy; from gradengine.kernels.cpu import made, code_cache\n"
        "code_cache.on_compiled = lambda name, seconds: print(name)\n"
        "for dtype in ('float32', 'float64'):\n"
        "    out = numpy.zeros((2, 3), dtype)\n"
        "    made.{}(1, out[0]), made.{}(1, out[1])\n"
        "    print(*out.ravel())\n"
    )
    numbers = ["1.0", "2.0", "3.0", "0.0", "1.0", "2.0"]

    def compiled(first, second):
        out, _ = finish(start(cache, copy.parent, first=code.format(first, second)))
        return without_team(out[:-1])

    fresh = ["made.fill", "made.one", "made.two", *numbers]
    assert compiled("one", "two")[: 2 * len(fresh)] == [*fresh, *fresh]
    assert compiled("one", "two")[: 2 * len(numbers)] == numbers * 2
    other = ["1.0", "2.0", "3.0", "1.0", "2.0", "3.0"]
    assert compiled("one", "one")[: 2 * len(other)] == other * 2
    source.write_text(LINKED.replace("i + 1", "i + 2"))
    assert compiled("one", "one")[:4] == ["made.fill", "made.one", "2.0", "3.0"]
