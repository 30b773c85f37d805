"""Changes to the studio's scenes, masks and measures."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

STUDIO = "tests/engines/test_studio.py"
HERE = "engines/demo/studio"

MUTANTS = (
    Mutant(
        "order counts where a caption says none",
        f"{HERE}/scenes.py",
        'if self.place is None or self.place == "beside":',
        'if self.place == "beside":',
        STUDIO,
    ),
    Mutant(
        "the middle one of three may stand anywhere",
        f"{HERE}/scenes.py",
        'return [seen, seen[::-1]] if self.place == "between" else [seen]',
        'return list(itertools.permutations(seen)) if self.place == "between" else [seen]',
        STUDIO,
    ),
    Mutant(
        "the right one is called left",
        f"{HERE}/captions.py",
        'f"{b} right of {a}",',
        'f"{a} right of {b}",',
        STUDIO,
    ),
    Mutant(
        "masks of mirror images keep the old order",
        f"{HERE}/teachers.py",
        "last + 1 - flipped, flipped)",
        "flipped, flipped)",
        STUDIO,
    ),
    Mutant(
        "far solids hide near ones",
        f"{HERE}/solids.py",
        "closer = t < t_all.view(-1)[where]",
        "closer = torch.isfinite(t)",
        STUDIO,
    ),
    Mutant(
        "a squashed outline is made to fit",
        f"{HERE}/outlines.py",
        "torch.meshgrid(grid_y, grid_x, indexing",
        "torch.meshgrid(grid_y * ys.float().std() / xs.float().std(), grid_x, indexing",
        STUDIO,
    ),
    Mutant(
        "contrast against the render's own direction counts as contrast",
        f"{HERE}/outlines.py",
        "kept += float(((step * real).sum(1) / length.clamp_min(1e-3)).sum())",
        "kept += float(step.norm(dim=1).sum())",
        STUDIO,
    ),
    Mutant(
        "solids too many go unnoticed",
        f"{HERE}/reader.py",
        "return self.count == self.scene.num_objects and",
        "return self.count >= self.scene.num_objects and",
        STUDIO,
    ),
)
