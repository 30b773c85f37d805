"""The baselines: consistency distillation, and distribution matching of points noised anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.denoiser import Conditioning, NetworkDenoiser
from engines.distill import forward, lcm, tdm, trajectory
from engines.distill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from engines.distill.config import parse_config
from engines.distill.latents import load_latents, read_latents, write_latents
from engines.distill.lcm import ConsistencyObjective
from engines.distill.objective import Objective
from engines.distill.prompts import load_prompt_bank
from engines.distill.student import load_teacher
from engines.distill.trainer import Trainer, distill
from engines.errors import ConfigError
from engines.families.pixart import STEPS_EMBEDDING_KEY
from engines.families.student import read_student
from engines.gate.painter import Painter
from engines.noise import seeded_latents
from engines.sampler import sample
from engines.schedule import CLEAN, NoiseSchedule
from tests.engines.distilling import PROMPTS, config_of, quiet, settings
from tests.engines.tiny import make_tiny_checkpoint

SCHEDULE = NoiseSchedule.from_config({"prediction_type": "v_prediction"})
OBJECTIVE = ConsistencyObjective()
SHAPE = (16, 8, 8)


def conditioning(batch: int) -> Conditioning:
    return Conditioning(torch.zeros(batch, 1, 1), torch.ones(batch, 1))


class GaussianTeacher:
    """Knows the x0 of data that is N(mean, std^2) everywhere."""

    schedule = SCHEDULE
    mean, std = 0.7, 0.4

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        alpha, sigma = self.schedule.at(timesteps, latents.ndim)
        share = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + share * (latents - alpha * self.mean)


class EndOfTrajectory(GaussianTeacher):
    """Where the teacher's ODE ends: it keeps how many standard deviations a point is off the mean."""

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        alpha, sigma = self.schedule.at(timesteps, latents.ndim)
        deviation = (alpha**2 * self.std**2 + sigma**2).sqrt()
        return self.mean + self.std / deviation * (latents - alpha * self.mean)


class Learner(nn.Module):
    """x0 = x times a number."""

    schedule = SCHEDULE

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return self.scale * latents


