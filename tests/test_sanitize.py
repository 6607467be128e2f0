"""The command that runs kernels under compute-sanitizer, with a stand-in for it and for the tests."""

import stat
import sys
from pathlib import Path

import pytest

from tests import sanitize

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACE = "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n"


@pytest.mark.parametrize(
    ("log", "errors"),
    [
        (CLEAN, 0),
        (RACE, 3),
        ("========= ERROR SUMMARY: 1 error\n" + CLEAN, 1),
        ("========= Error: process didn't terminate successfully\n", None),
        ("", None),
    ],
)
def test_errors_are_read_from_the_log(log, errors):
    assert sanitize.count_errors(log) == errors


def stand_in(tmp_path, monkeypatch, body):
    """Make a program that is found as compute-sanitizer; it gets $log and the tool's $name."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(
        f"#!{sys.executable}\nimport pathlib, sys, time\n"
        "log = pathlib.Path(sys.argv[sys.argv.index('--log-file') + 1])\n"
        "name = sys.argv[sys.argv.index('--tool') + 1]\n" + body
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(path))
    monkeypatch.setattr(sanitize, "GRACE", 1)


def test_clean_tools(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, f"log.write_text({CLEAN!r})\nprint('a PASSED\\nb PASSED')\n")
    assert sanitize.main(["--out", str(tmp_path / "out"), "--tools", "memcheck", "synccheck"]) == 0
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert [line.split()[:4] for line in summary.splitlines()[1:]] == [
        ["memcheck", "0", "2", "0"],
        ["synccheck", "0", "2", "0"],
    ]
    assert summary in capsys.readouterr().out


def test_a_tool_that_finds_something(tmp_path, monkeypatch):
    body = f"log.write_text({RACE!r} if name == 'racecheck' else {CLEAN!r})\nprint('a PASSED')\n"
    stand_in(tmp_path, monkeypatch, body)
    assert sanitize.main(["--out", str(tmp_path / "out")]) == 1
    assert (tmp_path / "out" / "racecheck.log").read_text() == RACE


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("print('a PASSED')\n", "no summary"),
        ("sys.exit(77)\n", "exit status 77"),
        ("time.sleep(60)\n", "killed after 1 s"),
    ],
)
def test_a_tool_that_does_not_come_to_its_end(body, note, tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, body)
    arguments = ["--out", str(tmp_path / "out"), "--tools", "initcheck", "--seconds", "0"]
    assert sanitize.main(arguments) == 2
    assert note in capsys.readouterr().out


def test_a_machine_without_the_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main(["--out", str(tmp_path)]) == 2
    assert "compute-sanitizer: not in PATH" in capsys.readouterr().out


def test_tests_come_from_all_files_in_turn():
    order = sanitize.in_turn([Path("a")] * 9 + [Path("b")] * 2)
    assert order[:4] == [0, 9, 8, 3]
    assert sorted(order) == list(range(11))


def test_no_test_begins_after_the_time_is_over():
    sanitize.Turns(60).pytest_runtest_setup()
    with pytest.raises(pytest.exit.Exception, match="time is over"):
        sanitize.Turns(-1).pytest_runtest_setup()
