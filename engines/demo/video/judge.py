"""A reader of clips: a small network that watches one and says what its caption would say."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.video.scenes import COLOURS, MOTIONS, NUM_FRAMES, SHAPES, Scene

HEADS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shape", SHAPES),
    ("colour", tuple(COLOURS)),
    ("motion", tuple(MOTIONS)),
)
"""One classifier a question, with its answers."""

NUM_FEATURES = 192
_THUMBNAIL = 8
_THUMBNAIL_FRAMES = slice(0, None, 4)


def answers(scene: Scene) -> list[int]:
    """What the heads should say of a scene, in their order."""
    return [names.index(getattr(scene, question)) for question, names in HEADS]


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_out(functional.silu(self.conv_in(functional.silu(self.norm(x)))))
        return out


class VideoJudge(nn.Module):
    """Reads clips of 9 frames, 32 x 32; Fréchet distances are taken between its `features`.

    The frames lie in the channels, so that the first layer already sees what moves. The features must also
    say what the clip looks like in small: captions leave most of it unsaid, a distance should not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3 * NUM_FRAMES, 64, 6, stride=2, padding=2),
            _Residual(64), nn.Conv2d(64, 96, 4, stride=2, padding=1),
            _Residual(96), nn.Conv2d(96, 128, 4, stride=2, padding=1),
            _Residual(128), nn.GroupNorm(8, 128), nn.SiLU(), nn.Flatten(), nn.Linear(128 * 16, NUM_FEATURES),
        )  # fmt: skip
        self.heads = nn.Linear(NUM_FEATURES, sum(len(names) for _, names in HEADS))
        self.thumbnails = nn.Linear(NUM_FEATURES, 3 * 3 * _THUMBNAIL**2)

    def forward(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 27, 32, 32) in [-1, 1] to features (B, 192) and all heads' logits side by side."""
        features = self.body(videos.contiguous(memory_format=torch.channels_last))
        return features, self.heads(functional.silu(features))

    @classmethod
    def load(cls, path: Path | str) -> "VideoJudge":
        judge = cls()
        judge.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        return _channels_last(judge).eval()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half().contiguous() for key, value in self.state_dict().items()}, path)

    @torch.no_grad()
    def features(self, videos: Tensor, *, batch: int = 250) -> Tensor:
        """Features of (B, 9, 32, 32, 3) uint8 clips, (B, 192) fp32."""
        return torch.cat([self(to_input(part))[0].float() for part in videos.split(batch)])

    @torch.no_grad()
    def read(self, videos: Tensor, *, batch: int = 250) -> list[Scene]:
        """Say what (B, 9, 32, 32, 3) uint8 clips show."""
        sizes = [len(names) for _, names in HEADS]
        scenes = []
        for part in videos.split(batch):
            said = [head.argmax(1).tolist() for head in self(to_input(part))[1].split(sizes, dim=1)]
            scenes += [
                Scene(*(names[i] for (_, names), i in zip(HEADS, row, strict=True)))
                for row in zip(*said, strict=True)
            ]
        return scenes


def _channels_last(judge: VideoJudge) -> VideoJudge:
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return judge


def to_input(videos: Tensor) -> Tensor:
    """(B, F, H, W, 3) uint8 to (B, 3 F, H, W) fp32 in [-1, 1], the colours of a frame side by side."""
    return videos.permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 127.5 - 1


def accuracy(judge: VideoJudge, videos: Tensor, scenes: Sequence[Scene]) -> float:
    """Share of clips in which the judge reads exactly the scene that was asked for."""
    said = judge.read(videos)
    return sum(a.key() == b.key() for a, b in zip(said, scenes, strict=True)) / len(scenes)


def train_judge(
    videos: Tensor, scenes: Sequence[Scene], config: FitConfig, directory: Path, *, batch: int = 96
) -> VideoJudge:
    """Train on rendered clips, (N, 9, 32, 32, 3) uint8: mirrored, shifted, blurred, made noisy a little."""
    torch.manual_seed(config.seed)
    judge = _channels_last(VideoJudge())
    truth = torch.tensor([[answers(scene), answers(scene.mirrored())] for scene in scenes])
    sizes = [len(names) for _, names in HEADS]

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(videos), (batch,), generator=rng)
        flipped = torch.rand(batch, generator=rng) < 0.5
        x = to_input(videos[rows])
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        dy, dx = torch.randint(-1, 2, (2,), generator=rng).tolist()
        x = torch.roll(functional.pad(x, (1, 1, 1, 1), mode="replicate"), (dy, dx), (2, 3))[:, :, 1:-1, 1:-1]
        thumbnail = functional.adaptive_avg_pool2d(
            x.unflatten(1, (NUM_FRAMES, 3))[:, _THUMBNAIL_FRAMES].flatten(1, 2), _THUMBNAIL
        )
        if torch.rand((), generator=rng) < 0.3:
            x = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = x + 0.05 * torch.rand((), generator=rng) * torch.randn(x.shape, generator=rng)
        with autocast(config.device):
            features, logits = judge(x.to(config.device))
            drawn = judge.thumbnails(features)
        total = functional.mse_loss(drawn.float(), thumbnail.flatten(1).to(config.device))
        labels = truth[rows, flipped.long()].to(config.device)
        for head, target in zip(logits.float().split(sizes, dim=1), labels.unbind(1), strict=True):
            total = total + functional.cross_entropy(head, target)
        return total

    fit("judge", {"judge": judge}, loss, config, directory)
    return judge.eval()
