"""Changes to a run of distillation, and to what is seen of it."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINER = "tests/engines/test_trainer.py tests/engines/test_distill_settings.py -k not killed"
ROLES = "tests/engines/test_roles.py"
METHODS = "tests/engines/test_distill_methods.py"
SAMPLES = "tests/engines/test_samples.py"
STOP = "tests/engines/test_early_stop.py"
JUDGED = "tests/engines/test_gate.py -k judged_prompts"

MUTANTS = (
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
    # what a run does with it
    Mutant(
        "every iteration draws the same",
        "engines/distill/trainer.py",
        "config.seed * SEED_STRIDE + state.iteration",
        "config.seed * SEED_STRIDE",
        TRAINER,
    ),
    Mutant(
        "every seed draws the same",
        "engines/distill/trainer.py",
        "config.seed * SEED_STRIDE + state.iteration",
        "state.iteration",
        TRAINER,
    ),
    Mutant(
        "grids are never jittered",
        "engines/distill/trainer.py",
        "if config.grid_jitter > 0.0:",
        "if config.grid_jitter > 1.0:",
        TRAINER,
    ),
    Mutant(
        "steps land on the grid, whatever the settings",
        "engines/distill/trainer.py",
        "landing_rng=rng if config.objective.random_landing else None,",
        "landing_rng=None,",
        TRAINER,
    ),
    Mutant(
        "the fake score is never pulled",
        "engines/distill/trainer.py",
        "if config.fake_pull > 0.0:",
        "if config.fake_pull > 1.0:",
        TRAINER,
    ),
    Mutant(
        "the student learns before the fake score has seen it",
        "engines/distill/trainer.py",
        """        fake_rows, fake_norm = self._update_fake_score(at, factor, rng)
        student_rows, distance = tdm.student_loss(
            at, roles.teacher, roles.fake_score, self.uncond, config.objective, rng
        )
""",
        """        student_rows, distance = tdm.student_loss(
            at, roles.teacher, roles.fake_score, self.uncond, config.objective, rng
        )
        fake_rows, fake_norm = self._update_fake_score(at, factor, rng)
