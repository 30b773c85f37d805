"""Changes to the method: where the losses are asked, what they say, which steps a student takes."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TDM = "engines/distill/tdm.py"
TRAJECTORY = "engines/distill/trajectory.py"
FORWARD = "engines/distill/forward.py"
# each without what takes long and adds nothing: a mutant costs the import of torch and these seconds
OBJECTIVE = "tests/engines/test_tdm.py tests/engines/test_trajectory.py tests/engines/test_forward.py"
MARGINALS = "tests/engines/test_marginals.py -k training_moves and v_prediction"

MUTANTS = (
    # the objective
    Mutant(
        "queries are the student's x0 noised anew (DMD2), not its trajectory points",
        FORWARD,
        "return Query(a * at.landing + b * noise, tau, noise, a, b)",
        "alpha, sigma = schedule.at(tau, at.landing.ndim)\n"
        "    return Query(alpha * at.x0.detach() + sigma * noise, tau, noise, a, b)",
        MARGINALS,
    ),
    Mutant(
        "the kernel counts the noise in x_s twice",
        FORWARD,
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
        FORWARD,
        "low = (next_timesteps + 1).clamp(min=objective.tau_floor)",
        "low = torch.full_like(next_timesteps, objective.tau_floor)",
        OBJECTIVE,
    ),
    Mutant(
        "tau keeps no distance from the step's start",
        FORWARD,
        "- objective.tau_gap - low",
        "- low",
        OBJECTIVE,
    ),
    Mutant(
        "the rollout goes on from x0 instead of x_s",
        TRAJECTORY,
        "latents[rows] = ddim_step(x0, eps, student.schedule, to)",
        "latents[rows] = x0",
        MARGINALS,
    ),
    Mutant(
        "only first steps are trained",
        TRAJECTORY,
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
        FORWARD,
        'return clean_points(at) if objective.points == "clean" else at',
        "return at",
        OBJECTIVE,
    ),
    # what may be switched on in the objective
    Mutant(
        "a jittered grid stays where it was",
        TRAJECTORY,
        "uniform = 2.0 * share * torch.rand(now.shape, generator=rng, dtype=torch.float64) - share",
        "uniform = 0.0 * torch.rand(now.shape, generator=rng, dtype=torch.float64)",
        OBJECTIVE,
    ),
    Mutant(
        "a random landing is the next grid point",
        TRAJECTORY,
        "return next_timesteps + (uniform * span).long()",
        "return next_timesteps + (0 * uniform * span).long()",
        OBJECTIVE,
    ),
    Mutant(
        "the fake score learns without being told K",
        TDM,
        "    x0 = fake_score(query.latents, query.tau, at.cond)",
        "    told = replace(at.cond, num_steps=torch.ones_like(query.tau))\n"
        "    x0 = fake_score(query.latents, query.tau, told)",
        OBJECTIVE,
    ),
    Mutant(
        "the fake score answers without being told K",
        TDM,
        "x0_fake = fake_score(query.latents, query.tau, at.cond)",
        "told = replace(at.cond, num_steps=torch.ones_like(query.tau))\n"
        "            x0_fake = fake_score(query.latents, query.tau, told)",
        OBJECTIVE,
    ),
    Mutant(
        "later guidance is read inside the step",
        TDM,
        'later=objective.guidance_tau == "later"',
        "later=False",
        OBJECTIVE,
    ),
    Mutant(
        "guidance of its own tau is read at the shared one",
        TDM,
        'other = draw_query(at, teacher.schedule, objective, rng, later=objective.guidance_tau == "later")',
        "other = query",
        OBJECTIVE,
    ),
    Mutant(
        "decoupled guidance counts the prompt twice",
        TDM,
        "return plain + (scale - 1.0) * (with_prompt - without)",
        "return plain + scale * (with_prompt - without)",
        OBJECTIVE,
    ),
    Mutant(
        "Fisher's loss has no correction for the fake score",
        TDM,
        "row_mean((real - fake) * (fake - at.x0))",
        "row_mean((real - fake) * (real - at.x0))",
        OBJECTIVE,
    ),
    Mutant(
        "Fisher's loss has the wrong sign",
        TDM,
        "row_mean((real - fake) * (fake - at.x0))",
        "row_mean((fake - real) * (fake - at.x0))",
        OBJECTIVE,
    ),
    Mutant(
        "diversity asks an unguided teacher",
        TDM,
        "Query(latents, now, zero, zero, zero), cond, uncond, objective.guidance_scale)",
        "Query(latents, now, zero, zero, zero), cond, uncond, 1.0)",
        OBJECTIVE,
    ),
    Mutant(
        "the teacher's sub-steps all jump to the end",
        TDM,
        "latents = ddim_step(x0, x0_to_eps(x0, latents, *schedule.at(now, ndim)), schedule, to)",
        "latents = ddim_step(x0, x0_to_eps(x0, latents, *schedule.at(now, ndim)), schedule, s)",
        OBJECTIVE,
    ),
    Mutant(
        "diversity is not normalised",
        TDM,
        "squares = row_mean(0.5 * (at.x0[rows] - target).square()) / normaliser[rows]",
        "squares = row_mean(0.5 * (at.x0[rows] - target).square())",
        OBJECTIVE,
    ),
    Mutant(
        "diversity is not asked for",
        TDM,
        "if objective.diversity > 0.0:",
        "if objective.diversity > 1e9:",
        OBJECTIVE,
    ),
    Mutant(
        "Pseudo-Huber turns linear thirty times too late",
        TDM,
        "objective.huber_c**2).sqrt()",
        "objective.huber_c).sqrt()",
        OBJECTIVE,
    ),
    Mutant(
        "the kernel weight of exact targets has no bound",
        TDM,
        "(10.0 * b**2).clamp(max=1.0)",
        "10.0 * b**2",
        OBJECTIVE,
    ),
    Mutant(
        "the importance weight is not tempered",
        TDM,
        "return (0.5 * row_mean(query.noise.square() - total_noise.square())).exp()",
        "return (0.5 * (query.noise.square() - total_noise.square()).flatten(1).sum(1)).exp()",
        OBJECTIVE,
    ),
    Mutant(
        "K is drawn evenly, whatever its weight",
        TRAJECTORY,
        "odds = torch.tensor(list(weights.values()), dtype=torch.float64)",
        "odds = torch.ones(len(weights), dtype=torch.float64)",
        OBJECTIVE,
    ),
    Mutant(
        "tau may be the step's end",
        FORWARD,
        "low = (next_timesteps + 1).clamp(min=objective.tau_floor)",
        "low = next_timesteps.clamp(min=objective.tau_floor)",
        OBJECTIVE,
    ),
    Mutant(
        "tau has no floor",
        FORWARD,
        "low = (next_timesteps + 1).clamp(min=objective.tau_floor)",
        "low = next_timesteps + 1",
        OBJECTIVE,
    ),
)
