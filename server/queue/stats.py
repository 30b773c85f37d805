"""What the api process reads of a class and of Redis for its metrics, its readiness and its admissions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, harmonic_mean
from typing import Any

import redis.asyncio.client

from server.job import Priority
from server.queue.keys import class_prefix, waiting_key
from server.queue.records import Pace, QueueStats, RedisHealth, load_pace, load_worker

HEALTH_SECTIONS = ("memory", "persistence", "stats")
"""Of Redis's INFO."""


def ask_stats(pipeline: redis.asyncio.client.Pipeline, model: str, now_ms: int) -> None:
    """Put the commands into a pipeline whose replies `load_stats` takes."""
    prefix = class_prefix(model)
    for priority in Priority:
        pipeline.zcard(waiting_key(model, priority))
    for priority in Priority:
        pipeline.zrange(waiting_key(model, priority), 0, 0, withscores=True)
    pipeline.zcard(f"{prefix}:live")
    pipeline.xlen(f"{prefix}:dead")
    pipeline.zcount(f"{prefix}:ended", f"({now_ms}", "+inf")
    pipeline.hgetall(f"{prefix}:pump")
    pipeline.zrangebyscore(f"{prefix}:alive", f"({now_ms}", "+inf")
    pipeline.hgetall(f"{prefix}:w")
    pipeline.hgetall(f"{prefix}:pace")


def load_stats(replies: Sequence[Any], now_ms: int) -> QueueStats:
    """Counts of one class and its live workers."""
    num = len(Priority)
    waiting = dict(zip(Priority, replies[:num], strict=True))
    oldest = [score for first in replies[num : 2 * num] for _, score in first]
    live, dead, kept, pump, alive, infos, paces = replies[2 * num :]
    waiting_us = sum(int(pump.get(f"work:{priority}", 0)) for priority in Priority)
    return QueueStats(
        waiting=waiting,
        running=live - sum(waiting.values()),
        oldest_age_ms=max(0, now_ms - int(min(oldest))) if oldest else 0,
        dead=dead,
        kept=kept,
        forgotten=int(pump.get("forgotten", 0)),
        waiting_ms=waiting_us / 1000,
        running_ms=(int(pump.get("work:live", 0)) - waiting_us) / 1000,
        workers=tuple(load_worker(infos[consumer]) for consumer in alive if consumer in infos),
        margin=float(pump.get("margin", 1)),
        pace=_mean_pace([load_pace(paces.get(consumer)) for consumer in alive if consumer in infos]),
    )


def _mean_pace(paces: Sequence[Pace]) -> Pace:
    """Of workers side by side: who is slow does less of the work."""
    if not paces:
        return Pace()
    return Pace(harmonic_mean([pace.ratio for pace in paces]), fmean(pace.beside_ms for pace in paces))


def load_health(info: Mapping[str, Any]) -> RedisHealth:
    """Redis's memory, its append-only file and its load, from its INFO."""
    return RedisHealth(
        used_bytes=int(info["used_memory"]),
        limit_bytes=int(info.get("maxmemory", 0)),
        aof_ok=bool(int(info.get("aof_enabled", 0))) and info.get("aof_last_write_status") == "ok",
        delayed_fsyncs=int(info.get("aof_delayed_fsync", 0)),
        commands_per_s=float(info.get("instantaneous_ops_per_sec", 0)),
    )
