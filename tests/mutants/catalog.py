"""The mutants: small changes that break the method or a promise, each with the tests that must notice."""

from __future__ import annotations

from tests.mutants import engines
from tests.mutants.mutant import Mutant

SCRIPTS = "server/queue/lua"
QUEUE = (
    "tests/server/test_queue.py tests/server/test_idempotency.py tests/server/test_fairness.py -k not [redis"
)
POLICY = "tests/server/test_batching.py"

MUTANTS = (
    *engines.MUTANTS,
    # the queue's verbs
    Mutant(
        "a worker that lost its lease starts the job all the same",
        f"{SCRIPTS}/start.lua",
        'if not owns(version, consumer, entry) then return {"lost"} end',
        "",
        QUEUE,
    ),
    Mutant(
        "a job may kill any number of workers",
        f"{SCRIPTS}/start.lua",
        "if tonumber(at) >= tonumber(max_attempts) then",
        "if tonumber(at) >= 1000 then",
        QUEUE,
    ),
    Mutant(
        "a job past its deadline is started",
        f"{SCRIPTS}/start.lua",
        "if tonumber(now) >= tonumber(dl) then",
        "if tonumber(now) >= tonumber(dl) * 2 then",
        QUEUE,
    ),
    Mutant(
        "a heartbeat takes a reclaimed job back",
        f"{SCRIPTS}/extend.lua",
        "elseif not owns(version, consumer, entry) then",
        "elseif false then",
        QUEUE,
    ),
    Mutant(
        "the last finisher wins",
        f"{SCRIPTS}/complete.lua",
        "elseif terminal[st] then",
        "elseif st == 'cancelled' then",
        QUEUE,
    ),
    Mutant(
        "a worker that lost the job may fail it",
        f"{SCRIPTS}/fail.lua",
        'if not owns(version, consumer, ent) then return "stale" end',
        "",
        QUEUE,
    ),
    Mutant(
        "a finished job stays among the unfinished",
        f"{SCRIPTS}/_finish.lua",
        'redis.call("ZREM", live, id)',
        "",
        QUEUE,
    ),
    Mutant(
        "a finished job counts against its tenant",
        f"{SCRIPTS}/_finish.lua",
        'redis.call("ZREM", inflight_key(tn), id)',
        "",
        QUEUE,
    ),
    Mutant(
        "whoever waits is not told",
        f"{SCRIPTS}/_finish.lua",
        'for boot in string.gmatch(rp, "%S+") do',
        'for boot in string.gmatch("", "%S+") do',
        QUEUE,
    ),
    Mutant(
        "a key gives another body the same job",
        f"{SCRIPTS}/enqueue.lua",
        'if st and holder_fp ~= fp then return {"mismatch", holder, 0} end',
        "",
        QUEUE,
    ),
    Mutant(
        "a key is forgotten at once",
        f"{SCRIPTS}/enqueue.lua",
        'if st then return {"dup", holder, 0} end',
        "",
        QUEUE,
    ),
    Mutant(
        "priorities have no weight",
        f"{SCRIPTS}/_pump.lua",
        "local weights = {high = 8, normal = 3, low = 1}",
        "local weights = {high = 1, normal = 1, low = 1}",
        QUEUE,
    ),
    Mutant(
        "a tenant's jobs come before everybody's",
        f"{SCRIPTS}/_pump.lua",
        'if redis.call("EXISTS", list) == 1 then redis.call("RPUSH", ring_key(priority), tenant) end',
        'if redis.call("EXISTS", list) == 1 then redis.call("LPUSH", ring_key(priority), tenant) end',
        QUEUE,
    ),
    Mutant(
        "the newest finished jobs are forgotten first",
        f"{SCRIPTS}/_accept.lua",
        '"ZPOPMIN"',
        '"ZPOPMAX"',
        QUEUE,
    ),
    # the batch policy
    Mutant("suspects share a batch", "server/batching.py", "if first.alone:", "if False:", POLICY),
    Mutant(
        "others share a suspect's batch",
        "server/batching.py",
        "row.bucket == first.bucket and not row.alone]",
        "row.bucket == first.bucket]",
        POLICY,
    ),
    Mutant(
        "sizes are mixed",
        "server/batching.py",
        "[row for row in rows if row.bucket == first.bucket and not row.alone]",
        "[row for row in rows if not row.alone]",
        POLICY,
    ),
    Mutant(
        "it waits past a deadline",
        "server/batching.py",
        "min(cost(1) - waited_ms, slack_ms)",
        "cost(1) - waited_ms",
        POLICY,
    ),
    Mutant(
        "it waits for ever", "server/batching.py", "min(cost(1) - waited_ms, slack_ms)", "slack_ms", POLICY
    ),
    Mutant(
        "it waits although others wait elsewhere",
        "server/batching.py",
        "if backlog or len(batch) == max_batch",
        "if len(batch) == max_batch",
        POLICY,
    ),
)
