"""The mutants: small changes that break the method or a promise, each with the tests that must notice."""

from __future__ import annotations

from tests.mutants import engines
from tests.mutants.mutant import Mutant

SCRIPTS = "server/queue/lua"
FAIRNESS = "tests/server/test_fairness.py -k not [redis"
VERBS = "tests/server/test_queue.py -k not [redis"
VERSIONS = "tests/server/test_versions.py -k not [redis"
POLICY = "tests/server/test_batching.py"

MUTANTS = (
    *engines.MUTANTS,
    # the queue's verbs
    Mutant(
        "a worker that lost its lease starts the job all the same",
        f"{SCRIPTS}/start.lua",
        'if not owns(version, consumer, entry) then return {"lost"} end',
        "",
        VERBS,
    ),
    Mutant(
        "a job may kill any number of workers",
        f"{SCRIPTS}/start.lua",
        "if tonumber(at) >= tonumber(max_attempts) then",
        "if tonumber(at) >= 1000 then",
        VERBS,
    ),
    Mutant(
        "a job past its deadline is started",
        f"{SCRIPTS}/start.lua",
        "if tonumber(now) >= tonumber(dl) then",
        "if tonumber(now) >= tonumber(dl) * 2 then",
        VERBS,
    ),
    Mutant(
        "a heartbeat takes a reclaimed job back",
        f"{SCRIPTS}/extend.lua",
        "elseif not owns(version, consumer, entry) then",
        "elseif false then",
        VERBS,
    ),
    Mutant(
        "the last finisher wins",
        f"{SCRIPTS}/complete.lua",
        "elseif terminal[st] then",
        "elseif st == 'cancelled' then",
        VERBS,
    ),
    Mutant(
        "a worker that lost the job may fail it",
        f"{SCRIPTS}/fail.lua",
        'if not owns(version, consumer, ent) then return "stale" end',
        "",
        VERBS,
    ),
    Mutant(
        "a finished job stays among the unfinished",
        f"{SCRIPTS}/_finish.lua",
        'redis.call("ZREM", live, id)',
        "",
        VERBS,
    ),
    Mutant(
        "a finished job counts against its tenant",
        f"{SCRIPTS}/_finish.lua",
        'redis.call("ZREM", inflight_key(tn), id)',
        "",
        VERBS,
    ),
    Mutant(
        "whoever waits is not told",
        f"{SCRIPTS}/_finish.lua",
        'for boot in string.gmatch(rp, "%S+") do',
        'for boot in string.gmatch("", "%S+") do',
        VERBS,
    ),
    Mutant(
        "a key gives another body the same job",
        f"{SCRIPTS}/enqueue.lua",
        'if st and holder_fp ~= fp then return {"mismatch", holder, 0} end',
        "",
        VERBS,
    ),
    Mutant(
        "a key is forgotten at once",
        f"{SCRIPTS}/enqueue.lua",
        'if st then return {"dup", holder, 0} end',
        "",
        VERBS,
    ),
    Mutant(
        "priorities have no weight",
        f"{SCRIPTS}/_pump.lua",
        "local weights = {high = 8, normal = 3, low = 1}",
        "local weights = {high = 1, normal = 1, low = 1}",
        FAIRNESS,
    ),
    Mutant(
        "a tenant's jobs come before everybody's",
        f"{SCRIPTS}/_pump.lua",
        'if redis.call("EXISTS", list) == 1 then redis.call("RPUSH", ring_key(priority), tenant) end',
        'if redis.call("EXISTS", list) == 1 then redis.call("LPUSH", ring_key(priority), tenant) end',
        FAIRNESS,
    ),
    Mutant(
        "the newest finished jobs are forgotten first",
        f"{SCRIPTS}/_accept.lua",
        '"ZPOPMIN"',
        '"ZPOPMAX"',
        VERBS,
    ),
    Mutant(
        "an earlier attempt may fail the next one",
        f"{SCRIPTS}/fail.lua",
        "or at ~= attempt",
        "",
        VERBS,
    ),
    Mutant(
        "a worker that leaves takes its jobs along",
        f"{SCRIPTS}/leave.lua",
        "if pending.err or #pending == 0 then",
        "if true then",
        VERBS,
    ),
    Mutant(
        "a worker that fell silent takes its jobs along",
        f"{SCRIPTS}/beat.lua",
        "if not holds then",
        "if true then",
        VERBS,
    ),
    Mutant(
        "jobs that are over count against their tenant until somebody sweeps",
        f"{SCRIPTS}/enqueue.lua",
        'redis.call("ZREMRANGEBYSCORE", inflight_key(tn), "-inf", enq)',
        "",
        VERBS,
    ),
    Mutant(
        "a cancelled job still waits in the statistics",
        f"{SCRIPTS}/_finish.lua",
        'redis.call("ZREM", waiting_key(pr), id)',
        "",
        VERBS,
    ),
    Mutant(
        "a finished job's record stays for ever",
        f"{SCRIPTS}/_finish.lua",
        'redis.call("PEXPIRE", key, ttl)',
        "",
        VERBS,
    ),
    Mutant(
        "a heartbeat keeps no lease",
        f"{SCRIPTS}/extend.lua",
        'redis.call("XCLAIM", stream_of(version), group, consumer, 0, entry, "JUSTID")',
        "",
        VERBS,
    ),
    Mutant(
        "a running job ends with its deadline, whatever its worker does",
        f"{SCRIPTS}/expire.lua",
        "tonumber(dl) + grace <= now",
        "tonumber(dl) <= now",
        VERBS,
    ),
    Mutant(
        "what is handed back goes to the end of the line",
        f"{SCRIPTS}/_back.lua",
        'if redis.call("LPUSH", tenant_key(pr, tn), id) == 1',
        'if redis.call("RPUSH", tenant_key(pr, tn), id) == 1',
        VERBS,
    ),
    Mutant(
        "a full server takes jobs until nothing works",
        f"{SCRIPTS}/_accept.lua",
        "local accepting = 0.8",
        "local accepting = 8",
        VERBS,
    ),
    Mutant(
        "a key of one model is unknown to the next",
        f"{SCRIPTS}/enqueue.lua",
        "if other and other ~= q then",
        "if other == q then",
        VERBS,
    ),
    Mutant(
        "anybody owns a lease",
        f"{SCRIPTS}/_names.lua",
        "pending[1] ~= nil and pending[1][2] == consumer",
        "pending[1] ~= nil",
        VERBS,
    ),
    Mutant(
        "a cancelled job is dispatched when its turn comes",
        f"{SCRIPTS}/_pump.lua",
        'if id and redis.call("HGET", job_key(id), "st") == "queued" then',
        "if id then",
        VERBS,
    ),
    Mutant(
        "a job whose reply was lost is tried again by the same worker",
        f"{SCRIPTS}/start.lua",
        'local again = st == "running" and own == consumer',
        "local again = false",
        VERBS,
    ),
    Mutant(
        "a finisher whose reply was lost is told that it came too late",
        f"{SCRIPTS}/complete.lua",
        "if by == finisher then",
        "if by == nil then",
        VERBS,
    ),
    Mutant(
        "a lease in a lane that nobody serves is taken while its worker works",
        f"{SCRIPTS}/adopt.lua",
        '"adopt", lease_ms, "0-0"',
        '"adopt", 0, "0-0"',
        VERSIONS,
    ),
    Mutant(
        "a decision on what no longer stands is taken all the same",
        f"{SCRIPTS}/set_route.lua",
        'if (redis.call("HGET", route, "rev") or "0") ~= rev then return 0 end',
        "",
        VERSIONS,
    ),
    Mutant(
        "a version on trial may have all that the others have no room for",
        f"{SCRIPTS}/_pump.lua",
        "return is_due and room[next] > 0 and next or base, plan.share > 0",
        "return (is_due or room[base] <= 0) and room[next] > 0 and next or base, plan.share > 0",
        VERSIONS,
    ),
    Mutant(
        "a version on trial gets a job again that killed its worker",
        f"{SCRIPTS}/_pump.lua",
        "if tonumber(at) > 0 and room[plan.base] then",
        "if tonumber(at) > 99 and room[plan.base] then",
        VERSIONS,
    ),
    Mutant(
        "what is handed back counts twice in a version's share",
        f"{SCRIPTS}/_pump.lua",
        "if counts and not vs and version == turn then",
        "if counts and version == turn then",
        VERSIONS,
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
