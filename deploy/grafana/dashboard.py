"""The Grafana dashboard as code: `python deploy/grafana/dashboard.py` writes `tdm.json` beside this file.

What it shows is in `panels.py`; here it is put into Grafana's form and onto its grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panels import ROWS, Panel

OUT = Path(__file__).with_name("tdm.json")
WIDTH = 24
"""Of Grafana's grid."""

TEMPLATING: dict[str, Any] = {
    "list": [
        {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "class",
            "type": "query",
            "label": "model",
            "datasource": {"type": "prometheus", "uid": "${source}"},
            "query": {"query": "label_values(tdm_workers_live, class)", "refId": "class"},
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]
}
"""Chosen at the top: where to ask, and the models that the panels tell of."""
WORKERS = 'tdm_engine_info{class=~"$class"}'
NEW_VERSIONS = f"count by (class, version) ({WORKERS}) unless count by (class, version) ({WORKERS} offset 1m)"
ANNOTATIONS: dict[str, Any] = {
    "list": [
        {
            "name": "Versions",
            "datasource": {"type": "prometheus", "uid": "${source}"},
            "enable": True,
            "iconColor": "blue",
            "expr": NEW_VERSIONS,
            "titleFormat": "{{class}} {{version}}",
        }
    ]
}
"""Lines across all panels: a version of a bundle that had no worker a minute ago has one."""


def panel_json(panel: Panel, number: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """One panel in Grafana's form."""
    custom = {
        "fillOpacity": 30 if panel.stacked else 8,
        "stacking": {"mode": "normal" if panel.stacked else "none"},
    }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom if panel.kind == "timeseries" else {}},
            "overrides": [],
        },
        "options": {"calculate": False} if panel.kind == "heatmap" else {},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "expr": query,
                "legendFormat": legend or "__auto",
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
            }
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def laid_out(rows: Mapping[str, Sequence[Panel]]) -> list[dict[str, Any]]:
    """A line for each title, and three or four panels to a line below it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in rows.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            }
        )
        y += 1
        per_line = 3 if len(row) % 3 == 0 else 4
        for start in range(0, len(row), per_line):
            line = row[start : start + per_line]
            width = WIDTH // len(line)
            for place, panel in enumerate(line):
                panels.append(panel_json(panel, len(panels) + 1, place * width, y, width, 8))
            y += 8
    return panels


def dashboard() -> dict[str, Any]:
    """The whole dashboard, as Grafana reads it."""
    return {
        "uid": "tdm",
        "title": "tdm-server",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "tags": ["tdm"],
        "templating": TEMPLATING,
        "annotations": ANNOTATIONS,
        "panels": laid_out(ROWS),
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
