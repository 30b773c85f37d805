"""Changes to parity and to the pipeline that runs a bundle."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

PARITY = "tests/engines/test_parity.py"
PIPELINE = (  # but for tests of compiled code, which takes a minute to make
    "tests/engines/test_runtime.py tests/engines/test_runtime_loading.py "
    "tests/engines/test_runtime_stages.py -k not aotinductor and not compiled and not constants "
    "and not damaged and not missing_weight"
)
SIGNATURE = "tests/engines/test_signature.py"

MUTANTS = (
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
    Mutant(
        "parity looks at the best output",
        "engines/compile/parity.py",
        "cosine=min(agreement.cosine for",
        "cosine=max(agreement.cosine for",
        PARITY,
    ),
    Mutant(
        "parity takes NaN in one of several outputs",
        "engines/compile/parity.py",
        "finite=all(agreement.finite for",
        "finite=any(agreement.finite for",
        PARITY,
    ),
    Mutant(
        "parity looks at the scale of the best output",
        "engines/compile/parity.py",
        "scale_error=max(agreement.scale_error for",
        "scale_error=min(agreement.scale_error for",
        PARITY,
    ),
    Mutant(
        "parity looks at the scale of the best row",
        "engines/compile/parity.py",
        "scale_error=(scale - 1.0).abs().max().item()",
        "scale_error=(scale - 1.0).abs().min().item()",
        PARITY,
    ),
    Mutant(
        "parity looks at the closest pixel",
        "engines/compile/parity.py",
        "max_abs=max(agreement.max_abs for",
        "max_abs=min(agreement.max_abs for",
        PARITY,
    ),
    Mutant(
        "parity asks next to nothing of bfloat16",
        "engines/compile/parity.py",
        '"float32": 0.999, "bfloat16": 0.999,',
        '"float32": 0.999, "bfloat16": 0.5,',
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
    Mutant(
        "dropped rows leave their picture to a neighbour's preview",
        "engines/runtime/pipeline.py",
        "self.latents, self.x0 = self.latents[kept], self.x0[kept]",
        "self.latents = self.latents[kept]",
        PIPELINE,
    ),
    Mutant(
        "dropped rows leave their prompt to a neighbour",
        "engines/runtime/pipeline.py",
        "self.cond = {name: tensor[kept] for name, tensor in self.cond.items()}",
        "self.cond = {name: tensor[: len(kept)] for name, tensor in self.cond.items()}",
        PIPELINE,
    ),
    Mutant(
        "a preview shows the noise",
        "engines/runtime/pipeline.py",
        "return self._decode(run, run.x0)",
        "return self._decode(run, run.latents)",
        PIPELINE,
    ),
    Mutant(
        "warming up leaves its prompts in the cache",
        "engines/runtime/pipeline.py",
        "                self._prompts.clear()\n",
        "",
        PIPELINE,
    ),
    Mutant(
        "steps that nobody trained are drawn",
        "engines/runtime/pipeline.py",
        "if sample.num_steps not in self.manifest.num_steps:",
        "if sample.num_steps < 1:",
        PIPELINE,
    ),
    Mutant(
        "rows that are done take further steps",
        "engines/runtime/pipeline.py",
        "if done < sample.num_steps",
        "if done < max(one.num_steps for one in self.samples)",
        PIPELINE,
    ),
    Mutant(
        "the prompts of a batch are mixed up",
        "engines/runtime/pipeline.py",
        "for row, prompt in enumerate(new):",
        "for row, prompt in enumerate(reversed(new)):",
        PIPELINE,
    ),
    Mutant(
        "the prompt cache forgets the newest",
        "engines/runtime/prompt_cache.py",
        "popitem(last=False)",
        "popitem(last=True)",
        PIPELINE,
    ),
    Mutant(
        "a bundle is taken unsigned though a key is given",
        "engines/runtime/pipeline.py",
        "        if key is not None:\n",
        "        if key == b'':\n",
        SIGNATURE,
    ),
)