""",
        TRAINER,
    ),
    Mutant(
        "gradients are not clipped",
        "engines/distill/trainer.py",
        "clip_gradients(parameters, self.config.clip_norm,",
        "clip_gradients(parameters, 1e9,",
        TRAINER,
    ),
    Mutant(
        "learning rates stay at their peak",
        "engines/distill/trainer.py",
        'group["lr"] = group["peak_lr"] * factor',
        'group["lr"] = group["peak_lr"]',
        TRAINER,
    ),
    Mutant(
        "student and fake score swap their learning rates",
        "engines/distill/updates.py",
        '{"student": config.student_lr, "fake_score": config.fake_lr}',
        '{"student": config.fake_lr, "fake_score": config.student_lr}',
        TRAINER,
    ),
    Mutant(
        "an infinite gradient is applied",
        "engines/distill/trainer.py",
        "if not math.isfinite(norm) or not math.isfinite(value):",
        "if not math.isfinite(value):",
        TRAINER,
    ),
    Mutant(
        "the steps embedding has no rate of its own",
        "engines/distill/updates.py",
        '"peak_lr": config.steps_lr',
        '"peak_lr": lr',
        TRAINER,
    ),
    Mutant(
        "the steps embedding decays",
        "engines/distill/updates.py",
        '"weight_decay": 0.0',
        '"weight_decay": config.weight_decay',
        TRAINER,
    ),
    Mutant(
        "weights do not decay",
        "engines/distill/updates.py",
        '"weight_decay": config.weight_decay',
        '"weight_decay": 0.0',
        TRAINER,
    ),
    Mutant(
        "the momentum is torch's",
        "engines/distill/updates.py",
        "betas=config.betas, fused=True",
        "fused=True",
        TRAINER,
    ),
    Mutant(
        "the average remembers the teacher",
        "engines/distill/updates.py",
        "decay = min(decay, (1 + state.iteration) / (10 + state.iteration))",
        "decay = min(decay, 1.0)",
        TRAINER,
    ),
    Mutant(
        "what is exported is the network as it learns",
        "engines/distill/roles.py",
        "{**self.student.network.state_dict(), **weights}",
        "{**weights, **self.student.network.state_dict()}",
        TRAINER,
    ),
    Mutant(
        "adapters are merged without their scale",
        "engines/distill/roles.py",
        'layer.scaling["student"] * (up.float() @ down.float())',
        "up.float() @ down.float()",
        ROLES,
    ),
    Mutant(
        "the teacher hears a learner's steps embedding",
        "engines/distill/roles.py",
        'if self._name == "teacher":  #',
        "if False:  #",
        ROLES,
    ),
    Mutant(
        "gradients of a checkpointed pass go to whoever ran last",
        "engines/distill/roles.py",
        "            self._adapters.switch(name)",
        "            pass",
        ROLES,
    ),
    Mutant(
        "adapters change the network before they have learned",
        "engines/distill/roles.py",
        "init_lora_weights=True",
        "init_lora_weights=False",
        ROLES,
    ),
    # consistency distillation
    Mutant(
        "the target is the student itself",
        "engines/distill/trainer.py",
        "roles.fake_score,\n            roles.teacher,\n            (noised",
        "roles.student,\n            roles.teacher,\n            (noised",
        METHODS,
    ),
    Mutant(
        "consistency is distilled from an unguided teacher",
        "engines/distill/trainer.py",
        "            config.objective.guidance_scale,\n            config.consistency,",
        "            1.0,\n            config.consistency,",
        METHODS,
    ),
    Mutant(
        "the far end is told the near end's time",
        "engines/distill/lcm.py",
        "expected = consistency(target, moved, end, cond, objective)",
        "expected = consistency(target, moved, start, cond, objective)",
        METHODS,
    ),
    Mutant(
        "the teacher does not move",
        "engines/distill/lcm.py",
        "return ddim_step(x0, eps, teacher.schedule, end)",
        "return ddim_step(x0, eps, teacher.schedule, start)",
        METHODS,
    ),
    Mutant(
        "the consistency loss knows squares only",
        "engines/distill/lcm.py",
        'if objective.loss == "l2":',
        "if objective.loss:",
        METHODS,
    ),
    Mutant(
        "the boundary lets clean latents through the network",
        "engines/distill/lcm.py",
        "return c_skip * latents + c_out *",
        "return c_skip * 0 + c_out *",
        METHODS,
    ),
    # looking at a student while it learns
    Mutant(
        "samples are those of the raw weights",
        "engines/distill/studio.py",
        "with averaged(self._state):",
        "with contextlib.nullcontext():",
        SAMPLES,
    ),
    Mutant(
        "the run's teacher draws without guidance",
        "engines/distill/studio.py",
        "guidance_scale=guidance_scale,",
        "guidance_scale=1.0,",
        SAMPLES,
    ),
    Mutant(
        "an early stop looks at the gate's own prompts",
        "engines/distill/early_stop.py",
        "PROMPT_SEED = 30_000",
        "PROMPT_SEED = 0",
        JUDGED,
    ),
    Mutant(
        "an early stop looks at the default K, whatever it was told",
        "engines/distill/early_stop.py",
        "self._num_steps = self.settings.num_steps or config.default_num_steps",
        "self._num_steps = config.default_num_steps",
        STOP,
    ),
    Mutant(
        "an early stop compares with another guidance than the student's",
        "engines/distill/early_stop.py",
        "self._config.objective.guidance_scale,",
        "1.0,",
        STOP,
    ),
    Mutant(
        "features of other settings are taken for this run's",
        "engines/distill/early_stop.py",
        'if file.metadata() == {"key": key} else None',
        "if key else None",
        STOP,
    ),
    Mutant(
        "the best student is not put back",
        "engines/distill/trainer.py",
        "        stop.restore()\n",
        "",
        STOP,
    ),
    Mutant(
        "the newest of equals is the best",
        "engines/distill/early_stop.py",
        "return min(known, key",
        "return min(reversed(known), key",
        STOP,
    ),
    Mutant(
        "patience ends one evaluation early",
        "engines/distill/early_stop.py",
        "+ (\n            self.settings.patience\n        )",
        "+ (\n            self.settings.patience - 1\n        )",
        STOP,
    ),
)
