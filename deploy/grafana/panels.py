"""What the dashboard shows: a row of panels for each question an operator has, and the PromQL behind them.

`$class` is the models chosen at the top. Gauges that every api process reads from Redis are taken by their
maximum, never added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CLASS = 'class=~"$class"'
RATE = "[$__rate_interval]"
A_SCENARIO = '{scenario!=""}'
"""What k6 asks for before it begins has no scenario."""
NOT_A_PROBE = 'route!~"/healthz|/readyz"'


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        queries: legend -> PromQL.
        unit: Grafana's name of it.
        kind: timeseries, stat or heatmap.
    """

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    stacked: bool = False
    says: str = ""


def quantiles(
    name: str, by: str, labels: str = "", shares: Sequence[float] = (0.5, 0.95, 0.99)
) -> dict[str, str]:
    """Quantiles of a histogram as recent traffic had them, one line each; none where there was no traffic."""
    legend = f"{{{{{by}}}}} " if by else ""
    group = f"le, {by}" if by else "le"
    buckets = f"sum by ({group}) (rate({name}_bucket{{{labels}}}{RATE}))"
    return {f"{legend}p{share * 100:g}": f"histogram_quantile({share}, {buckets}) >= 0" for share in shares}


def within(kind: str, edge: str) -> str:
    """Share of the last hour's finished jobs that took no longer than an edge of the histogram."""
    done = f'{{kind="{kind}",outcome="done"'
    good = f'sum(rate(tdm_job_e2e_seconds_bucket{done},le="{edge}"}}[1h]))'
    return f"{good} / sum(rate(tdm_job_e2e_seconds_count{done}}}[1h]))"


def rate(name: str, by: str, labels: str = CLASS) -> str:
    """A counter's rate, added up over processes."""
    return f"sum by ({by}) (rate({name}{{{labels}}}{RATE}))"


def ratio(numerator: str, denominator: str, by: str = "class", labels: str = CLASS) -> str:
    """One counter's rate per another's."""
    return f"{rate(numerator, by, labels)} / {rate(denominator, by, labels)}"


def gauge(name: str, by: str = "class", labels: str = CLASS) -> str:
    """What every api process tells alike."""
    return f"max by ({by}) ({name}{{{labels}}})" if by else f"max({name})"


failed = f'sum(rate(tdm_http_requests_total{{{NOT_A_PROBE},code=~"5.."}}[1h]))'
all_requests = f"sum(rate(tdm_http_requests_total{{{NOT_A_PROBE}}}[1h]))"

