"""The table of all metrics: `python -m server.metrics_table > deploy/metrics.md` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from prometheus_client import Histogram

from server.metrics import AVAILABILITY_TARGET, OBJECTIVES, Metrics

_INTRODUCTION = """# Metrics

Written by `python -m server.metrics_table > deploy/metrics.md`; a test says when it is stale. What a metric
means, and what its labels are, changes only with an entry in `CHANGELOG.md`. `class` is the model's name,
`kind` is `image` or `video`. Counters and histograms are there from the start, at 0, if their labels are
known: of a worker once it has loaded its bundle, of an api and a model once it has seen that. Beside these,
each process tells about itself in `process_*` and `python_*`.
"""

_SCALERS = """
## For autoscalers and schedulers

| they ask for | metric |
|---|---|
| queue depth | `sum by (class) (max by (class, priority) (tdm_queue_waiting))` |
| running | `max by (class) (tdm_queue_inflight)` |
| capacity, in samples | `max by (class) (tdm_queue_capacity)` |
| room, in waiting jobs | `max by (class) (tdm_queue_limit)` |
| backlog in seconds of work, by predicted cost | `max by (class) (tdm_queue_backlog_seconds)` |

The queue is one for all replicas, and each api process tells all of it: never add these up over api pods.

KEDA, trigger `prometheus`:

```yaml
query: max(tdm_queue_backlog_seconds{class="scenes"})
threshold: "2"
```

llm-d's endpoint picker takes the names of the gauges that its queue scorers read, from the api pods that it
chooses between. They all tell of the one queue behind them, so it prefers none, which is right (not tried):

```sh
--total-queued-requests-metric=tdm_queue_waiting
--total-running-requests-metric=tdm_queue_inflight
```
"""


def _edges(metric: Histogram) -> str:
    """A histogram's edges but +Inf, as the client itself will tell them."""
    bounds: Iterable[float] = metric._upper_bounds
    return " ".join(f"{bound:g}" for bound in list(bounds)[:-1])


def table() -> str:
    """All metrics as Markdown, the text of `deploy/metrics.md`."""
    lines = [_INTRODUCTION, "## Objectives", ""]
    lines += [
        "| kind | accepted to finished | of which waiting | share of jobs, 30 days |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {one.e2e_s:g} s | {one.queue_s:g} s | {one.target:.3g} |"
        for kind, one in OBJECTIVES.items()
    ]
    lines += [
        "",
        f"And {AVAILABILITY_TARGET} of all requests get no 5xx. Each time is an edge of the histograms.",
    ]
    section = ""
    for one in Metrics().definitions:
        if one.section != section:
            section = one.section
            lines += ["", f"## {section}", "", "| metric | type | labels | says |", "|---|---|---|---|"]
        family = next(iter(one.metric.describe()))
        name = family.name + ("_total" if family.type == "counter" else "")
        says = family.documentation
        if isinstance(one.metric, Histogram):
            says += f" Edges: {_edges(one.metric)}."
        lines.append(f"| `{name}` | {family.type} | {', '.join(one.labels) or '-'} | {says} |")
    return "\n".join(lines) + "\n" + _SCALERS


if __name__ == "__main__":
    sys.stdout.write(table())
