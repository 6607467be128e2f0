"""Rows for the shape operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cases import Case, normal

X = normal(2, 3, 4)
ROWS = normal(3, 4)
LINE = normal(5)

RESHAPING = [
    Case("reshape", lambda lib, x: lib.reshape(x, (4, 6)), (X,), lambda x: x.reshape(4, 6)),
    Case(
        "reshape",
        lambda lib, x: lib.reshape(lib.transpose(x, 0, 2), (-1, 2)),
        (X,),
        lambda x: x.transpose(2, 1, 0).reshape(-1, 2),
        note="copying",
    ),
    Case(
        "view",
        lambda lib, x: lib.view(x, (2, -1)),
        (X,),
        lambda x: x.reshape(2, 12),
        torch=lambda torch, x: x.view(2, -1),
    ),
    Case("ravel", lambda lib, x: lib.ravel(x), (X,), np.ravel),
    Case("flatten", lambda lib, x: lib.flatten(x), (X,), np.ravel),
    Case(
        "flatten",
        lambda lib, x: lib.flatten(x, start_dim=1, end_dim=-1),
        (X,),
        lambda x: x.reshape(2, 12),
        note="from 1",
    ),
    Case("flatten", lambda lib, x: lib.flatten(x), (normal(),), np.ravel, note="0-d"),
    Case(
        "unflatten",
        lambda lib, x: lib.unflatten(x, 2, (2, -1)),
        (X,),
        lambda x: x.reshape(2, 3, 2, 2),
    ),
    Case("unsqueeze", lambda lib, x: lib.unsqueeze(x, 1), (X,), lambda x: x[:, None]),
    Case("unsqueeze", lambda lib, x: lib.unsqueeze(x, -1), (X,), lambda x: x[..., None], note="-1"),
    Case("squeeze", lambda lib, x: lib.squeeze(x), (normal(1, 3, 1),), np.squeeze),
    Case(
        "squeeze",
        lambda lib, x: lib.squeeze(x, 0),
        (normal(1, 3, 1),),
        lambda x: x[0],
        note="one dim",
    ),
    Case("squeeze", lambda lib, x: lib.squeeze(x, 1), (X,), lambda x: x, note="size 3"),
    Case(
        "squeeze",
        lambda lib, x: lib.squeeze(x, (0, 1, -1)),
        (normal(1, 3, 1),),
        lambda x: x[0, :, 0],
        note="several",
    ),
]

ORDER = [
    Case(
        "permute",
        lambda lib, x: lib.permute(x, (2, 0, -2)),
        (X,),
        lambda x: x.transpose(2, 0, 1),
    ),
    Case("transpose", lambda lib, x: lib.transpose(x, 0, -1), (X,), lambda x: x.swapaxes(0, 2)),
    Case("swapaxes", lambda lib, x: lib.swapaxes(x, 1, 2), (X,), lambda x: x.swapaxes(1, 2)),
    Case("t", lambda lib, x: lib.t(x), (ROWS,), np.transpose),
    Case("t", lambda lib, x: lib.t(x), (LINE,), lambda x: x, note="1-D"),
    Case("movedim", lambda lib, x: lib.movedim(x, 0, -1), (X,), lambda x: np.moveaxis(x, 0, -1)),
    Case(
        "movedim",
        lambda lib, x: lib.movedim(x, (2, 0), (0, 1)),
        (X,),
        lambda x: np.moveaxis(x, (2, 0), (0, 1)),
        note="several",
    ),
    Case("flip", lambda lib, x: lib.flip(x, (0, -1)), (X,), lambda x: np.flip(x, (0, 2))),
    Case("roll", lambda lib, x: lib.roll(x, 5), (X,), lambda x: np.roll(x, 5)),
    Case(
        "roll",
        lambda lib, x: lib.roll(x, (1, -2), (0, 2)),
        (X,),
        lambda x: np.roll(x, (1, -2), (0, 2)),
        note="dims",
    ),
]

EXPANDING = [
    Case(
        "expand",
        lambda lib, x: lib.expand(x, (2, 3, -1)),
        (normal(1, 4),),
        lambda x: np.broadcast_to(x, (2, 3, 4)),
        torch=lambda torch, x: x.expand(2, 3, -1),
    ),
    Case(
        "broadcast_to",
        lambda lib, x: lib.broadcast_to(x, (2, 5)),
        (LINE,),
        lambda x: np.broadcast_to(x, (2, 5)),
    ),
    Case(
        "broadcast_tensors",
        lambda lib, x, y: lib.mul(*lib.broadcast_tensors(x, y)),
        (normal(3, 1), normal(1, 4)),
        np.multiply,
    ),
    Case(
        "meshgrid",
        lambda lib, x, y, z: lib.stack(lib.meshgrid(x, y, z, indexing="ij")),
        (normal(2), normal(3), normal(4)),
        lambda x, y, z: np.stack(np.meshgrid(x, y, z, indexing="ij")),
    ),
    Case(
        "meshgrid",
        lambda lib, x, y, z: lib.stack(lib.meshgrid(x, y, z, indexing="xy")),
        (normal(2), normal(3), normal(4)),
        lambda x, y, z: np.stack(np.meshgrid(x, y, z, indexing="xy")),
        note="xy",
    ),
    Case(
        "repeat",
        lambda lib, x: lib.repeat(x, (2, 1, 3)),
        (ROWS,),
        lambda x: np.tile(x, (2, 1, 3)),
        torch=lambda torch, x: x.repeat(2, 1, 3),
    ),
    Case("tile", lambda lib, x: lib.tile(x, (2,)), (ROWS,), lambda x: np.tile(x, 2)),
]

SPLITTING = [
    Case(
        "narrow",
        lambda lib, x: lib.narrow(x, 1, 1, 2),
        (X,),
        lambda x: x[:, 1:3],
        note="from front",
    ),
    Case(
        "narrow",
        lambda lib, x: lib.narrow(x, 2, -3, 2),
        (X,),
        lambda x: x[..., 1:3],
        note="from end",
    ),
    Case(
        "split",
        lambda lib, x: lib.cat(lib.split(x, 2)[::-1]),
        (LINE,),
        lambda x: x[[4, 2, 3, 0, 1]],
    ),
    Case(
        "split",
        lambda lib, x: lib.mul(*lib.split(x, [1, 1, 2], dim=-1)[:2]),
        (X,),
        lambda x: x[..., :1] * x[..., 1:2],
        note="sizes, one unused",
    ),
    Case(
        "split",
        lambda lib, x: lib.mul(*lib.split(x, [2, 0, 2], dim=-1)[::2]),
        (X,),
        lambda x: x[..., :2] * x[..., 2:],
        note="sizes, one empty",
    ),
    Case(
        "chunk",
        lambda lib, x: lib.cat(lib.chunk(x, 4)[::-1]),
        (LINE,),
        lambda x: x[[4, 2, 3, 0, 1]],
    ),
    Case(
        "unbind",
        lambda lib, x: lib.mul(*lib.unbind(x)),
        (X,),
        lambda x: x[0] * x[1],
    ),
    Case(
        "unbind",
        lambda lib, x: lib.unbind(x, dim=1)[2],
        (X,),
        lambda x: x[:, 2],
        note="one piece",
    ),
]

JOINING = [
    Case(
        "cat",
        lambda lib, x, y: lib.cat([x, y, x]),
        (normal(2, 3), normal(1, 3)),
        lambda x, y: np.concatenate([x, y, x]),
    ),
    Case(
        "concat",
        lambda lib, x, y: lib.concat((x, y), dim=-1),
        (normal(2, 3), normal(2, 4)),
        lambda x, y: np.concatenate([x, y], axis=1),
    ),
    Case(
        "stack",
        lambda lib, x, y: lib.stack([x, y], dim=-1),
        (normal(2, 3), normal(2, 3) + 1),
        lambda x, y: np.stack([x, y], axis=-1),
    ),
    Case(
        "hstack", lambda lib, x, y: lib.hstack([x, y]), (LINE, normal(2)), lambda *x: np.hstack(x)
    ),
    Case(
        "hstack",
        lambda lib, x, y: lib.hstack([x, y]),
        (ROWS, normal(3, 2)),
        lambda *x: np.hstack(x),
        note="matrices",
    ),
    Case(
        "vstack",
        lambda lib, x, y: lib.vstack([x, y]),
        (ROWS, normal(4)),
        lambda *x: np.vstack(x),
    ),
]

DIAGONALS = [
    Case("tril", lambda lib, x: lib.tril(x), (X,), np.tril),
    Case("tril", lambda lib, x: lib.tril(x, -1), (X,), lambda x: np.tril(x, -1), note="below"),
    Case("triu", lambda lib, x: lib.triu(x), (X,), np.triu),
    Case("triu", lambda lib, x: lib.triu(x, 1), (X,), lambda x: np.triu(x, 1), note="above"),
    Case("diagonal", lambda lib, x: lib.diagonal(x), (X,), np.diagonal),
    Case(
        "diagonal",
        lambda lib, x: lib.diagonal(x, -1, 2, 1),
        (X,),
        lambda x: np.diagonal(x, -1, 2, 1),
        note="of other dims",
    ),
    Case("diag", lambda lib, x: lib.diag(x), (ROWS,), np.diag),
    Case(
        "diag", lambda lib, x: lib.diag(x, -2), (LINE,), lambda x: np.diag(x, -2), note="of a line"
    ),
]


def _padded(note: str, widths: tuple[int, ...], mode: str, numpy_mode: Any) -> Case:
    pairs = list(zip(widths[::2], widths[1::2], strict=True))[::-1]
    return Case(
        "pad",
        lambda lib, x: lib.pad(x, widths, mode=mode),
        (X,),
        lambda x: np.pad(x, [(0, 0)] * (3 - len(pairs)) + pairs, numpy_mode),
        torch=lambda torch, x: torch.nn.functional.pad(x[None], (*widths, 0, 0)[:4], mode=mode)[0],
        in_torch=len(widths) <= 4,
        note=note,
    )


PADDING = [
    Case(
        "pad",
        lambda lib, x: lib.pad(x, (1, 2, 0, 1), value=-1.5),
        (X,),
        lambda x: np.pad(x, ((0, 0), (0, 1), (1, 2)), constant_values=-1.5),
        torch=lambda torch, x: torch.nn.functional.pad(x, (1, 2, 0, 1), value=-1.5),
    ),
    Case(
        "pad",
        lambda lib, x: lib.pad(x, (-1, 2, 1, -2)),
        (X,),
        torch=lambda torch, x: torch.nn.functional.pad(x, (-1, 2, 1, -2)),
        note="cropping",
    ),
    _padded("reflect", (3, 2, 0, 1), "reflect", "reflect"),
    _padded("replicate", (5, 1), "replicate", "edge"),
    _padded("circular", (4, 1, 2, 0), "circular", "wrap"),
    _padded("reflect in 3 dims", (1, 0, 2, 2, 1, 1), "reflect", "reflect"),
]

COPIES = [
    Case("clone", lambda lib, x: lib.clone(x), (X,), np.copy),
    Case(
        "contiguous",
        lambda lib, x: x.transpose(0, 1).contiguous(),
        (X,),
        lambda x: x.swapaxes(0, 1),
    ),
]

CASES = [
    *RESHAPING,
    *ORDER,
    *EXPANDING,
    *SPLITTING,
    *JOINING,
    *DIAGONALS,
    *PADDING,
    *COPIES,
]
