"""Shows in five minutes on one CPU core why Diffusion-DPO drifts and what each part of STPO does about it.

    python -m posttrain.nano.bench.drift --seeds 0 1 2

A small MLP learns to draw smooth random fields of 8 x 8 pixels by flow matching. Pairs of its own drawings are ranked
by a taste: the mean of the left half less that of the right. Then it is trained long on these pairs, by the loss of
posttrain/stpo/losses.py with parts of it switched off. Its pairs with fresh times and noise, and fresh drawings,
tell what became of it:

    Dw, Dl     error of the chosen (rejected) drawings less the reference's, which is near 0.9
    accuracy   share of pairs whose margin is above 0; and of pairs it was not trained on
    detail     power of its drawings above 0.25 cycles a pixel, to the reference's
    taste      of its drawings; the reference's is near 0

`early` is plain DPO stopped where the other rows have hardly begun.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from posttrain.model import sampler
from posttrain.nano.bench import common
from posttrain.stpo.losses import error_change, preference_terms

SIDE, WIDTH, PAIRS, BATCH, STEPS, EARLY = 8, 256, 2000, 64, 3000, 20
MEAN, STD = 0.5, 1.0
DPO = {"beta": 100.0, "guard": None, "bound": None, "anchor": 0.0, "hinge": 0.0}
METHODS = {
    "DPO": DPO,
    "early": DPO,
    "guard only": DPO | {"guard": 0.6},
    "anchor only": DPO | {"anchor": 0.01},
    "guard + anchor": DPO | {"guard": 0.6, "anchor": 0.01},
    "STPO": DPO | {"guard": 0.6, "anchor": 0.01, "hinge": 0.25},
}


class Net(nn.Module):
    """Velocity of flat fields (B, 64) at times (B,)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [SIDE**2 + 9, WIDTH, WIDTH, WIDTH, SIDE**2]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        # t itself is too smooth an input for a small MLP, so it also gets Fourier features of it.
        angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0]) * torch.pi / 2
        return self.layers(torch.cat([x, t[:, None], angles.sin(), angles.cos()], 1))


def fields(count: int, generator: torch.Generator) -> Tensor:
    """(count, 64) with amplitudes 1 / (1 + r)^2, r in cycles a field, and a variance of 1."""
    frequency = torch.fft.fftfreq(SIDE) * SIDE
    amplitude = 1 / (1 + torch.hypot(frequency[:, None], frequency[None])) ** 2
    white = torch.fft.fft2(torch.randn(count, SIDE, SIDE, generator=generator))
    smooth = torch.fft.ifft2(white * amplitude).real
    return (smooth / amplitude.square().mean().sqrt()).flatten(1)


def times(count: int, generator: torch.Generator) -> Tensor:
    return sampler.logit_normal(torch.randn(count, generator=generator), MEAN, STD, 0.0)


@torch.no_grad()
def drawn(net: Net, noise: Tensor, steps: int = 30) -> Tensor:
    x, grid = noise, sampler.schedule(steps, MEAN)
    for t, after in zip(grid, grid[1:]):
        x = sampler.ode_step(x, net(x, t.expand(len(x))), t, after)
    return x


