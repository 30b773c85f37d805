"""What TensorRT's engine inspector says of a plan, and what that means for speed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_ATTENTION = re.compile(r"mha|flash.?att|fused.?att|iattention", re.IGNORECASE)
"""In the name, type or kernel of a layer that is fused attention: TensorRT names those after multi-head
attention, `_gemm_mha_v2` or `fmha`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """An inspector's report, read.

    Attributes:
        num_layers: of the engine.
        fused_attention: how many of them are fused attention; None where the report has names only, as it has
            when the engine was built without detail.
        softmaxes: layers that are a softmax alone, as attention that was not fused leaves them.
    """

    num_layers: int
    fused_attention: int | None
    softmaxes: int


def read_plan_report(text: str) -> PlanReport:
    """Read what `EngineInspector.get_engine_information` gave as JSON.

    Raises:
        ValueError: it is not such a report.
    """
    try:
        report = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the engine inspector's report is not JSON ({error})") from None
    layers = report.get("Layers") if isinstance(report, dict) else None
    if not isinstance(layers, list):
        raise ValueError("the engine inspector's report has no Layers")  # noqa: TRY004  (bad input, no bug)
    detailed = [layer for layer in layers if isinstance(layer, dict)]
    fused = [layer for layer in detailed if _ATTENTION.search(_identity(layer))]
    softmaxes = [layer for layer in detailed if "softmax" in str(layer.get("LayerType", "")).lower()]
    return PlanReport(
        num_layers=len(layers),
        fused_attention=len(fused) if len(detailed) == len(layers) else None,
        softmaxes=len(softmaxes),
    )


def _identity(layer: dict[str, Any]) -> str:
    return " ".join(str(layer.get(field, "")) for field in ("Name", "LayerType", "TacticName"))
