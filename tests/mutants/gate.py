"""Changes to what a student is measured by, and to what it must reach."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

SAMPLES = "tests/engines/test_samples.py"
VERDICT = (
    "tests/engines/test_gate.py tests/engines/test_gate_verdict.py tests/engines/test_gate_distances.py "
    "-k not gate_measures and not stopped_gate and not command"
)
OWN = "tests/engines/test_gate_own.py -k has_to_stay or without_the_rows or reference_is"
FAMILIES = "tests/engines/test_distill_families.py -k painter"

MUTANTS = (
    # the gate
    Mutant(
        "the teacher is measured as the student",
        "engines/gate/evaluator.py",
        'config.teacher if source == "teacher" else config.student,',
        "config.teacher,",
        VERDICT,
    ),
    Mutant(
        "every sampler starts from noise of its own",
        "engines/gate/evaluator.py",
        "prompts.captions, noise_seeds(prompts.seed, len(prompts.captions)))",
        "prompts.captions, noise_seeds(prompts.seed + row.num_steps, len(prompts.captions)))",
        VERDICT,
    ),
    Mutant(
        "a student may lose any accuracy",
        "engines/gate/verdict.py",
        "more.lowest >= -MAX_LOSS_POINTS",
        "more.lowest >= -100 * MAX_LOSS_POINTS",
        VERDICT,
    ),
    Mutant(
        "a student may be farther from real renders",
        "engines/gate/verdict.py",
        "passed=apart.highest < 0.0",
        "passed=apart.highest < 99.0",
        VERDICT,
    ),
    # the gate's measures
    Mutant(
        "all copies of a prompt are one picture",
        "engines/gate/evaluator.py",
        "noise_seeds(prompts.seed, len(captions), start=50_000)",
        "[prompts.seed] * len(captions)",
        VERDICT,
    ),
    Mutant(
        "copies of a prompt start from the noise that was measured already",
        "engines/gate/evaluator.py",
        "noise_seeds(prompts.seed, len(captions), start=50_000)",
        "noise_seeds(prompts.seed, len(captions))",
        VERDICT,
    ),
    Mutant(
        "the gate samples an even grid, whatever was trained",
        "engines/gate/painter.py",
        "if not self.visited:",
        "if self.denoiser:",
        FAMILIES,
    ),
    Mutant(
        "the gate tells the student that it takes four steps",
        "engines/gate/painter.py",
        "torch.full((len(cond),), num_steps, device",
        "torch.full((len(cond),), 4, device",
        SAMPLES,
    ),
    Mutant(
        "the gate's teacher draws without guidance",
        "engines/gate/painter.py",
        "guidance_scale=guidance_scale, uncond=uncond)",
        "uncond=uncond)",
        SAMPLES,
    ),
    Mutant(
        "what a teacher is worth is read without guidance",
        "engines/gate/evaluator.py",
        "num_steps=row.num_steps, guidance_scale=row.guidance_scale",
        "num_steps=row.num_steps, guidance_scale=1.0",
        VERDICT,
    ),
    Mutant(
        "every sampler of the gate takes four steps",
        "engines/gate/evaluator.py",
        "num_steps=row.num_steps, guidance_scale=row.guidance_scale",
        "num_steps=4, guidance_scale=row.guidance_scale",
        VERDICT,
    ),
    Mutant(
        "the teacher's reference pictures are unguided",
        "engines/gate/evaluator.py",
        'Row("", "", "teacher", max(self.config.teacher_steps), self.config.guidance_scale)',
        'Row("", "", "teacher", max(self.config.teacher_steps), 1.0)',
        OWN,
    ),
    Mutant(
        "every batch of the reference starts from the same noise",
        "engines/gate/evaluator.py",
        "noise_seeds(REFERENCE_SEED, len(rows.captions), start=start)",
        "noise_seeds(REFERENCE_SEED, len(rows.captions))",
        OWN,
    ),
    Mutant(
        "the reference is drawn from the gate's own prompts",
        "engines/gate/evaluator.py",
        "REFERENCE_SEED = 10_000",
        "REFERENCE_SEED = 0",
        VERDICT,
    ),
    Mutant(
        "a picture that shows half of what was asked counts",
        "engines/gate/evaluator.py",
        "right = [asked.shown_by(seen)",
        "right = [asked.num_objects == seen.num_objects",
        VERDICT,
    ),
    Mutant(
        "measurements of other timesteps are taken for this student's",
        "engines/gate/gate.py",
        '"student": [*measures, weights, sorted(student.timesteps.items())],',
        '"student": [*measures, weights],',
        VERDICT,
    ),
    Mutant(
        "measurements of other guidance are taken for this teacher's",
        "engines/gate/evaluator.py",
        'sorted(config.teacher.glob("*/*.safetensors"))), config.guidance_scale]',
        'sorted(config.teacher.glob("*/*.safetensors")))]',
        VERDICT,
    ),
    Mutant(
        "what a student has more by luck counts",
        "engines/gate/measurement.py",
        "return STUDENT_T[min(self.num_seeds, len(STUDENT_T) + 1) - 2] * self.error",
        "return 0.0",
        VERDICT,
    ),
    Mutant(
        "a student is not held to the teacher's guided steps of the same number",
        "engines/gate/verdict.py",
        'dict.fromkeys([f"teacher-{teacher_steps}-cfg", f"teacher-{num_steps}-cfg"])',
        'dict.fromkeys([f"teacher-{teacher_steps}-cfg"])',
        VERDICT,
    ),
    Mutant(
        "one criterion that is met is enough",
        "engines/gate/verdict.py",
        '"passed": all(criterion.passed',
        '"passed": any(criterion.passed',
        VERDICT,
    ),
    Mutant(
        "as often right as the teacher of equal cost is enough",
        "engines/gate/verdict.py",
        "criteria.append(Criterion(text, more.lowest > 0.0))",
        "criteria.append(Criterion(text, more.lowest >= 0.0))",
        VERDICT,
    ),
    Mutant(
        "an odd number of steps has a rival of half as many",
        "engines/gate/verdict.py",
        "if num_steps % 2 == 0 else []",
        "if num_steps else []",
        VERDICT,
    ),
    Mutant(
        "a guided step costs one evaluation",
        "engines/gate/measurement.py",
        "(1 if self.guidance_scale == 1.0 else 2)",
        "1",
        VERDICT,
    ),
    Mutant(
        "the difference from the teacher has the wrong sign",
        "engines/gate/measurement.py",
        "each = [a - b for",
        "each = [b - a for",
        VERDICT,
    ),
    Mutant(
        "the standard error is too small",
        "engines/gate/measurement.py",
        "statistics.stdev(each) / len(each) ** 0.5",
        "statistics.stdev(each) / len(each)",
        VERDICT,
    ),
    Mutant(
        "diversity is not that of real pictures",
        "engines/gate/verdict.py",
        'by_key.get("real") or by_key.get(best)',
        "by_key.get(best)",
        VERDICT,
    ),
    Mutant(
        "a student of one's own may lose any score",
        "engines/gate/verdict.py",
        "apart.lowest >= -MAX_SCORE_POINTS",
        "apart.lowest >= -100 * MAX_SCORE_POINTS",
        OWN,
    ),
    Mutant(
        "a student of one's own may be far from its teacher",
        "engines/gate/verdict.py",
        "apart.highest <= MAX_FRECHET_POINTS",
        "apart.highest <= 100 * MAX_FRECHET_POINTS",
        OWN,
    ),
    Mutant(
        "variance that pictures lack does not count",
        "engines/gate/frechet.py",
        "covariance.trace() + other_covariance.trace() - 2.0 * shared",
        "covariance.trace() + other_covariance.trace() - covariance.trace() - other_covariance.trace()",
        VERDICT,
    ),
)
