"""Settings: every `TDM_*` environment variable, read once when a process starts and frozen after that.

Nothing else in `server` reads the environment. The supervisor resolves what is left open here (bundles to
serve, number of workers, the embedded Valkey's URL) and hands each child its share in its environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.job import JobKind
from server.queue.address import parse_redis_url

Backend = Literal["auto", "eager", "aotinductor", "tensorrt"]

ENV_PREFIX = "TDM_"
# How long a job is known after its pictures have expired: longer than their bytes can take to go.
EXPIRED_RECORD_S = 3600


class Settings(BaseSettings):
    """What an operator can set; each field is the environment variable `TDM_<FIELD>`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True
    )

    host: str = "127.0.0.1"
    """Address the HTTP port and the metrics ports listen on."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """HTTP port of the API and the page; 0 takes a free one and the ready line names it."""
    public_url: str = ""
    """Where clients reach the api, behind a proxy: links begin with it. Empty: as each request says."""
    cors_origins: str = ""
    """Origins whose pages may call the api, `https://ui.example.com`, separated by commas; `*`: all. Empty:
    none but our own."""
    metrics_port: int = Field(default=9100, ge=0, le=65_000)
    """Prometheus port of the api process; worker i listens on `metrics_port + 1 + i`. 0 turns metrics off."""
    redis_url: str = ""
    """Redis 7+ or Valkey 8+: `redis://`, `rediss://`, `unix://`, `redis+sentinel://`, `rediss+sentinel://`
    (deploy/README.md). Empty: `up` starts a Valkey of its own under `data_dir`."""
    redis_wait_s: float = Field(default=30.0, ge=0, le=3600)
    """How long a starting process waits for a Redis that does not answer before it ends with status 1."""
    valkey_memory: str = Field(default="1gb", pattern=r"^[1-9][0-9]*(b|kb|mb|gb)?$")
    """Memory limit of that Valkey, `512mb` or `2gb`. Above half of it answers of finished jobs move to the
    store at once; above 80 % finished jobs are forgotten, the oldest first."""
    data_dir: Path = Path("data")
    """Where the embedded Valkey's log, built bundles and results lie."""
    bundles: str = ""
    """Bundle directories, or directories of bundles, separated by commas; empty: the shipped
    students."""
    bundle_key_file: Path | None = None
    """File with the key that bundles must be signed with (`python -m engines sign`); empty: any bundle
    is taken. Those of the shipped students are built and signed with it."""
    workers: int = Field(default=0, ge=0, le=256)
    """Worker processes; 0 or `auto`: for bundles built for a GPU one per GPU, for others one per CPU core, at
    most four; beside images, one more for each bundle for videos."""
    worker_threads: int = Field(default=1, ge=1, le=256)
    """CPU threads inside one worker. Several single-threaded workers beat one with several threads."""
    backend: Backend = "auto"
    """How workers run the bundle; `auto` takes the first compiled code that fits the machine, else eager."""
    max_queue: int = Field(default=256, ge=1)
    """Jobs that may wait per model; one more is refused with 429 `queue_full`."""
    max_prompt_chars: int = Field(default=2000, ge=1, le=20_000)
    """Longest prompt accepted, in characters."""
    max_wait_s: float = Field(default=30.0, ge=0, le=600)
    """How long `POST /v1/images` waits for its pictures before it answers 202 with the job."""
    job_deadline_s: float = Field(default=120.0, gt=0)
    """An image job that has not started by then fails with `deadline`; it never reaches a worker."""
    video_deadline_s: float = Field(default=1800.0, gt=0)
    """The same for a video job. One that runs is stopped at its next step."""
    swap_timeout_s: float = Field(default=900.0, gt=0)
    """A new version of a bundle whose workers are not ready by then is given up (`bundle swap`)."""
    lease_s: float = Field(default=20.0, gt=0)
    """A worker silent for this long loses its jobs to another one."""
    result_ttl_s: int = Field(default=86_400, ge=1)
    """How long finished pictures are kept; their jobs then say `expired` for an hour, and are forgotten."""
    record_s: int = Field(default=3600, ge=10)
    """How long a finished job stays in Redis; where memory gets short, less. Then its answer lies beside its
    results and is read from there."""
    store_url: str = ""
    """fsspec URL for results (`file://`, `s3://`, ...); empty: `data_dir/results`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """From which severity on lines are logged, each one JSON object on stderr."""
    otlp_endpoint: str = ""
    """OTLP/HTTP collector that gets the traces, `http://collector:4318`; needs the extra `tracing`. Empty: no
    tracing."""
    trace_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the traces begun here that are recorded. A caller who sends a `traceparent` has decided."""

    cuda_visible_devices: str | None = Field(default=None, validation_alias="CUDA_VISIBLE_DEVICES")
    """CUDA's own variable, without our prefix: the GPUs that workers may have; unset: all."""

    listen_fd: int | None = None
    """Set by the supervisor: the listening socket that the api process inherits."""
    worker_index: int = Field(default=0, ge=0)
    """Set by the supervisor: which worker of this machine this is."""

    @field_validator("workers", mode="before")
    @classmethod
    def _auto_is_open(cls, value: object) -> object:
        return 0 if value == "auto" else value

    @field_validator("bundles")
    @classmethod
    def _no_blank_entries(cls, value: str) -> str:
        return ",".join(part.strip() for part in value.split(",") if part.strip())

    @field_validator("public_url", "otlp_endpoint")
    @classmethod
    def _http_url_without_query(cls, value: str) -> str:
        parts = urlsplit(value)
        plain = parts.scheme in ("http", "https") and parts.netloc and not parts.query and not parts.fragment
        if value and not plain:
            raise ValueError("http://HOST or https://HOST, with a port or a path if need be")
        return value.rstrip("/")

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: str) -> str:
        origins = [part.strip().rstrip("/") for part in value.split(",") if part.strip()]
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and origin != f"{parts.scheme}://{parts.netloc}":
                raise ValueError(f"{origin!r} is no origin: * or SCHEME://HOST, with a port if need be")
        return ",".join(origins)

    @field_validator("redis_url")
    @classmethod
    def _url_that_we_serve(cls, value: str) -> str:
        if value:
            parse_redis_url(value)
        return value

    @property
    def bundle_paths(self) -> list[Path]:
        """`bundles` as absolute paths; empty when the demo students are meant."""
        return [Path(part).expanduser().resolve() for part in self.bundles.split(",") if part]

    @property
    def results_url(self) -> str:
        """`store_url`, or the directory under `data_dir` that it defaults to."""
        return self.store_url or (self.data_dir.resolve() / "results").as_uri()

    @property
    def record_ttl_s(self) -> int:
        """How long a finished job is known: its result's time, and while it is `expired`."""
        return self.result_ttl_s + EXPIRED_RECORD_S

    def deadline_s(self, kind: JobKind) -> float:
        """How long a job of this kind has, from accepted to finished."""
        return self.video_deadline_s if kind is JobKind.VIDEO else self.job_deadline_s

    def for_worker(self) -> WorkerSettings:
        """The share of one worker process.

        Raises:
            ValueError: `bundles` does not name exactly one bundle, or `redis_url` is empty.
        """
        if len(self.bundle_paths) != 1:
            raise ValueError(f"TDM_BUNDLES must name one bundle for a worker, not {self.bundles or 'none'!r}")
        if not self.redis_url:
            raise ValueError("TDM_REDIS_URL is empty; only `python -m server up` starts a Valkey of its own")
        return WorkerSettings(
            redis_url=self.redis_url,
            bundle=self.bundle_paths[0],
            bundle_key_file=self.bundle_key_file,
            backend=self.backend,
            num_threads=self.worker_threads,
            store_url=self.results_url,
            lease_s=self.lease_s,
            host=self.host,
            metrics_port=self.metrics_port + 1 + self.worker_index if self.metrics_port else 0,
            log_level=self.log_level,
            otlp_endpoint=self.otlp_endpoint,
            trace_ratio=self.trace_ratio,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What one worker process needs to know; everything is resolved."""

    redis_url: str
    bundle: Path
    backend: Backend
    num_threads: int
    store_url: str
    lease_s: float
    host: str
    metrics_port: int
    """Prometheus port of this worker; 0 means none."""
    log_level: str
    bundle_key_file: Path | None = None
    otlp_endpoint: str = ""
    trace_ratio: float = 1.0


def explain(error: ValidationError) -> list[str]:
    """One line per wrong variable, without values that could be secrets."""
    return [
        f"{ENV_PREFIX}{'.'.join(str(part) for part in item['loc']).upper()}: "
        + item["msg"].removeprefix("Value error, ")  # pydantic's, before the words of our own validators
        for item in error.errors(include_input=False, include_url=False)
    ]


def child_environment(**settings: object) -> dict[str, str]:
    """This process's environment with some settings replaced, for a child process.

    Args:
        settings: field names of `Settings` and their values; a name in capitals is taken as it is.
    """
    named = {
        name if name.isupper() else f"{ENV_PREFIX}{name.upper()}": str(value)
        for name, value in settings.items()
    }
    return {**os.environ, **named}
