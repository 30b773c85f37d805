"""Distillation from the first iteration to the student's directory: resumed, stopped, refused."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from safetensors.torch import load_file
from torch import Tensor

from engines.denoiser import Conditioning
from engines.distill import tdm, trajectory
from engines.distill.checkpoint import TrainingState, latest_checkpoint, load_checkpoint
from engines.distill.prompts import load_prompt_bank
from engines.distill.roles import step_aware_copy
from engines.distill.student import load_teacher
from engines.distill.trainer import Trainer, distill
from engines.distill.updates import update_average
from engines.errors import CheckpointError, TrainingError
from engines.families.pixart import STEPS_EMBEDDING_KEY, load_encoder, load_transformer
from tests.engines.distilling import PROMPTS, config_of, quiet, settings, student_weights, trainer_of
from tests.engines.tiny import MAX_TEXT_TOKENS, make_tiny_checkpoint

# Prompts


def test_prompts_are_encoded_as_diffusers_encodes_them(teacher: Path) -> None:
    pipeline = PixArtAlphaPipeline.from_pretrained(teacher, dtype=torch.float32)
    text, mask, empty_text, empty_mask = pipeline.encode_prompt(
        PROMPTS, negative_prompt="", clean_caption=False, max_sequence_length=MAX_TEXT_TOKENS
    )
    encode = load_encoder(teacher)
    ours, empty = encode(PROMPTS), encode.unconditional()
    assert encode.max_tokens == MAX_TEXT_TOKENS
    torch.testing.assert_close(ours.text, text, atol=1e-5, rtol=0)
    assert torch.equal(ours.mask, mask)
    torch.testing.assert_close(empty.text, empty_text[:1], atol=1e-5, rtol=0)
    assert torch.equal(empty.mask, empty_mask[:1])


def test_prompt_cache_follows_the_prompts(tmp_path: Path, teacher: Path) -> None:
    config = config_of(teacher, tmp_path / "out")
    bank = load_prompt_bank(config)
    cache = config.out / "prompts.safetensors"
    written = cache.stat().st_mtime_ns
    assert torch.equal(load_prompt_bank(config).prompts.text, bank.prompts.text)
    assert cache.stat().st_mtime_ns == written
    assert isinstance(config.prompts, Path)
    config.prompts.write_text("a white cone\n")
    assert len(load_prompt_bank(config).prompts) == 1


# Student


def test_untrained_student_is_its_teacher(teacher: Path) -> None:
    loaded = load_teacher(teacher)
    network, student = loaded.network, step_aware_copy(loaded, 4, zero_row=4)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.ones(2, 20, 32),
        "timestep": torch.tensor([999, 249]),
    }
    sizes = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        ours = student(**inputs, added_cond_kwargs={**sizes, "num_steps": torch.tensor([1, 2])}).sample
        theirs = network(**inputs, added_cond_kwargs=sizes).sample
    assert torch.equal(ours, theirs)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_student_is_refused_as_teacher(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="student already"):
        load_teacher(make_tiny_checkpoint(tmp_path, student=True))


# Training


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The out directory of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert distill(config_of(teacher, out), quiet()) == out / "student"
    return out


def test_student_directory_opens_in_diffusers_and_samples_as_its_default(finished: Path) -> None:
    pipeline = PixArtAlphaPipeline.from_pretrained(finished / "student", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        "a red cube",
        num_inference_steps=4,
        guidance_scale=1.0,
        clean_caption=False,
        use_resolution_binning=False,
        output_type="np",
    )
    assert output.images.shape == (1, 64, 64, 3)


def test_student_json_says_how_to_sample(finished: Path) -> None:
    student = json.loads((finished / "student" / "student.json").read_text())
    assert student["num_steps"] == [1, 2, 4]
    assert student["timesteps"] == {"1": [999], "2": [999, 499], "4": [999, 749, 499, 249]}
    assert (student["height"], student["width"], student["max_text_tokens"]) == (64, 64, 20)
    assert student["guidance_scale"] == 1.0
    assert student["training"]["settings"]["iterations"] == 6
    assert student["gate"] is None


def test_student_ships_fp16_with_a_zero_row_for_its_default_steps(finished: Path, teacher: Path) -> None:
    weights = student_weights(finished)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    steps = weights[STEPS_EMBEDDING_KEY]
    assert steps.shape[0] == 5
    assert not steps[[0, 3, 4]].any()
    assert steps[1].any()
    assert steps[2].any()
    before = load_transformer(teacher).state_dict()["proj_out.weight"]
    assert not torch.equal(load_transformer(finished / "student").state_dict()["proj_out.weight"], before)


def test_metrics_cover_every_step_of_every_k(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    seen = {label for line in lines for label in line["distance"]}
    assert seen == {"1.1", "2.1", "2.2", "4.1", "4.2", "4.3", "4.4"}
    assert all(math.isfinite(line["fake_loss"]) and line["student_grad_norm"] > 0 for line in lines)


def test_old_checkpoints_are_deleted(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["00000004", "00000006"]


@pytest.mark.slow
def test_killed_run_resumes_with_the_same_numbers(finished: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(teacher, out, iterations=6, log_every=1)))
    command = [sys.executable, "-c", _DISTILL, str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.lstrip().startswith("3/6"):  # one iteration beyond a checkpoint
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    assert newest.name in {"00000002", "00000004"}

    distill(config_of(teacher, out, log_every=1), quiet())
    expected, resumed = student_weights(finished), student_weights(out)
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    iterations = [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert iterations == [1, 2, 3, 4, 5, 6]


_DISTILL = """
import sys
from pathlib import Path
from rich.console import Console
from engines.distill.config import read_config
from engines.distill.trainer import distill

