"""Students of released weights: LoRA files of peft, diffusers and kohya, merged as peft merges them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.__main__ import main
from engines.compile.adopt import Adoption, adopt
from engines.errors import CheckpointError, ConfigError
from engines.families.lora import merge_lora, read_lora
from engines.families.student import read_student
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox

RANK, ALPHA = 3, 6.0


class Network(nn.Module):
    """Linear and convolutional layers with the kinds of names that networks of diffusers have."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 6)])})
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn1": attention})])
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)


def trained(network: nn.Module, **config: object) -> nn.Module:
    """The network with adapters by peft that have learnt something."""
    values = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["to_q", "to_out.0", "conv_in"],
        "init_lora_weights": False,
        **config,
    }
    model: nn.Module = get_peft_model(network, LoraConfig(**values))  # type: ignore[arg-type]
    return model


def merged_by_peft(model: nn.Module) -> dict[str, Tensor]:
    merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    return dict(merged.state_dict())


@pytest.fixture
def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


def check(file: Path, weights: dict[str, Tensor], expected: dict[str, Tensor], scale: float = 1.0) -> None:
    """What merging the file makes of the weights is what was expected, and differs from them."""
    merged = merge_lora(weights, read_lora(file), scale)
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(merged[key], weights[key]) for key in weights)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 1.5}}])
def test_file_of_peft_merges_as_peft_does(
    network: Network, tmp_path: Path, config: dict[str, object]
) -> None:
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    model = trained(network, **config)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    check(tmp_path / "adapter_model.safetensors", weights, merged_by_peft(model))


def rename(key: str, *, prefix: str, down: str, up: str) -> str:
    key = key.removeprefix("base_model.model.")
    return prefix + key.replace("lora_A.weight", down).replace("lora_B.weight", up)


def kohya(key: str) -> str:
    layer, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
    factor = {"A.weight": "down.weight", "B.weight": "up.weight"}[factor]
    return f"lora_unet_{layer.replace('.', '_')}.lora_{factor}"


NAMINGS: dict[str, Callable[[str], str]] = {
    "transformer": lambda key: rename(key, prefix="transformer.", down="lora_A.weight", up="lora_B.weight"),
    "named adapter": lambda key: rename(
        key, prefix="unet.", down="lora_A.student.weight", up="lora_B.student.weight"
    ),
    "before peft": lambda key: rename(key, prefix="unet.", down="lora.down.weight", up="lora.up.weight"),
    "bare": lambda key: rename(key, prefix="", down="lora_A.weight", up="lora_B.weight"),
    "kohya": kohya,
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_other_names_mean_the_same(network: Network, tmp_path: Path, naming: str) -> None:
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    model = trained(network)
    tensors = {NAMINGS[naming](key): value for key, value in get_peft_model_state_dict(model).items()}
    expected = merged_by_peft(model)
    file = tmp_path / "lora.safetensors"
    if naming == "kohya":
        layers = {key.partition(".")[0] for key in tensors}
        save_file(tensors | {f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}, file)
    else:  # alpha in the header, as diffusers writes it
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ALPHA})})
    check(file, weights, expected)


def test_file_that_says_nothing_has_alpha_equal_to_the_rank_and_the_scale_is_the_users(
    network: Network, tmp_path: Path
) -> None:
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    model = trained(network, lora_alpha=RANK * 0.125)
    save_file(get_peft_model_state_dict(model), tmp_path / "lora.safetensors")
    check(tmp_path / "lora.safetensors", weights, merged_by_peft(model), scale=0.125)


def test_names_of_old_attention_processors_are_understood(network: Network, tmp_path: Path) -> None:
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    model = trained(network, target_modules=["to_q", "to_out.0"], lora_alpha=RANK)
    tensors = {}
    for key, value in get_peft_model_state_dict(model).items():
        layer, _, factor = key.removeprefix("base_model.model.").partition(".lora_")
        block, projection = layer.replace("to_out.0", "to_out").rsplit(".", 1)
        side = {"A.weight": "down", "B.weight": "up"}[factor]
        tensors[f"unet.{block}.processor.{projection}_lora.{side}.weight"] = value
    save_file(tensors, tmp_path / "lora.safetensors")
    check(tmp_path / "lora.safetensors", weights, merged_by_peft(model))


