"""From the files of `benchmarks/gpu.py` to tables, and to the table in README.md.

    python -m benchmarks.gpu_report                    # of the newest run
    python -m benchmarks.gpu_report FILE.json FILE.json  # later files' rows replace earlier ones'

Contestants whose names say a precision are compared with those of the same one. A ratio is the best
peer's median over the best of ours, so above 1 gradengine is the faster.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import FOLDER, README, quantity

MARKS = (
    "<!-- GPU benchmarks: made by python -m benchmarks.gpu_report -->",
    "<!-- end of GPU benchmarks -->",
)
OURS = "gradengine"
PRECISIONS = ("tf32", "bf16")
STEPS = {
    "training": "ResNet-18 training step, 224 px",
    "frozen": "ResNet-18, new head on a frozen backbone, 224 px",
    "forward": "ResNet-18 forward, 224 px",
}
VERSIONS = ("cupy", "nvrtc", "torch", "cudnn", "numpy", "python")
JsonRow = dict[str, Any]


# ---- arithmetic ----------------------------------------------------------------------------------


def medians(
    row: JsonRow, ours: bool | None = None, precision: str | None = None
) -> dict[str, float]:
    """Return the medians by contestant: only ours or only the peers', of one precision or of any."""
    return {
        name: found["median"]
        for name, found in row["contestants"].items()
        if "median" in found
        and ours in (None, name.startswith(OURS))
        and precision in (None, *name.split())
    }


def ratio(row: JsonRow, precision: str | None = None) -> float | None:
    """Return how many times as long as the best of ours the best peer takes."""
    ours, theirs = (medians(row, which, precision).values() for which in (True, False))
    return min(theirs) / min(ours) if ours and theirs else None


def ratios(row: JsonRow) -> dict[str, float]:
    """Return the ratio of each precision that the contestants' names tell apart, or of "" alone."""
    split = [p for p in PRECISIONS if medians(row, None, p)]
    found = {p: ratio(row, p) for p in split or [""]} if split else {"": ratio(row)}
    return {name: value for name, value in found.items() if value is not None}


def limits(rows: Iterable[JsonRow]) -> dict[str, float]:
    """Return the copy bandwidth in bytes a second, and the best rate of each precision in FLOP/s."""
    found: dict[str, float] = {}
    for row in rows:
        name = row["labels"].get("limit")
        if name is not None and medians(row):
            rate = (row["flop"] or row["moved"]) / min(medians(row).values())
            found[name] = max(rate, found.get(name, 0.0))
    return found


def rate(row: JsonRow, seconds: float, known: dict[str, float]) -> str:
    """Return TFLOP/s or GB/s, and which share of the device's limit that is, if it was measured."""
    amount = row["flop"] or row["moved"]
    if not amount:
        return ""
    limit = known.get(row["labels"].get("precision", "") if row["flop"] else "copy")
    share = f" ({amount / seconds / limit:.0%})" if limit and row["group"] != "limits" else ""
    if row["flop"]:
        return f"{amount / seconds / 1e12:.0f} TFLOP/s{share}"
    return f"{amount / seconds / 1e9:.0f} GB/s{share}"


