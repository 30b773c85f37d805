"""Settings come from TDM_* variables, once, and a wrong one is named."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings, child_environment, explain


def test_defaults_serve_on_this_machine_only() -> None:
    settings = Settings()

    assert (settings.host, settings.port, settings.metrics_port) == ("127.0.0.1", 8000, 9100)
    assert settings.bundle_paths == []


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_PORT", "8123")
    monkeypatch.setenv("TDM_MAX_QUEUE", "7")

    assert (Settings().port, Settings().max_queue) == (8123, 7)


def test_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_PORT", "")

    assert Settings().port == 8000


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        setattr(Settings(), "port", 1)  # noqa: B010 (mypy would stop the plain form)


def test_wrong_variable_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_PORT", "eighty")
    monkeypatch.setenv("TDM_WORKERS", "-1")

    with pytest.raises(ValidationError) as caught:
        Settings()

    lines = explain(caught.value)
    assert [line.partition(":")[0] for line in lines] == ["TDM_PORT", "TDM_WORKERS"]
    assert "eighty" not in "".join(lines)


def test_bundles_are_absolute_paths_separated_by_commas(tmp_path: Path) -> None:
    settings = Settings(bundles=f" {tmp_path}/a , {tmp_path}/b ,")

    assert settings.bundle_paths == [tmp_path / "a", tmp_path / "b"]


def test_results_lie_under_the_data_directory_unless_told_otherwise(tmp_path: Path) -> None:
    assert Settings(data_dir=tmp_path).results_url == f"file://{tmp_path}/results"
    assert Settings(store_url="s3://bucket/results").results_url == "s3://bucket/results"


def test_each_worker_has_a_metrics_port_of_its_own() -> None:
    def port_of(index: int, metrics_port: int) -> int:
        settings = Settings(
            redis_url="redis://localhost", bundles="b", worker_index=index, metrics_port=metrics_port
        )
        return settings.for_worker().metrics_port

    assert [port_of(0, 9100), port_of(1, 9100)] == [9101, 9102]
    assert port_of(1, 0) == 0


@pytest.mark.parametrize(
    ("bundles", "redis_url", "variable"),
    [
        ("", "redis://localhost", "TDM_BUNDLES"),
        ("a,b", "redis://localhost", "TDM_BUNDLES"),
        ("a", "", "TDM_REDIS_URL"),
    ],
)
def test_worker_needs_one_bundle_and_a_redis(bundles: str, redis_url: str, variable: str) -> None:
    with pytest.raises(ValueError, match=variable):
        Settings(bundles=bundles, redis_url=redis_url).for_worker()


def test_child_inherits_the_environment_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_LOG_LEVEL", "debug")

    environment = child_environment(port=1, OMP_NUM_THREADS=1)

    assert environment["TDM_LOG_LEVEL"] == "debug"
    assert (environment["TDM_PORT"], environment["OMP_NUM_THREADS"]) == ("1", "1")


@pytest.mark.parametrize(
    "value", ["pictures.example.com", "ftp://example.com", "https://", "https://a.b/?c=d"]
)
def test_public_url_is_one_that_links_can_begin_with(value: str) -> None:
    with pytest.raises(ValidationError, match="https://HOST"):
        Settings(public_url=value)


@pytest.mark.parametrize("value", ["collector:4317", "grpc://collector:4317", "http://c/?key=1"])
def test_collector_is_one_that_takes_http(value: str) -> None:
    with pytest.raises(ValidationError, match="http://HOST"):
        Settings(otlp_endpoint=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_ratio_is_a_share(value: float) -> None:
    with pytest.raises(ValidationError, match="trace_ratio"):
        Settings(trace_ratio=value)


def test_worker_is_told_where_its_spans_go() -> None:
    settings = Settings(
        redis_url="redis://localhost", bundles="b", otlp_endpoint="http://collector:4318/", trace_ratio=0.1
    ).for_worker()

    assert (settings.otlp_endpoint, settings.trace_ratio) == ("http://collector:4318", 0.1)


@pytest.mark.parametrize("value", ["example.com", "https://a.example.com/ui", "https://a.example.com,b"])
def test_origins_are_origins(value: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        Settings(cors_origins=value)


def test_origins_may_be_several_and_end_with_a_slash() -> None:
    assert Settings(cors_origins="https://a.b/ , http://c:1").cors_origins == "https://a.b,http://c:1"
    assert Settings(cors_origins="*").cors_origins == "*"
