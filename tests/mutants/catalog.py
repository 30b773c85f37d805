"""The mutants: small changes that break the method or a promise, each with the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change to one file.

    Attributes:
        name: what is broken, in words.
        path: the file, from the root of the project.
        before: text in it, found exactly once.
        after: what replaces it.
        tests: arguments of pytest.
    """

    name: str
    path: str
    before: str
    after: str
    tests: str


TDM = "engines/distill/tdm.py"
SCRIPTS = "server/queue/lua"
OBJECTIVE = "tests/engines/test_tdm.py"
TRAINER = "tests/engines/test_trainer.py"
VERDICT = "tests/engines/test_gate.py"
PARITY = "tests/engines/test_compile.py -k parity_of or disagrees or agreement or pixels"
PIPELINE = "tests/engines/test_runtime.py -k not aotinductor"
QUEUE = (
    "tests/server/queue/test_queue.py tests/server/queue/test_leases.py tests/server/queue/test_fairness.py"
    " tests/server/api/test_idempotency.py -k not [redis"
)
BATCH_POLICY = "server/worker/batch_policy.py"
POLICY = "tests/server/worker/test_batch_policy.py"

MUTANTS = (
    # the objective
    Mutant(
        "queries are the student's x0 noised anew (DMD2), not its trajectory points",
        TDM,
        "return Query(a * at.landing + b * noise, tau, noise, a, b)",
        "alpha, sigma = schedule.at(tau, at.landing.ndim)\n"
        "    return Query(alpha * at.x0.detach() + sigma * noise, tau, noise, a, b)",
        OBJECTIVE,
    ),
    Mutant(
        "the kernel counts the noise in x_s twice",
        TDM,
        "(sigma**2 - (a * sigma_s) ** 2).clamp(min=0.0).sqrt()",
        "sigma",
        OBJECTIVE,
    ),
    Mutant(
        "no importance weight",
        TDM,
        "return (0.5 * row_mean(query.noise.square() - total_noise.square())).exp().view_as(query.b)",
        "return torch.ones_like(query.b)",
        OBJECTIVE,
    ),
    Mutant(
        "the importance weight is inverted",
        TDM,
        "return (0.5 * row_mean(query.noise.square()",
        "return (-0.5 * row_mean(query.noise.square()",
        OBJECTIVE,
    ),
    Mutant(
        "the importance weight is not used",
        TDM,
        "weight = weight * importance_weight(at, query, schedule)",
        "weight = weight * 1.0",
        OBJECTIVE,
    ),
    Mutant(
        "the fake score's v loss has no weight",
        TDM,
        "return sigma**-2",
        "return torch.ones_like(sigma)",
        OBJECTIVE,
    ),
    Mutant(
        "the fake score's loss leaves its weight out",
        TDM,
        "loss = row_mean(weight * (x0 - target).square())",
        "loss = row_mean((x0 - target).square())",
        OBJECTIVE,
    ),
    Mutant(
        "min-SNR has no bound",
        TDM,
        "(alpha / sigma).square().clamp(max=5.0)",
        "(alpha / sigma).square()",
        OBJECTIVE,
    ),
    Mutant(
        "the kernel weight of exact targets is left out",
        TDM,
        "(10.0 * b**2).clamp(max=1.0)",
        "torch.ones_like(b)",
        OBJECTIVE,
    ),
    Mutant(
        "Pseudo-Huber is plain squares",
        TDM,
        "if objective.huber_c == 0.0:",
        "if objective.huber_c >= 0.0:",
        OBJECTIVE,
    ),
    Mutant(
        "the student runs away from the teacher",
        TDM,
        "(x0_real - x0_fake)\n",
        "(x0_fake - x0_real)\n",
        OBJECTIVE,
    ),
    Mutant(
        "the student's loss is not normalised",
        TDM,
        "return row_mean(distance) / normaliser, normaliser",
        "return row_mean(distance), normaliser",
        OBJECTIVE,
    ),
    Mutant(
        "the normaliser has no lower bound",
        TDM,
        "normaliser = row_mean((x0.detach() - x0_real).abs()).clamp(min=objective.min_normaliser)",
        "normaliser = row_mean((x0.detach() - x0_real).abs())",
        OBJECTIVE,
    ),
    Mutant(
        "the teacher is not guided",
        TDM,
        "return without + guidance_scale * (with_prompt - without)",
        "return with_prompt",
        OBJECTIVE,
    ),
    Mutant(
        "tau may lie below its own step",
        TDM,
        "low = (next_timesteps + 1).clamp(min=objective.tau_floor)",
        "low = torch.full_like(next_timesteps, objective.tau_floor)",
        OBJECTIVE,
    ),
    Mutant(
        "tau keeps no distance from the step's start", TDM, "- objective.tau_gap - low", "- low", OBJECTIVE
    ),
    Mutant(
        "the rollout goes on from x0 instead of x_s",
        TDM,
        "latents[rows] = ddim_step(x0, eps, student.schedule, to)",
        "latents[rows] = x0",
        OBJECTIVE,
    ),
    Mutant(
        "only first steps are trained",
        TDM,
        "dtype=torch.float64) * num_steps).long()",
        "dtype=torch.float64) * 0 * num_steps).long()",
        OBJECTIVE,
    ),
    Mutant(
        "the exact target forgets the noise of x_s",
        TDM,
        "query.a * sigma_s**2 / query.b * query.noise",
        "0 * query.noise",
        OBJECTIVE,
    ),
    Mutant(
        "steps of clean points land where they did",
        TDM,
        'return clean_points(at) if objective.points == "clean" else at',
        "return at",
        OBJECTIVE,
    ),
    # the loop
    Mutant(
        "the raw weights are shipped, not their average",
        "engines/distill/trainer.py",
        "trainer.roles.export(trainer.state.average, world)",
        'trainer.roles.export(dict(trainer.state.parameters["student"]), world)',
        TRAINER,
    ),
    Mutant(
        "the average never moves",
        "engines/distill/updates.py",
        "current, 1.0 - decay)",
        "current, 0.0)",
        TRAINER,
    ),
    Mutant(
        "fake_updates is ignored",
        "engines/distill/trainer.py",
        "for _ in range(config.fake_updates - 1):",
        "for _ in range(0):",
        TRAINER,
    ),
    Mutant(
        "the learning rate does not fall",
        "engines/distill/updates.py",
        "return min(1.0, rise, FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * left)",
        "return min(1.0, rise)",
        TRAINER,
    ),
    # the gate
    Mutant(
        "the teacher is measured as the student",
        "engines/distill/evaluator.py",
        'config.teacher if source == "teacher" else config.student,',
        "config.teacher,",
        VERDICT,
    ),
    Mutant(
        "every sampler starts from noise of its own",
        "engines/distill/evaluator.py",
        "prompts.captions, noise_seeds(prompts.seed, len(prompts.captions)))",
        "prompts.captions, noise_seeds(prompts.seed + row.num_steps, len(prompts.captions)))",
        VERDICT,
    ),
    Mutant(
        "a student may lose any accuracy",
        "engines/distill/verdict.py",
        "ours >= theirs - MAX_LOSS_POINTS,",
        "ours >= theirs - 100 * MAX_LOSS_POINTS,",
        VERDICT,
    ),
    Mutant(
        "a student may be farther from real renders",
        "engines/distill/verdict.py",
        '{numbers}", ours < theirs)\n        )\n    return criteria',
        '{numbers}", ours > 0)\n        )\n    return criteria',
        VERDICT,
    ),
    # bundles
    Mutant(
        "parity does not look at the cosine",
        "engines/compile/parity.py",
        "if found.cosine < MIN_COSINE[spec.compute_dtype]:",
        "if found.cosine < -2.0:",
        PARITY,
    ),
    Mutant(
        "parity does not look at the scale",
        "engines/compile/parity.py",
        'if spec.outputs[0].dtype != "uint8" and found.scale_error > MAX_SCALE_ERROR:',
        "if found.scale_error > 1e9:",
        PARITY,
    ),
    Mutant(
        "parity takes NaN",
        "engines/compile/parity.py",
        "if not found.finite:",
        "if found.cosine > 2.0:",
        PARITY,
    ),
    Mutant(
        "parity looks at the best row",
        "engines/compile/parity.py",
        "torch.nn.functional.cosine_similarity(a, b, dim=1).min().item()",
        "torch.nn.functional.cosine_similarity(a, b, dim=1).max().item()",
        PARITY,
    ),
    # the pipeline
    Mutant(
        "every row has the first one's seed",
        "engines/runtime/pipeline.py",
        "seeded_latents([sample.seed for sample in samples], shape)",
        "seeded_latents([samples[0].seed for sample in samples], shape)",
        PIPELINE,
    ),
    Mutant(
        "the student is not told how many steps it takes",
        "engines/runtime/pipeline.py",
        "[len(steps) for steps in visited],",
        "[4 for steps in visited],",
        PIPELINE,
    ),
    Mutant(
        "the last step does not land on clean latents",
        "engines/runtime/pipeline.py",
        "[[*steps, CLEAN][i + 1] for",
        "[[*steps, steps[-1]][i + 1] for",
        PIPELINE,
    ),
    Mutant(
        "broken latents are drawn",
        "engines/runtime/pipeline.py",
        "            if broken:",
        "            if len(broken) > 10**6:",
        PIPELINE,
    ),
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
    Mutant("suspects share a batch", BATCH_POLICY, "if first.alone:", "if False:", POLICY),
    Mutant(
        "others share a suspect's batch",
        BATCH_POLICY,
        "row.leased_job.bucket == bucket and not row.leased_job.alone]",
        "row.leased_job.bucket == bucket]",
        POLICY,
    ),
    Mutant(
        "sizes are mixed",
        BATCH_POLICY,
        "row.leased_job.bucket == bucket and not row.leased_job.alone]",
        "not row.leased_job.alone]",
        POLICY,
    ),
    Mutant(
        "it waits past a deadline",
        BATCH_POLICY,
        "min(cost(1) - waited_ms, slack_ms)",
        "cost(1) - waited_ms",
        POLICY,
    ),
    Mutant(
        "it waits for ever",
        BATCH_POLICY,
        "min(cost(1) - waited_ms, slack_ms)",
        "slack_ms",
        POLICY,
    ),
    Mutant(
        "it waits although others wait elsewhere",
        BATCH_POLICY,
        "if backlog or len(batch) == max_batch",
        "if len(batch) == max_batch",
        POLICY,
    ),
)