class Flushing:
    def write(self, text): sys.stdout.write(text); sys.stdout.flush()
    def flush(self): sys.stdout.flush()

distill(read_config(Path(sys.argv[1])), Console(file=Flushing(), force_terminal=False))
"""


def test_finished_run_only_writes_its_student_again(finished: Path, teacher: Path) -> None:
    before = student_weights(finished)
    distill(config_of(teacher, finished), quiet())
    after = student_weights(finished)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_resuming_with_other_settings_is_refused_by_name(finished: Path, teacher: Path) -> None:
    with pytest.raises(CheckpointError, match=r"student_lr was 0\.001, now 0\.5"):
        distill(config_of(teacher, finished, student_lr=0.5), quiet())


def test_damaged_checkpoint_is_refused(finished: Path, teacher: Path, tmp_path: Path) -> None:
    config = config_of(teacher, tmp_path / "out")
    damaged = tmp_path / "00000006"
    damaged.mkdir()
    newest = latest_checkpoint(finished / "checkpoints")
    assert newest is not None
    (damaged / "state.json").write_bytes((newest / "state.json").read_bytes())
    (damaged / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(damaged, trainer_of(config).state, config.numerics())


def test_non_finite_loss_stops_with_the_state_saved(tmp_path: Path, teacher: Path) -> None:
    config = config_of(teacher, tmp_path / "out")
    trainer = trainer_of(config)
    text = trainer.bank.prompts.text.clone().fill_(math.nan)
    trainer.bank = type(trainer.bank)(Conditioning(text, trainer.bank.prompts.mask), trainer.bank.uncond, 20)
    with pytest.raises(TrainingError, match=r"fake_score: loss nan.*iteration 1"):
        trainer.train(quiet())
    saved = latest_checkpoint(config.out / "checkpoints")
    assert saved is not None
    assert all(tensor.isfinite().all() for tensor in load_file(saved / "state.safetensors").values())


class Signalled(Trainer):
    """Gets a SIGTERM in the middle of each iteration."""

    def step(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super().step()


def test_stop_signal_finishes_the_iteration_and_saves(tmp_path: Path, teacher: Path) -> None:
    config = config_of(teacher, tmp_path / "out", checkpoint_every=100)
    trainer = Signalled(config, load_teacher(config.teacher), load_prompt_bank(config))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(quiet())
    assert signal.getsignal(signal.SIGTERM) is handler
    newest = latest_checkpoint(config.out / "checkpoints")
    assert newest is not None
    assert newest.name == "00000001"


def test_student_moves_and_teacher_does_not(tmp_path: Path, teacher: Path) -> None:
    trainer = trainer_of(config_of(teacher, tmp_path / "out", fake_updates=2))
    before = {key: value.clone() for key, value in trainer.roles.teacher.network.state_dict().items()}
    for _ in range(2):
        trainer.step()
        trainer.state.iteration += 1
    after = trainer.roles.teacher.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for network in (trainer.roles.student.network, trainer.roles.fake_score.network):
        assert not torch.equal(network.state_dict()["proj_out.weight"], before["proj_out.weight"])
        assert not network.state_dict()[STEPS_EMBEDDING_KEY][4].any()


class Recorded:
    """What student steps of trainers were asked for and made of it, as long as the test runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noise: list[Tensor] = []
        self.visited: list[Tensor] = []
        self.steps: list[trajectory.StudentStep] = []
        original = trajectory.student_step

        def recording(
            student: Any, noise: Tensor, cond: Any, visited: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.noise.append(noise)
            self.visited.append(visited)
            self.steps.append(original(student, noise, cond, visited, *args, **kwargs))
            return self.steps[-1]

        monkeypatch.setattr(trajectory, "student_step", recording)


def run(trainer: Trainer, iterations: int) -> None:
    for _ in range(iterations):
        trainer.step()
        trainer.state.iteration += 1


def test_draws_depend_on_seed_and_iteration_and_on_nothing_else(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    for seed in (0, 0, 1):
        run(trainer_of(config_of(teacher, tmp_path / "out", seed=seed, batch_size=2)), 2)
    first, second, again, _, other, other_second = recorded.noise
    assert torch.equal(first, again)
    drawn = torch.stack([first, second, other, other_second]).flatten(1)
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.2


def test_steps_follow_the_grid_unless_it_is_jittered_or_they_land_at_random(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    changes: list[dict[str, Any]] = [{}, {"grid_jitter": 0.4}, {"objective": {"random_landing": True}}]
    for change in changes:
        run(trainer_of(config_of(teacher, tmp_path / "out", num_steps={4: 1.0}, **change)), 1)
    grid = torch.tensor([999, 749, 499, 249, -1])
    plain, jittered, landed = recorded.steps
    assert bool((recorded.visited[0] == grid).all())
    assert bool(torch.isin(plain.next_timesteps, grid).all())
    moved = (recorded.visited[1] != grid).float().mean(dim=0)
    assert moved[0] == moved[4] == 0.0
    assert bool((moved[1:4] > 0.5).all())
    assert bool(torch.isin(jittered.timesteps, recorded.visited[1]).all())
    assert bool((recorded.visited[2] == grid).all())
    assert bool((~torch.isin(landed.next_timesteps, grid)).any())


@pytest.mark.parametrize("fake_updates", [1, 3])
def test_fake_score_sees_the_student_as_often_as_asked_before_the_student_learns(
    fake_updates: int, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config_of(teacher, tmp_path / "out", fake_updates=fake_updates))
    happened: list[str] = []

    def told(word: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def telling(*args: Any, **kwargs: Any) -> Any:
            happened.append(word)
            return call(*args, **kwargs)

        return telling

    for name, optimizer in trainer.state.optimizers.items():
        monkeypatch.setattr(optimizer, "step", told(f"{name} learns", optimizer.step))
        monkeypatch.setattr(tdm, f"{name}_loss", told(f"{name} asked", getattr(tdm, f"{name}_loss")))
    run(trainer, 2)
    fake, student = ([f"{name} asked", f"{name} learns"] for name in ("fake_score", "student"))
    assert happened == [*fake * fake_updates, *student] * 2


def test_pulled_fake_score_meets_the_student(teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(teacher, tmp_path / "out", fake_pull=1.0))
    run(trainer, 1)
    student, fake = (trainer.state.parameters[name] for name in ("student", "fake_score"))
    assert all(torch.equal(student[key], fake[key]) for key in student)


def test_both_learners_have_their_own_rates_momentum_and_decay(teacher: Path, tmp_path: Path) -> None:
    """In iteration 1 of a warm-up of 10, hence at a fifth of their peaks."""
    config = config_of(
        teacher, tmp_path / "out", iterations=100, weight_decay=0.03, betas=(0.2, 0.9), warmup_iterations=10
    )
    trainer = trainer_of(config)
    run(trainer, 2)
    for name, peak in (("student", 1e-3), ("fake_score", 3e-3)):
        others, steps = trainer.state.optimizers[name].param_groups
        assert [value.data_ptr() for value in steps["params"]] == [
            trainer.state.parameters[name][STEPS_EMBEDDING_KEY].data_ptr()
        ]
        assert (others["lr"], steps["lr"]) == pytest.approx((0.2 * peak, 0.2 * 1e-2))
        assert (others["weight_decay"], steps["weight_decay"]) == (0.03, 0.0)
        assert others["betas"] == steps["betas"] == (0.2, 0.9)


def test_gradients_are_clipped_to_one_norm_over_a_whole_network(teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(teacher, tmp_path / "out", clip_norm=1e-4))
    run(trainer, 1)
    for named in trainer.state.parameters.values():
        gradients = [value.grad for value in named.values() if value.grad is not None]
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        assert norm.item() == pytest.approx(1e-4, rel=1e-2)
    before = trainer.meter.flush(trainer.world)
    assert min(float(str(before[key])) for key in ("fake_grad_norm", "student_grad_norm")) > 1e-3


def test_gradient_that_is_not_finite_changes_nothing_though_the_loss_is(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config_of(teacher, tmp_path / "out"))
    named = trainer.state.parameters["fake_score"]
    before = {key: value.detach().clone() for key, value in named.items()}
    weight = named["proj_out.weight"]
    monkeypatch.setattr(
        tdm, "fake_score_loss", lambda *_, **__: (weight - weight.detach()).square().sum().sqrt()
    )
    with pytest.raises(TrainingError, match=r"fake_score: loss 0\.0, gradient norm nan in iteration 1"):
        trainer.step()
    assert all(torch.equal(before[key], value) for key, value in named.items())


@pytest.mark.parametrize(("iteration", "moved"), [(0, 0.9), (90, 0.09), (10_000, 0.01)])
def test_average_forgets_the_teacher_first_and_then_keeps_to_its_decay(iteration: int, moved: float) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    state = TrainingState({"student": {"weight": weight}}, {}, {"weight": torch.zeros(2)}, iteration)
    update_average(state, 0.99)
    assert state.average["weight"].tolist() == pytest.approx([moved] * 2)


def test_student_ships_the_average_of_its_weights_and_not_the_last_ones(
    finished: Path, teacher: Path
) -> None:
    trainer = trainer_of(config_of(teacher, finished))
    newest = latest_checkpoint(finished / "checkpoints")
    assert newest is not None
    load_checkpoint(newest, trainer.state, trainer.config.numerics())
    written, exported = student_weights(finished), trainer.roles.export(trainer.state.average)
    assert written.keys() == exported.keys() == trainer.state.average.keys()
    for key, average in trainer.state.average.items():
        assert torch.equal(exported[key], average)
        assert torch.equal(written[key], average.half())
    last = trainer.state.parameters["student"]["proj_out.weight"]
    assert not torch.equal(written["proj_out.weight"], last.half())
