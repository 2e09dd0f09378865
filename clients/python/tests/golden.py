"""test/golden/apply.json: updates and the bits of the weights after them. The Node client's tests read it too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from muond.steps.parameter import Bound
from muond.steps.updates import Update

NUMPY = {"float64": "<f8", "float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}
SHAPE = (3, 6)


@dataclass(frozen=True)
class Golden:
    """Weights of ``dtype`` before and after ``update``, bfloat16 as its bits."""

    title: str
    dtype: str
    weights: npt.NDArray[Any]
    update: Update
    expected: npt.NDArray[Any]


def _array(text: str, form: str) -> npt.NDArray[Any]:
    return np.frombuffer(bytes.fromhex(text), form).copy()


def _golden(case: dict[str, Any]) -> Golden:
    form = NUMPY[case["weights_dtype"]]
    bound = Bound(0, "w", SHAPE, case["update_dtype"], case["update_dtype"])
    data = None if case["data"] is None else _array(case["data"], "u1")
    rows = None if case["row_scale"] is None else _array(case["row_scale"], "<f4")
    return Golden(
        case["title"],
        case["weights_dtype"],
        _array(case["weights"], form).reshape(SHAPE),
        Update(bound, case["scale"], case["decay"], data, rows),
        _array(case["expected"], form).reshape(SHAPE),
    )


GOLDEN = [
    _golden(case) for case in json.loads((Path(__file__).parents[3] / "test" / "golden" / "apply.json").read_text())
]