def merged(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of several runs: a later one's replace those of the same name.

    Raises ValueError unless all are of one device: their rows would not compare.
    """
    devices = {content["about"].get("device") for content in contents}
    if len(devices) != 1:
        raise ValueError(f"gpu_report: all files must be of one device; got {sorted(devices)}")
    rows = {(row["group"], row["name"]): row for content in contents for row in content["rows"]}
    measured = {f"{group}, {name}" for group, name in rows}
    missing = [name for content in contents for name in content.get("not_measured", [])]
    left = [name for name in dict.fromkeys(missing) if name not in measured]
    return {"about": contents[-1]["about"], "rows": list(rows.values()), "not_measured": left}


# ---- for a terminal ------------------------------------------------------------------------------


def headline(about: dict[str, Any], known: dict[str, float] | None = None) -> str:
    """Return one sentence on what was measured, with what, and what the device can do at most."""
    versions = [f"{name} {about[name]}" for name in VERSIONS if about.get(name)]
    text = f"{about.get('date')}, {about.get('device')}"
    if about.get("driver"):
        text += f", driver {about['driver']}, CUDA {about.get('cuda')}"
    for name, value in (known or {}).items():
        spelled = f"{value / 1e9:.0f} GB/s copied" if name == "copy" else f"{value / 1e12:.0f}"
        text += f", {spelled}" if name == "copy" else f", cuBLAS {name} {spelled} TFLOP/s"
    return f"{text}; {', '.join(versions)}; commit {about.get('commit')}."


def line(row: JsonRow, known: dict[str, float] | None = None) -> str:
    """Return a row as one line: every contestant's time, the rate of ours, and the ratios."""
    parts = []
    for name, found in row["contestants"].items():
        if "error" in found:
            parts.append(f"{name} FAILED ({found['error'][:60]})")
        elif "median" in found:
            parts.append(f"{name} {quantity(found['median'], 's')}")
        elif "launches" in found:
            parts.append(f"{name} {found['launches']} in {quantity(found['busy'], 's')}")
    best = medians(row, True) or medians(row)
    if best and row["kind"] == "kernel":
        parts.append(rate(row, min(best.values()), known or {}))
    parts += [f"{name} x{value:.2f}".strip() for name, value in ratios(row).items()]
    distance = row["contestants"].get(OURS, {}).get("distance")
    if distance is not None:
        parts.append(f"distance {distance:.1e}")
    cut = " (cut short)" if row.get("cut") else ""
    return f"{row['group']}, {row['name']}{cut}: {', '.join(part for part in parts if part)}"


def step_lines(row: JsonRow) -> Iterable[str]:
    """Yield a step's contestants, one a line: median, images a second, first run, peak memory."""
    yield f"{STEPS[row['group']]}, {row['name']}:  " + ", ".join(
        f"{name} x{value:.2f}" for name, value in ratios(row).items()
    )
    batch = row["labels"]["batch"]
    for name, found in row["contestants"].items():
        if "median" not in found:
            yield f"  {name:<36} {found.get('error', 'not measured')[:80]}"
            continue
        cells = [
            quantity(found["median"], "s"),
            f"{batch / found['median']:.0f}/s",
            f"first {quantity(found.get('first', 0.0), 's')}",
        ]
        if found.get("arrays_bytes"):
            cells.append(f"{found['arrays_bytes'] / 1e9:.2f} GB")
        if "result" in found:
            cells.append(f"mean {found['result']:.3f}")
        yield f"  {name:<36}" + "".join(f" {cell:>14}" for cell in cells)


def text_tables(content: dict[str, Any]) -> str:
    """Return everything for a terminal, as short as it can be: the end of the output is what is read."""
    rows, known = content["rows"], limits(content["rows"])
    parts = [headline(content["about"], known)]
    for row in rows:
        if row["group"] in STEPS:
            parts += step_lines(row)
        elif row["group"] != "convolutions":
            parts.append(line(row, known))
    parts.append(convolution_table(rows).rstrip())
    for name, geometric in summaries(rows).items():
        parts.append(f"{name}: x{geometric:.2f} in the geometric mean")
    for error, count in Counter(errors(rows).values()).items():
        parts.append(f"failed {count} times: {error[:150]}")
    if content["not_measured"]:
        some = "; ".join(content["not_measured"][:10])
        parts.append(f"not measured ({len(content['not_measured'])} rows): {some}")
    return "\n".join(part for part in parts if part)


def errors(rows: Iterable[JsonRow]) -> dict[str, str]:
    """Return the first line of what went wrong, by row and contestant."""
    return {
        f"{row['group']}, {row['name']}: {name}": found["error"]
        for row in rows
        for name, found in (*row["contestants"].items(), ("check", row))
        if "error" in found
    }


def summaries(rows: Iterable[JsonRow]) -> dict[str, float]:
    """Return the geometric mean of the ratios of kernels, by group, precision and pass."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = ratio(row)
        if row["kind"] == "kernel" and row["group"] != "limits" and value is not None:
            labels = row["labels"]
            key = (row["group"], labels.get("precision", ""), labels.get("pass", ""))
            found.setdefault(" ".join(filter(None, key)), []).append(value)
    return {name: statistics.geometric_mean(values) for name, values in found.items()}


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(cells: list[list[str]]) -> str:
    """Return a table, its heading first."""
    ruler = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], ruler, *cells[1:])) + "\n"


def step_table(rows: list[JsonRow], group: str) -> str:
    """Return one kind of step: contestants down, batch sizes across, then the ratios."""
    mine = [row for row in rows if row["group"] == group]
    if not mine:
        return ""
    batches = sorted({row["labels"]["batch"] for row in mine}, reverse=True)
    times: dict[str, dict[int, str]] = {}
    compared: dict[str, dict[int, str]] = {}
    for row in sorted(mine, key=lambda row: row["labels"]["peers"] != "eager"):
        batch, peers = row["labels"]["batch"], row["labels"]["peers"]
        for name, found in row["contestants"].items():
            cell = quantity(found["median"], "s") if "median" in found else "failed"
            times.setdefault(name, {}).setdefault(batch, cell)
        for precision, value in ratios(row).items():
            beside = "" if peers == "eager" else f", beside {peers}"
            title = f"ratio, {precision}{beside}"
            compared.setdefault(title, {})[batch] = f"**{value:.2f}**"
    cells = [[STEPS[group], *map(str, batches)]]
    for name, by_batch in (times | compared).items():
        cells.append([name, *(by_batch.get(batch, "") for batch in batches)])
    return markdown(cells)


def convolution_table(rows: list[JsonRow]) -> str:
    """Return TFLOP/s of each convolution in each pass and precision, and the ratio to cuDNN."""
    mine = [row for row in rows if row["group"] == "convolutions"]
    if not mine:
        return ""
    columns = list(dict.fromkeys((r["labels"]["precision"], r["labels"]["pass"]) for r in mine))
    columns.sort(key=lambda column: column[0])
    cells = [["TFLOP/s (ratio to cuDNN's best)", *(" ".join(column) for column in columns)]]
    for name in dict.fromkeys(row["labels"]["convolution"] for row in mine):
        found = {
            (row["labels"]["precision"], row["labels"]["pass"]): _rate_and_ratio(row)
            for row in mine
            if row["labels"]["convolution"] == name
        }
        cells.append([name, *(found.get(column, "") for column in columns)])
    return markdown(cells)


def _rate_and_ratio(row: JsonRow) -> str:
    if OURS in row["contestants"] and not medians(row, True):
        return "failed"
    ours, value = medians(row, True), ratio(row)
    text = f"{row['flop'] / min((ours or medians(row)).values()) / 1e12:.0f}"
    if not ours:
        return f"cuDNN {text}"
    return text if value is None else f"{text} ({value:.2f})"


def kernel_table(rows: list[JsonRow], group: str, known: dict[str, float]) -> str:
    """Return one line for each row of a group of kernels: ours, the peers, rate, ratio."""
    mine = [row for row in rows if row["group"] == group]
    if not mine:
        return ""
    names = list(dict.fromkeys(name for row in mine for name in row["contestants"]))
    cells = [[group, *names, "rate", "ratio"]]
    for row in mine:
        times, value = medians(row), ratio(row)
        best = medians(row, True) or times
        cells.append(
            [
                row["name"],
                *(quantity(times[name], "s") if name in times else "" for name in names),
                rate(row, min(best.values()), known) if best else "",
                "" if value is None else f"{value:.2f}",
            ]
        )
    return markdown(cells)


def document(content: dict[str, Any]) -> str:
    """Return all rows as Markdown."""
    rows, known = content["rows"], limits(content["rows"])
    parts = [headline(content["about"], known) + "\n"]
    parts += [step_table(rows, group) for group in STEPS]
    parts.append(convolution_table(rows))
    parts += [kernel_table(rows, group, known) for group in ("passes", "matmul", "limits")]
    others = [row for row in rows if row["kind"] == "count"]
    parts.append("".join(f"- {line(row)}\n" for row in others))
    failed = [f"- {place}: {error}\n" for place, error in errors(rows).items()]
    parts.append("Failed:\n\n" + "".join(failed) if failed else "")
    missing = content["not_measured"]
    parts.append("Not measured: " + "; ".join(missing) + ".\n" if missing else "")
    return "\n".join(part for part in parts if part)


def readme_section(content: dict[str, Any], place: str) -> str:
    """Return what README.md shows: the steps, the convolutions, and where all rows are."""
    rows, known = content["rows"], limits(content["rows"])
    parts = [headline(content["about"], known) + "\n"]
    parts += [step_table(rows, group) for group in STEPS]
    parts.append(convolution_table(rows))
    parts.append(f"[All rows]({place})")
    return "\n".join(part for part in parts if part)


def with_section(text: str, section: str) -> str:
    """Return README's text with what stands between the marks replaced."""
    start, end = MARKS
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(
            f"gpu_report: README.md must hold the marks once; expected {start} and {end}"
        )
    return pattern.sub(lambda _: f"{start}\n{section}\n{end}", text)


def publish(paths: list[Path]) -> Path:
    """Write the tables of these runs beside the last of them, and the short ones into README.md."""
    content = merged([json.loads(path.read_text()) for path in paths])
    target = paths[-1].with_suffix(".md")
    target.write_text(document(content))
    section = readme_section(content, f"benchmarks/results/{target.name}")
    README.write_text(with_section(README.read_text(), section))
    return target


if __name__ == "__main__":
    newest = max(FOLDER.glob("gpu-*.json"), key=lambda path: path.stat().st_mtime, default=None)
    chosen = [Path(name) for name in sys.argv[1:]] or ([newest] if newest else [])
    if not chosen:
        sys.exit(f"no results in {FOLDER}: run python benchmarks/gpu.py on a machine with a GPU")
    print(f"wrote {publish(chosen)} and the table in README.md")