def taste(x: Tensor) -> Tensor:
    image = x.unflatten(1, (SIDE, SIDE))
    return image[..., : SIDE // 2].mean((1, 2)) - image[..., SIDE // 2 :].mean((1, 2))


def detail(x: Tensor) -> float:
    frequency = torch.fft.fftfreq(SIDE)
    high = torch.hypot(frequency[:, None], frequency[None]) > 0.25
    return float(torch.fft.fft2(x.unflatten(1, (SIDE, SIDE))).abs().square()[:, high].mean())


def pretrained(generator: torch.Generator) -> Net:
    # Flow matching as for an image model, but without prompts.
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(4000):
        x0, t = fields(256, generator), times(256, generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = (net(sampler.noised(x0, noise, t), t) - sampler.velocity_target(x0, noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def own_pairs(net: Net, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chosen and rejected, (PAIRS, 64) each."""
    x = drawn(net, torch.randn(2 * PAIRS, SIDE**2, generator=generator)).unflatten(0, (PAIRS, 2))
    better = taste(x.flatten(0, 1)).unflatten(0, (PAIRS, 2)).argmax(1)
    rows = torch.arange(PAIRS)
    return x[rows, better], x[rows, 1 - better]


def compared(
    net: Net, reference: Net, x0_w: Tensor, x0_l: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What preference_terms takes, as (B, 1, 64), at one fresh time and noise for each pair."""
    t, noise = times(len(x0_w), generator), torch.randn(x0_w.shape, generator=generator)
    x_w, x_l = sampler.noised(x0_w, noise, t), sampler.noised(x0_l, noise, t)
    with torch.no_grad():
        r_w, r_l = reference(x_w, t), reference(x_l, t)
    u_w, u_l = sampler.velocity_target(x0_w, noise), sampler.velocity_target(x0_l, noise)
    v_w, v_l = net(x_w, t), net(x_l, t)
    # A field is one token of 64 channels.
    return v_w[:, None], v_l[:, None], r_w[:, None], r_l[:, None], u_w[:, None], u_l[:, None]


def trained(
    reference: Net, pairs: tuple[Tensor, Tensor], settings: dict, steps: int, generator: torch.Generator
) -> Net:
    net = copy.deepcopy(reference)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    for _ in range(steps):
        rows = torch.randint(PAIRS, (BATCH,), generator=generator)
        given = compared(net, reference, pairs[0][rows], pairs[1][rows], generator)
        terms, metrics = preference_terms(*given, torch.ones(BATCH), **settings)
        # The hinge is on the batch's mean: it acts only where the winners' error has risen on average.
        if metrics["winner"].mean() <= 0:
            terms.pop("hinge", None)
        optimizer.zero_grad()
        torch.stack([term.mean() for term in terms.values()]).sum().backward()
        optimizer.step()
    return net


@torch.no_grad()
def figures(
    net: Net, reference: Net, pairs: tuple[Tensor, Tensor], heldout: tuple[Tensor, Tensor], generator: torch.Generator
) -> list[float]:
    """Dw, Dl, accuracy, accuracy held out, detail, taste."""
    changes = []
    for these in (pairs, heldout):
        v_w, v_l, r_w, r_l, u_w, u_l = compared(net, reference, *these, generator)
        changes.append((error_change(v_w, r_w, u_w), error_change(v_l, r_l, u_l)))
    (dw, dl), _ = changes
    accuracies = [float((dl > dw).float().mean()) for dw, dl in changes]
    noise = torch.randn(2000, SIDE**2, generator=generator)
    x, before = drawn(net, noise), drawn(reference, noise)
    return [float(dw.mean()), float(dl.mean()), *accuracies, detail(x) / detail(before), float(taste(x).mean())]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    for seed in args.seeds:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        reference = pretrained(generator).requires_grad_(False)
        pairs, heldout = own_pairs(reference, generator), own_pairs(reference, generator)
        for name, settings in METHODS.items():
            # The same for all methods, so that they see the same batches, times and noise.
            own = torch.Generator().manual_seed(seed + 1)
            start = copy.deepcopy(reference).requires_grad_(True)
            net = trained(start, pairs, settings, EARLY if name == "early" else STEPS, own)
            rows[name].append(figures(net, reference, pairs, heldout, own))
    lines = []
    for name, figures_of_seeds in rows.items():
        cells = [common.extent(values) for values in zip(*figures_of_seeds)]
        lines.append([name, *cells])
    print(common.markdown(["method", "Dw", "Dl", "accuracy", "held out", "detail", "taste"], lines))


if __name__ == "__main__":
    main()
