"""Student and fake score as full copies, or as adapters on the teacher's own weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.denoiser import Conditioning, NetworkDenoiser
from engines.distill.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from engines.distill.config import LoraSettings, parse_config
from engines.distill.prompts import load_prompt_bank
from engines.distill.roles import Roles, separate_roles, shared_roles
from engines.distill.student import load_teacher
from engines.distill.trainer import Trainer, distill
from engines.errors import ConfigError
from engines.families.pixart import STEPS_EMBEDDING_KEY, load_transformer
from engines.schedule import NoiseSchedule, flow_schedule
from tests.engines.distilling import config_of, quiet, settings, student_weights
from tests.engines.tiny import make_tiny_checkpoint

LORA = {"rank": 4, "alpha": 8}


def query(steps: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    cond = Conditioning(
        torch.randn(2, 20, 32, generator=generator), torch.ones(2, 20), torch.full((2,), steps)
    )
    return torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([999, 249]), cond


def shared(teacher: Path, **changes: Any) -> tuple[Roles, NoiseSchedule]:
    loaded = load_teacher(teacher)
    lora = LoraSettings(**{**LORA, **changes})
    roles = shared_roles(loaded, lora, max_num_steps=4, zero_row=4, autocast=None, seed=0)
    return roles, loaded.schedule


def trainer_of(teacher: Path, out: Path, **changes: Any) -> Trainer:
    config = config_of(teacher, out, **changes)
    return Trainer(config, load_teacher(teacher), load_prompt_bank(config))


def run(trainer: Trainer, iterations: int) -> None:
    for _ in range(iterations):
        trainer.step()
        trainer.state.iteration += 1


def test_untrained_adapters_change_nothing(teacher: Path) -> None:
    separate = separate_roles(load_teacher(teacher), max_num_steps=4, zero_row=4, autocast=None)
    roles, _ = shared(teacher)
    latents, timesteps, cond = query()
    with torch.no_grad():
        expected = separate.teacher(latents, timesteps, cond)
        for role in (roles.student, roles.teacher, roles.fake_score):
            torch.testing.assert_close(role(latents, timesteps, cond), expected)


def test_only_adapters_and_steps_learn(teacher: Path) -> None:
    roles, _ = shared(teacher)
    for named in roles.parameters.values():
        assert {key.rpartition(".lora_")[2][:1] for key in named if ".lora_" in key} == {"A", "B"}
        assert sum(".lora_" not in key for key in named) == 1
    sizes = [sum(value.numel() for value in named.values()) for named in roles.parameters.values()]
    whole = sum(value.numel() for value in load_transformer(teacher).parameters())
    assert sizes[0] == sizes[1] < whole / 4


def test_teacher_stays_while_both_learners_move(teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_of(teacher, tmp_path / "out", lora=LORA)
    latents, timesteps, cond = query()
    roles = trainer.roles
    with torch.no_grad():
        before = roles.teacher(latents, timesteps, cond)
    run(trainer, 2)
    with torch.no_grad():
        assert torch.equal(roles.teacher(latents, timesteps, cond), before)
        student, fake = (role(latents, timesteps, cond) for role in (roles.student, roles.fake_score))
    assert not torch.equal(student, before)
    assert not torch.equal(fake, before)
    assert not torch.equal(student, fake)
    for named in roles.parameters.values():
        assert not named[STEPS_EMBEDDING_KEY][4].any()
        assert named[STEPS_EMBEDDING_KEY][1].any()


def test_merged_student_is_the_network_with_its_adapters(teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_of(teacher, tmp_path / "out", lora=LORA, autocast="none")
    run(trainer, 2)
    latents, timesteps, cond = query()
    with torch.no_grad():
        expected = trainer.roles.student(latents, timesteps, cond)
    merged = separate_roles(load_teacher(teacher), max_num_steps=4, zero_row=4, autocast=None).student
    merged.network.load_state_dict(trainer.roles.export(trainer.roles.parameters["student"]))
    with torch.no_grad():
        torch.testing.assert_close(merged(latents, timesteps, cond), expected, atol=1e-5, rtol=1e-4)


def test_student_of_adapters_is_written_merged_and_opens(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    distill(config_of(teacher, out, lora=LORA), quiet())
    keys = load_transformer(teacher).state_dict().keys()
    assert student_weights(out).keys() == {*keys, STEPS_EMBEDDING_KEY}
    assert isinstance(load_transformer(out / "student"), torch.nn.Module)


def test_interrupted_run_with_adapters_resumes_with_the_same_numbers(teacher: Path, tmp_path: Path) -> None:
    for name, iterations in (("whole", [6]), ("halves", [4, 6])):
        for end in iterations:
            trainer = trainer_of(teacher, tmp_path / name, lora=LORA)
            newest = latest_checkpoint(tmp_path / name / "checkpoints")
            if newest is not None:
                load_checkpoint(newest, trainer.state, trainer.config.numerics())
            run(trainer, end - trainer.state.iteration)
            save_checkpoint(tmp_path / name / "checkpoints", trainer.state, trainer.config.numerics(), keep=2)
    ends = [latest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "halves")]
    whole, halves = ((path / "state.safetensors").read_bytes() for path in ends if path is not None)
    assert whole == halves


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradient_checkpointing_changes_no_number(
    teacher: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    states = []
    for checkpointing in (False, True):
        trainer = trainer_of(
            teacher, tmp_path / str(checkpointing), lora=lora, gradient_checkpointing=checkpointing
        )
        run(trainer, 2)
        states.append(trainer.state.parameters["student"])
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected, atol=1e-6, rtol=1e-5)


def test_a_bfloat16_base_carries_adapters_that_learn_in_float32(teacher: Path, tmp_path: Path) -> None:
    config = config_of(teacher, tmp_path / "out", lora=LORA, teacher_dtype="bfloat16")
    trainer = Trainer(config, load_teacher(teacher, torch.bfloat16), load_prompt_bank(config))
    run(trainer, 2)
    assert {value.dtype for value in trainer.state.parameters["student"].values()} == {torch.float32}
    assert all(value.isfinite().all() for value in trainer.roles.export(trainer.state.average).values())


def test_targets_that_no_layer_has_are_refused(teacher: Path) -> None:
    with pytest.raises(ConfigError, match="to_everything"):
        shared(teacher, targets=("to_everything",))


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"teacher_dtype": "bfloat16"}, "for lora"), ({"lora": LORA, "fake_pull": 0.1}, "fake_pull")],
)
def test_settings_that_contradict_adapters_are_refused(
    teacher: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config(settings(teacher, tmp_path / "out", **changes), "run.yaml")


def test_eight_bit_optimizer_without_its_library_says_what_to_install(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bitsandbytes"):
        trainer_of(teacher, tmp_path / "out", optimizer="adamw8bit")


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"divergence": "fisher", "guidance_scale": 2.0}},
        {"objective": {"guidance_tau": "later", "intervals": "overlapping", "fake_anchor": 0.02}},
        {"objective": {"random_landing": True, "fake_target": "exact"}},
        {"fake_pull": 0.05, "grid_jitter": 0.3},
        {"grid_timesteps": 900, "num_steps": {4: 1.0, 3: 1.0}},
        {"timesteps": {4: [999, 856, 665, 399]}},
    ],
)
def test_every_switch_trains(teacher: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = trainer_of(teacher, tmp_path / "out", **changes)
    before = {key: value.detach().clone() for key, value in trainer.state.parameters["student"].items()}
    run(trainer, 2)
    after = trainer.state.parameters["student"]
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"timesteps": {4: [999, 500, 600, 100]}}, "strictly falling"),
        ({"timesteps": {4: [1200, 500, 300, 100]}}, "1200"),
        ({"timesteps": {3: [999, 500, 300]}}, "not in num_steps"),
    ],
)
def test_timesteps_that_cannot_be_visited_are_refused(
    teacher: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        trainer_of(teacher, tmp_path / "out", **changes)


def test_epsilon_models_are_not_started_where_they_cannot_say_their_x0(tmp_path: Path) -> None:
    teacher = make_tiny_checkpoint(
        tmp_path / "teacher", student=False, scheduler_config={"prediction_type": "epsilon"}
    )
    with pytest.raises(ConfigError, match="grid_timesteps"):
        trainer_of(teacher, tmp_path / "out")
    run(trainer_of(teacher, tmp_path / "out", grid_timesteps=900), 1)


def test_network_denoiser_is_told_a_flows_time(teacher: Path) -> None:
    loaded = load_teacher(teacher)
    told: list[Tensor] = []
    loaded.network.register_forward_pre_hook(
        lambda _module, _args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True
    )
    latents, timesteps, cond = query()
    NetworkDenoiser(loaded.network, flow_schedule(3.0), loaded.family.predict)(latents, timesteps, cond)
    torch.testing.assert_close(told[0], torch.tensor([1000.0, 500.0]))
