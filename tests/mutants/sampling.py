"""Changes to noise, sampler and schedule."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

NOISE = "tests/engines/test_noise.py"
SAMPLER = "tests/engines/test_sampler.py tests/engines/test_schedule.py tests/engines/test_denoiser.py"

MUTANTS = (
    Mutant(
        "the high half of a seed is ignored",
        "engines/noise.py",
        "        if high:\n",
        "        if high < 0:\n",
        NOISE,
    ),
    Mutant(
        "seeds with a high half have too much noise",
        "engines/noise.py",
        "row.mul_(0.6).add_(own, alpha=0.8)",
        "row.add_(own, alpha=0.8)",
        NOISE,
    ),
    Mutant(
        "sampling goes on from x0 instead of the next noise level",
        "engines/sampler.py",
        "return alpha * x0 + sigma * eps",
        "return x0 + 0 * sigma * eps * alpha",
        SAMPLER,
    ),
    Mutant(
        "guidance is counted from the prompt",
        "engines/sampler.py",
        "x0 = x0_uncond + guidance_scale * (x0_cond - x0_uncond)",
        "x0 = x0_cond + guidance_scale * (x0_cond - x0_uncond)",
        SAMPLER,
    ),
    Mutant(
        "a flow's velocity points the other way",
        "engines/denoiser.py",
        "return latents - sigma * prediction, latents + alpha * prediction",
        "return latents + sigma * prediction, latents - alpha * prediction",
        SAMPLER,
    ),
    Mutant(
        "the noise of x0 is what the network said, not what the latents hold",
        "engines/denoiser.py",
        "return (latents - alpha * x0) / sigma",
        "return latents - alpha * x0",
        SAMPLER,
    ),
    Mutant(
        "CogVideoX's shift of the noise is ignored",
        "engines/schedule.py",
        'snr_shift = float(config.get("snr_shift_scale", 1.0))',
        "snr_shift = 1.0",
        SAMPLER,
    ),
    Mutant(
        "zero terminal SNR is ignored",
        "engines/schedule.py",
        "alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()",
        "alpha_bar = root.square()",
        SAMPLER,
    ),
    Mutant(
        "a flow's network is told the number of its timestep",
        "engines/schedule.py",
        "network_times=(num_timesteps * sigmas).float()",
        "network_times=torch.arange(num_timesteps).float()",
        SAMPLER,
    ),
    Mutant(
        "moving a schedule to a device forgets a flow's times",
        "engines/schedule.py",
        "self.sigmas.to(device), self.prediction_type, times)",
        "self.sigmas.to(device), self.prediction_type)",
        SAMPLER,
    ),
    Mutant(
        "a schedule with dynamic shifting is taken for one without",
        "engines/schedule.py",
        '    "use_dynamic_shifting": "give a fixed shift",\n',
        "",
        SAMPLER,
    ),
    Mutant(
        "a schedule with a terminal shift is taken for one without",
        "engines/schedule.py",
        '    "shift_terminal": "give a fixed shift",\n',
        "",
        SAMPLER,
    ),
    Mutant(
        "a schedule with inverted noise is taken for one without",
        "engines/schedule.py",
        '    "invert_sigmas": "sigma has to rise with the timestep",\n',
        "",
        SAMPLER,
    ),
)