def coarse(network: nn.Module) -> nn.Module:
    """The same with parameters of few digits: what is made of them is exact in float32, in whatever order."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            grid = 16 if "lora_" in name else 4096
            parameter.copy_((parameter * grid).round() / grid)
    return network


def test_weights_keep_their_dtype_and_the_sum_is_rounded_once(network: Network, tmp_path: Path) -> None:
    weights = {key: value.half() for key, value in coarse(network).state_dict().items()}
    model = coarse(trained(network))
    save_file(get_peft_model_state_dict(model), tmp_path / "lora.safetensors")
    merged = merge_lora(weights, read_lora(tmp_path / "lora.safetensors"), ALPHA / RANK)
    expected = merged_by_peft(model)
    assert any(not torch.equal(tensor.half().float(), tensor) for tensor in expected.values())
    for key, tensor in expected.items():
        assert torch.equal(merged[key], tensor.half())


# What is refused


def file_with(path: Path, **tensors: Tensor) -> Path:
    save_file({key.replace("__", "."): value for key, value in tensors.items()}, path)
    return path


PAIR = {"a__lora_A__weight": torch.zeros(2, 8), "a__lora_B__weight": torch.zeros(8, 2)}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"a__weight": torch.zeros(2)}, "a.weight is no part of a LoRA"),
        ({"a__lora_A__weight": torch.zeros(2, 8)}, "layer a has no factor B"),
        ({**PAIR, "a__lora_B__weight": torch.zeros(8, 3)}, "layer a has rank 2 in A, 3 in B"),
        ({**PAIR, "a__lora_magnitude_vector": torch.zeros(8)}, "DoRA is not supported"),
        ({"a__hada_w1_a": torch.zeros(2)}, "LoHa is not supported"),
        ({"text_encoder__a__lora_A__weight": torch.zeros(2, 8)}, "text encoders are not supported"),
        ({}, "no LoRA in it"),
    ],
)
def test_file_that_is_no_plain_lora_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_lora(file_with(tmp_path / "lora.safetensors", **tensors))


def test_pickle_missing_or_cut_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_lora(tmp_path / "lora.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="can run code"):
        read_lora(tmp_path / "lora.bin")
    whole = file_with(tmp_path / "lora.safetensors", **PAIR).read_bytes()
    (tmp_path / "lora.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="bytes on disk"):
        read_lora(tmp_path / "lora.safetensors")


def test_lora_of_another_model_is_refused_by_its_layer(tmp_path: Path) -> None:
    lora = read_lora(file_with(tmp_path / "lora.safetensors", **PAIR))
    with pytest.raises(CheckpointError, match="no layer a;"):
        merge_lora({"b.weight": torch.zeros(8, 8)}, lora)
    with pytest.raises(CheckpointError, match=r"layer a is \(8, 8\), the network's \(8, 4\)"):
        merge_lora({"a.weight": torch.zeros(8, 4)}, lora)


# The student


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "pixart", student=False)


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    weights = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    keys = [key for key in weights if key.endswith(("attn1.to_q.weight", "attn1.to_out.0.weight"))]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key in keys:
        out, into = weights[key].shape
        layer = f"transformer.{key.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = torch.randn(2, into, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    save_file(tensors, tmp_path / "few-steps.safetensors")
    return tmp_path / "few-steps.safetensors"


def adoption_of(base: Path, out: Path, **changes: object) -> Adoption:
    return replace(Adoption(base=base, out=out, name="adopted", timesteps={}, num_steps=(4,)), **changes)  # type: ignore[arg-type]


def test_released_lora_becomes_a_student_that_builds_and_says_where_it_comes_from(
    base: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    command = ["adopt", str(base), "--out", str(out), "--name", "adopted", "--lora", str(lora)]
    command += ["--lora-scale", "0.125", "--steps", "2", "--timesteps", "999,856,665,399"]
    assert main(command) == 0
    assert "engines gate" in capsys.readouterr().out

    student = read_student(out)
    assert student.timesteps == {2: (999, 499), 4: (999, 856, 665, 399)}
    assert (student.default_num_steps, student.height, student.max_text_tokens) == (4, 64, 20)
    source = json.loads((out / "student.json").read_text())["source"]
    assert source["lora"]["scale"] == 0.125
    assert (source["lora"]["ranks"], source["lora"]["scaling"], source["lora"]["layers"]) == ([2], [1.0], 4)
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 4
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}

    build = ["build", str(out), "--out", str(tmp_path / "bundle"), "--backends", "eager", "--batches", "1"]
    assert main(build) == 2  # it never went through a gate
    assert main([*build, "--ungated"]) == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["student"]["source"] == source
    assert manifest["timesteps"]["4"] == [999, 856, 665, 399]


def test_checkpoint_that_was_distilled_whole_is_taken_as_it_is(tmp_path: Path) -> None:
    base = make_tiny_cogvideox(tmp_path / "base", student=False)
    student = read_student(adopt(adoption_of(base, tmp_path / "student", fps=12)))
    assert (student.family, student.kind, student.frames, student.fps) == ("cogvideox", "video", 9, 12)
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "student" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_steps": ()}, "for how many"),
        ({"timesteps": {2: [1000, 499]}}, "at most 999"),
        ({"timesteps": {2: [499, 999]}}, "falling"),
        ({"default_num_steps": 3}, "3 is none of 4"),
        ({"frames": 9}, "one frame"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_nothing_is_left(
    base: Path, tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    out = tmp_path / "student"
    with pytest.raises(ConfigError, match=match):
        adopt(adoption_of(base, out, **changes))
    assert list(tmp_path.iterdir()) == []


def test_student_existing_directory_or_wrong_lora_is_refused_and_nothing_is_left(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    student = shutil.copytree(base, tmp_path / "other")
    (student / "student.json").write_text("{}")
    with pytest.raises(ConfigError, match="student already"):
        adopt(adoption_of(student, out))
    with pytest.raises(ConfigError, match="exists"):
        adopt(adoption_of(base, student))
    lora = file_with(tmp_path / "lora.safetensors", **PAIR)
    with pytest.raises(CheckpointError, match="no layer a;"):
        adopt(adoption_of(base, out, lora=lora))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "other"]