def noised(batch: int, *, skip: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    start, end = lcm.draw_ends(batch, 1000, ConsistencyObjective(skip=skip), rng)
    clean = 0.7 + 0.4 * torch.randn(batch, 4, 2, 2, generator=rng)
    alpha, sigma = SCHEDULE.at(start)
    return alpha * clean + sigma * torch.randn(clean.shape, generator=rng), start, end


# Consistency distillation


def test_consistency_function_of_clean_latents_is_the_latents() -> None:
    latents = torch.randn(2, 4, 2, 2)
    found = lcm.consistency(Learner(), latents, torch.full((2,), CLEAN), conditioning(2), OBJECTIVE)
    assert torch.equal(found, latents)


def test_where_samplers_look_the_consistency_function_is_the_networks_x0() -> None:
    c_skip, c_out = lcm.boundary(torch.arange(100, 1000), OBJECTIVE, 4)
    assert c_skip.shape == (900, 1, 1, 1)
    assert c_skip.max() < 1e-6
    assert (1 - c_out).abs().max() < 1e-6


@pytest.mark.parametrize("num_timesteps", [1000, 900])
def test_teacher_steps_cover_the_grid_from_its_last_timestep_to_clean_latents(num_timesteps: int) -> None:
    start, end = lcm.draw_ends(4000, num_timesteps, OBJECTIVE, torch.Generator().manual_seed(0))
    assert sorted(set(start.tolist())) == list(range(19, num_timesteps, 20))
    assert torch.equal(end, torch.where(start == 19, CLEAN, start - 20))


def test_teacher_step_is_one_step_of_the_guided_sampler(tmp_path: Path) -> None:
    teacher = load_teacher(make_tiny_checkpoint(tmp_path, student=False))
    denoiser = NetworkDenoiser(teacher.network, teacher.schedule, teacher.family.predict)
    encode = teacher.family.load_encoder(tmp_path)
    cond, uncond, latents = encode(PROMPTS[:1]), encode.unconditional(), seeded_latents([3], SHAPE)
    reached: list[Tensor] = []
    sample(
        denoiser, latents, [999, 979], cond, guidance_scale=3.0, uncond=uncond,
        on_step=lambda _, x0: reached.append(x0),
    )  # fmt: skip
    moved = lcm.teacher_step(denoiser, latents, torch.tensor([999]), torch.tensor([979]), cond, uncond, 3.0)
    query = forward.Query(moved, torch.tensor([979]), moved, moved, moved)
    with torch.no_grad():
        again = tdm.guided_x0(denoiser, query, cond, uncond, 3.0)
    torch.testing.assert_close(again, reached[1])


@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_the_end_of_the_teachers_trajectory_is_the_consistent_function(loss: Any) -> None:
    objective = ConsistencyObjective(loss=loss)
    teacher, cond, points = GaussianTeacher(), conditioning(512), noised(512)
    found = {
        type(model).__name__: lcm.consistency_loss(
            model, model, teacher, points, cond, cond.rows(slice(0, 1)), 1.0, objective
        )[0].mean()
        for model in (EndOfTrajectory(), GaussianTeacher())
    }
    assert found["EndOfTrajectory"] < 0.1 * found["GaussianTeacher"]


@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_consistency_loss_is_the_distance_of_both_ends(loss: Any) -> None:
    """Of a target that answers each end with its timestep, so that it is seen which one it was asked for."""

    class Clock(Learner):
        def forward(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
            return torch.ones_like(latents) * timesteps.view(-1, 1, 1, 1) / 1000

    objective = ConsistencyObjective(loss=loss, huber_c=0.1, skip=200)
    latents, start = torch.zeros(3, 4, 2, 2), torch.tensor([999, 799, 599])
    points, cond, uncond = (latents, start, start - 200), conditioning(3), conditioning(1)
    rows, distance = lcm.consistency_loss(
        Clock(), Clock(), GaussianTeacher(), points, cond, uncond, 1.0, objective
    )
    torch.testing.assert_close(distance, torch.full((3,), 0.2))
    wanted = 0.04 if loss == "l2" else (0.04 + 0.01) ** 0.5 - 0.1
    torch.testing.assert_close(rows, torch.full((3,), wanted))


def test_only_the_student_gets_a_gradient() -> None:
    student, target = Learner(), Learner()
    rows, distance = lcm.consistency_loss(
        student, target, GaussianTeacher(), noised(8), conditioning(8), conditioning(1), 2.0, OBJECTIVE
    )
    assert rows.shape == distance.shape == (8,)
    rows.mean().backward()
    assert student.scale.grad is not None
    assert student.scale.grad != 0
    assert target.scale.grad is None


@pytest.mark.parametrize("change", [{"skip": 0}, {"loss": "l1"}, {"huber_c": 0.0}, {"sigma": 1.0}])
def test_consistency_settings_out_of_range_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    values = settings(tmp_path, tmp_path / "out", method="lcm", latents="demo", consistency=change)
    with pytest.raises(ConfigError, match="consistency"):
        parse_config(values, "run.yaml")


# Runs


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    write_latents(path, seeded_latents(range(3), SHAPE), PROMPTS)
    return path


def trainer_of(teacher: Path, out: Path, **changes: Any) -> Trainer:
    config = config_of(teacher, out, **changes)
    clean = load_latents(config, SHAPE)
    bank = load_prompt_bank(config, prompts=None if clean is None else clean.prompts)
    return Trainer(config, load_teacher(teacher), bank, None if clean is None else clean.latents)


def run(trainer: Trainer, iterations: int) -> None:
    for _ in range(iterations):
        trainer.step()
        trainer.state.iteration += 1


def test_consistency_distillation_makes_a_student_like_any_other(
    teacher: Path, latents: Path, tmp_path: Path
) -> None:
    config = config_of(teacher, tmp_path / "out", method="lcm", latents=str(latents), ema_decay=0.95)
    student = read_student(distill(config, quiet()))
    assert (student.solver, student.num_steps) == ("ddim", (1, 2, 4))
    assert Painter(config.out / "student")(PROMPTS[:2], [0, 1], num_steps=2).shape == (2, 64, 64, 3)
    recorded = json.loads((config.out / "student" / "student.json").read_text())["training"]
    assert recorded["method"] == "lcm"
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert all({"student_loss", "distance"} < line.keys() for line in lines)
    assert not any("fake_loss" in line for line in lines)
    assert {label for line in lines for label in line["distance"]} == {"4.1", "4.2", "4.3", "4.4"}


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_target_is_the_average_and_neither_it_nor_the_teacher_learns(
    teacher: Path, latents: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    trainer = trainer_of(
        teacher, tmp_path / "out", method="lcm", latents=str(latents), lora=lora, autocast="none"
    )
    noise = seeded_latents([5], SHAPE)
    cond = replace(trainer.bank.rows(torch.tensor([0])), num_steps=torch.tensor([4]))
    at = (noise, torch.tensor([999]), cond)
    roles, state = trainer.roles, trainer.state
    assert list(state.parameters) == ["student"]
    with torch.no_grad():
        before = roles.teacher(*at)
        for role in (roles.student, roles.fake_score):
            torch.testing.assert_close(role(*at), before)
    run(trainer, 3)
    with torch.no_grad():
        assert torch.equal(roles.teacher(*at), before)
        student, target = roles.student(*at), roles.fake_score(*at)
    assert not torch.equal(student, before)
    assert not torch.equal(target, before)
    assert not torch.equal(target, student)
    for key, value in roles.parameters["fake_score"].items():
        assert value.data_ptr() == state.average[key].data_ptr()
        assert value.grad is None
    assert not state.average[STEPS_EMBEDDING_KEY].any()


def test_consistency_asks_the_guided_teacher_and_the_average(
    teacher: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    loss = lcm.consistency_loss

    def recording(student: Any, target: Any, teacher: Any, noised: Any, *rest: Any) -> Any:
        asked.append((student, target, teacher, rest[2], rest[3]))
        return loss(student, target, teacher, noised, *rest)

    monkeypatch.setattr(lcm, "consistency_loss", recording)
    trainer = trainer_of(
        teacher,
        tmp_path / "out",
        method="lcm",
        latents=str(latents),
        objective={"guidance_scale": 2.5},
        consistency={"skip": 50},
    )
    run(trainer, 1)
    roles = trainer.roles
    assert asked == [
        (roles.student, roles.fake_score, roles.teacher, 2.5, ConsistencyObjective(skip=50)),
    ]


def test_interrupted_consistency_distillation_resumes_with_the_same_numbers(
    teacher: Path, latents: Path, tmp_path: Path
) -> None:
    states = []
    for name, ends in (("whole", [4]), ("halves", [2, 4])):
        for end in ends:
            trainer = trainer_of(teacher, tmp_path / name, method="lcm", latents=str(latents))
            checkpoints = tmp_path / name / "checkpoints"
            newest = latest_checkpoint(checkpoints)
            if newest is not None:
                load_checkpoint(newest, trainer.state, trainer.config.numerics())
            run(trainer, end - trainer.state.iteration)
            save_checkpoint(checkpoints, trainer.state, trainer.config.numerics(), keep=2)
        states.append((tmp_path / name / "checkpoints" / "00000004" / "state.safetensors").read_bytes())
    assert states[0] == states[1]


def test_latents_of_scenes_are_encoded_pictures_with_their_captions(teacher: Path, tmp_path: Path) -> None:
    config = config_of(teacher, tmp_path / "out", method="lcm", latents="demo", num_prompts=6)
    made, again = load_latents(config, SHAPE), load_latents(config, SHAPE)
    assert made is not None
    assert again is not None
    assert (tuple(made.latents.shape), made.latents.dtype) == ((6, *SHAPE), torch.float16)
    assert len(set(made.prompts)) == 6
    assert made.prompts == again.prompts
    assert torch.equal(made.latents, again.latents)
    with pytest.raises(ConfigError, match=r"scenes give rows of \(16, 8, 8\), not \(16, 16, 16\)"):
        load_latents(config, (16, 16, 16))


def test_latents_that_do_not_fit_are_refused(latents: Path, tmp_path: Path) -> None:
    found = read_latents(latents, SHAPE, 2)
    assert (len(found.latents), found.prompts) == (2, PROMPTS[:2])
    with pytest.raises(ConfigError, match=r"rows of \(16, 8, 8\), the teacher's are \(4, 8, 8\)"):
        read_latents(latents, (4, 8, 8), 9)
    with pytest.raises(ConfigError, match="cannot read"):
        read_latents(tmp_path / "missing.safetensors", SHAPE, 9)
    save_file({"latents": torch.zeros(2, *SHAPE)}, tmp_path / "bare.safetensors")
    with pytest.raises(ConfigError, match="one prompt per row"):
        read_latents(tmp_path / "bare.safetensors", SHAPE, 9)
    save_file({"other": torch.zeros(2, *SHAPE)}, tmp_path / "other.safetensors", {"prompts": '["a", "b"]'})
    with pytest.raises(ConfigError, match="latents"):
        read_latents(tmp_path / "other.safetensors", SHAPE, 9)
    with pytest.raises(ValueError, match="2 rows of latents and 1 prompts"):
        write_latents(tmp_path / "x.safetensors", torch.zeros(2, *SHAPE), ["a"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "lcm"}, "latents are needed by method lcm"),
        ({"latents": "demo"}, "latents are needed by method lcm, and by no other"),
        ({"method": "lcm", "latents": "demo", "fake_pull": 0.1}, "no fake score"),
        ({"method": "dmd2", "objective": {"points": "trajectory"}}, r'objective\.points must be "clean"'),
        ({"method": "gan"}, "method"),
    ],
)
def test_settings_that_contradict_the_method_are_refused(
    teacher: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config(settings(teacher, tmp_path / "out", **changes), "run.yaml")


# Points noised anew


def test_dmd2_is_a_preset_that_settings_win_over(teacher: Path, tmp_path: Path) -> None:
    plain = config_of(teacher, tmp_path / "out", method="dmd2", objective={"guidance_scale": 2.0})
    assert plain.fake_updates == 5
    assert (plain.objective.points, plain.objective.intervals) == ("clean", "overlapping")
    assert (plain.objective.huber_c, plain.objective.guidance_scale) == (0.0, 2.0)
    changed = config_of(
        teacher, tmp_path / "out", method="dmd2", objective={"huber_c": 1e-3}, fake_updates=10
    )
    assert (changed.fake_updates, changed.objective.huber_c) == (10, 1e-3)
    assert changed.objective.points == "clean"
    assert config_of(teacher, tmp_path / "out").objective == Objective()


def test_dmd2_compares_predictions_at_every_level(teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_of(teacher, tmp_path / "out", method="dmd2", batch_size=4)
    objective, schedule = trainer.config.objective, trainer.roles.teacher.schedule
    last = trajectory.StudentStep(
        x0=torch.zeros(512, *SHAPE),
        eps=torch.zeros(512, *SHAPE),
        landing=torch.ones(512, *SHAPE),
        timesteps=torch.full((512,), 499),
        next_timesteps=torch.full((512,), 249),
        cond=conditioning(512),
        first=torch.zeros(512, dtype=torch.bool),
    )
    query = forward.draw_query(
        forward.matched(last, objective), schedule, objective, torch.Generator().manual_seed(0)
    )
    assert query.tau.min() < 50
    assert query.tau.max() > 950
    alpha, sigma = schedule.at(query.tau)
    torch.testing.assert_close((query.a, query.b), (alpha, sigma))
    run(trainer, 1)
    steps = trainer.state.optimizers["fake_score"].state.values()
    assert {float(moments["step"]) for moments in steps} == {5.0}


def test_checkpoints_from_before_a_setting_existed_are_read_with_its_default(
    teacher: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(teacher, tmp_path / "out")
    now = trainer.config.numerics()
    before = {key: value for key, value in now.items() if key not in ("method", "latents", "consistency")}
    before["objective"] = {key: value for key, value in now["objective"].items() if key != "divergence"}
    saved = save_checkpoint(tmp_path / "out" / "checkpoints", trainer.state, before, keep=1)
    load_checkpoint(saved, trainer.state, now)