ROWS: dict[str, list[Panel]] = {
    "Objectives": [
        Panel(
            title="Requests without 5xx",
            kind="stat",
            unit="percentunit",
            queries={"": f"1 - ({failed} or vector(0)) / {all_requests}"},
            says="Over an hour; promised: 99.9 %.",
        ),
        Panel(
            title="Images within 2 s",
            kind="stat",
            unit="percentunit",
            queries={"": within("image", "2.0")},
            says="Over an hour; promised: 99 %.",
        ),
        Panel(
            title="Videos within 5 min",
            kind="stat",
            unit="percentunit",
            queries={"": within("video", "300.0")},
            says="Over an hour; promised: 99 %.",
        ),
        Panel(
            title="Budget burnt, 1 h",
            queries={"{{slo}}": "tdm:slo_burn:rate1h"},
            says="1: the budget lasts exactly 30 days. Alerts: 14.4, 6, 1. From the recording rules.",
        ),
        Panel(
            title="Accepted to finished",
            unit="s",
            queries=quantiles("tdm_job_e2e_seconds", "kind", f'{CLASS},outcome="done"'),
        ),
    ],
    "Demand": [
        Panel(
            title="Requests",
            unit="reqps",
            queries={
                "{{route}} {{code}}": rate("tdm_http_requests_total", "route, code", NOT_A_PROBE) + " > 0"
            },
            stacked=True,
        ),
        Panel(
            title="Refused jobs",
            unit="reqps",
            queries={"{{class}} {{reason}}": rate("tdm_jobs_rejected_total", "class, reason")},
        ),
        Panel(
            title="Ended jobs",
            unit="reqps",
            queries={"{{class}} {{outcome}}": rate("tdm_jobs_total", "class, outcome")},
            stacked=True,
        ),
        Panel(
            title="Outputs",
            unit="reqps",
            queries={
                "{{class}} images": rate("tdm_images_total", "class"),
                "{{class}} video frames": rate("tdm_video_frames_total", "class"),
            },
        ),
    ],
    "Queue": [
        Panel(
            title="Waiting and running jobs",
            queries={
                "{{class}} {{priority}} waiting": gauge("tdm_queue_waiting", "class, priority"),
                "{{class}} running": gauge("tdm_queue_inflight"),
            },
        ),
        Panel(
            title="Oldest waiting job", unit="s", queries={"{{class}}": gauge("tdm_queue_oldest_age_seconds")}
        ),
        Panel(
            title="Time in the queue",
            unit="s",
            queries=quantiles("tdm_job_stage_seconds", "kind", f'{CLASS},stage="queue"'),
        ),
        Panel(
            title="Backlog by predicted cost",
            unit="s",
            queries={"{{class}}": gauge("tdm_queue_backlog_seconds")},
            says="Seconds of engine time that wait; what the autoscaler follows.",
        ),
        Panel(
            title="Took, of what was predicted",
            queries=quantiles("tdm_eta_ratio", "class", CLASS, (0.1, 0.5, 0.9))
            | {"{{class}} allowed for": gauge("tdm_wait_margin_ratio")},
            says="1 is exact. Admission allows for so much longer waits.",
        ),
        Panel(
            title="Live workers and their room",
            queries={
                "{{class}} workers": gauge("tdm_workers_live"),
                "{{class}} samples at once": gauge("tdm_queue_capacity"),
            },
        ),
    ],
    "Latency by stage": [
        Panel(
            title="Mean time of a job, stacked by stage",
            unit="s",
            stacked=True,
            queries={"{{stage}}": ratio("tdm_job_stage_seconds_sum", "tdm_job_stage_seconds_count", "stage")},
        ),
        Panel(
            title="p95 of each stage",
            unit="s",
            queries=quantiles("tdm_job_stage_seconds", "stage", CLASS, (0.95,)),
        ),
        Panel(
            title="HTTP, first byte in to last byte out",
            unit="s",
            queries=quantiles("tdm_http_request_duration_seconds", "route", NOT_A_PROBE, (0.95,)),
        ),
    ],
    "Batching": [
        Panel(title="Batch sizes", kind="heatmap", queries={"{{le}}": rate("tdm_batch_size_bucket", "le")}),
        Panel(
            title="Samples per batch, mean",
            queries={"{{class}}": ratio("tdm_batch_size_sum", "tdm_batch_size_count")},
        ),
        Panel(
            title="Engine time lost to padding",
            unit="percentunit",
            queries={"{{class}}": ratio("tdm_padding_seconds_total", "tdm_output_engine_seconds_sum")},
        ),
        Panel(
            title="Engine seconds per output",
            unit="s",
            queries={"{{class}}": ratio("tdm_output_engine_seconds_sum", "tdm_output_engine_seconds_count")},
        ),
        Panel(
            title="Batches, over the latency table",
            queries={"{{instance}} {{class}}": f"tdm_engine_pace_ratio{{{CLASS}}}"},
        ),
    ],
    "GPU": [
        Panel(
            title="Busy, per device",
            unit="percentunit",
            queries={"{{instance}} {{gpu}}": rate("tdm_gpu_busy_seconds_total", "instance, gpu", "")},
        ),
        Panel(
            title="Denoiser rows", unit="ops", queries={"{{class}}": rate("tdm_denoise_steps_total", "class")}
        ),
        Panel(
            title="Out of memory",
            unit="ops",
            queries={"{{instance}} {{gpu}}": rate("tdm_gpu_oom_total", "instance, gpu", "")},
        ),
        Panel(
            title="Loading and warming up",
            unit="s",
            queries={"{{instance}} {{class}}": f"tdm_model_load_seconds{{{CLASS}}}"},
        ),
    ],
    "Reliability": [
        Panel(
            title="Started again, by cause",
            unit="ops",
            queries={"{{class}} {{cause}}": rate("tdm_job_redeliveries_total", "class, cause")},
        ),
        Panel(
            title="Dead letters",
            queries={"{{class}} {{cause}}": f"sum by (class, cause) (tdm_dead_letters_total{{{CLASS}}})"},
        ),
        Panel(
            title="Leases lost, results that came second",
            unit="ops",
            queries={
                "{{class}} lease lost": rate("tdm_heartbeat_lost_total", "class"),
                "{{class}} second": rate("tdm_job_duplicates_total", "class"),
            },
        ),
        Panel(
            title="Workers by version",
            queries={"{{class}} {{version}}": gauge("tdm_version_workers", "class, version")},
        ),
        Panel(
            title="Ended jobs by version",
            unit="reqps",
            queries={"{{version}} {{outcome}}": rate("tdm_version_jobs_total", "version, outcome")},
        ),
        Panel(
            title="Memory of processes",
            unit="bytes",
            queries={"{{job}} {{instance}}": 'process_resident_memory_bytes{job=~"tdm-.*"}'},
        ),
    ],
    "Redis and the store": [
        Panel(
            title="Memory",
            unit="bytes",
            queries={
                "used": gauge("tdm_redis_memory_bytes", ""),
                "limit": gauge("tdm_redis_memory_limit_bytes", ""),
            },
        ),
        Panel(
            title="Memory, of its limit",
            unit="percentunit",
            queries={"": gauge("tdm_redis_memory_use_ratio", "")},
            says="From 80 % on finished jobs are forgotten, the oldest first.",
        ),
        Panel(
            title="Finished jobs kept and forgotten",
            queries={
                "{{class}} kept": gauge("tdm_jobs_kept"),
                "{{class}} forgotten, ever": gauge("tdm_jobs_forgotten"),
            },
        ),
        Panel(title="Append-only file is written", kind="stat", queries={"": "max(tdm_redis_aof_ok)"}),
        Panel(
            title="Commands and late fsyncs",
            queries={
                "commands/s": gauge("tdm_redis_commands_per_second", ""),
                "late fsyncs": gauge("tdm_redis_delayed_fsyncs", ""),
            },
        ),
        Panel(
            title="Answers from Redis, p99",
            unit="s",
            queries=quantiles("tdm_redis_op_seconds", "op", "", (0.99,)),
        ),
        Panel(
            title="Failed queue verbs",
            unit="ops",
            queries={"{{op}}": rate("tdm_redis_errors_total", "op", "")},
        ),
        Panel(
            title="Store verbs, p99", unit="s", queries=quantiles("tdm_storage_op_seconds", "op", "", (0.99,))
        ),
    ],
    "k6": [
        Panel(
            title="Requests it sends",
            unit="reqps",
            queries={"{{scenario}}": f"sum by (scenario) (rate(k6_http_reqs_total{A_SCENARIO}{RATE}))"},
        ),
        Panel(
            title="p95 as it sees it",
            unit="s",
            queries={"{{scenario}}": f"max by (scenario) (k6_http_req_duration_p95{A_SCENARIO})"},
        ),
        Panel(
            title="Iterations that it could not start",
            unit="ops",
            queries={
                "{{scenario}}": f"sum by (scenario) (rate(k6_dropped_iterations_total{A_SCENARIO}{RATE}))"
            },
        ),
    ],
}
