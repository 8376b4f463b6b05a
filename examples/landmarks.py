# SPDX-License-Identifier: MIT
"""Find landmarks on real photographs with a small fully-convolutional network whose head is ``SoftArgmax2d``.

    make demo                               # from the checkout; or, with kpfused installed:
    pip install scikit-image pillow tqdm
    python examples/landmarks.py            # about a minute on two cores; see --help

Four photographs carry seven marked points each. Every training view is a fresh random perspective warp, crop and
lighting of one of them; its true points are the marked ones sent through the same homography, so they are exact. The
network sees 128 x 128 pixels and gives one 32 x 32 heatmap per landmark, which ``SoftArgmax2d`` turns into coordinates.
The loss is their distance to the truth, plus a cross-entropy that keeps each heatmap a single narrow peak. The test is
on views drawn from another seed, against the argmax of the same heatmaps and against the network before training. A
sheet of the first held-out views is drawn, for the eye.

The photographs ship inside the scikit-image wheel, so nothing is downloaded: the astronaut Eileen Collins (NASA, public
domain), Chelsea the cat (Stefan van der Walt, CC0), a cup of coffee (Rachel Michetti, CC0) and a Falcon 9 (SpaceX,
public domain).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from kpfused import SoftArgmax2d

VIEW = 128  # pixels a side of what the network sees
STRIDE = 4  # view pixels per heatmap pixel, each way
CANVAS = 256  # pixels a side at which the photographs are kept
MARGIN = 2  # a landmark nearer than this to the view's edge, or outside, does not count
BETA = 5.0  # inverse temperature of the head
BATCH = 16
HELD_OUT = 256
ROWS = 4  # of the sheet; it has one column per photograph
ZOOM = 3  # sheet pixels per view pixel


@dataclass(frozen=True)
class Subject:
    """A photograph, the square of it to use as (left, top, side), and its landmarks in the photograph's pixels."""

    name: str
    file: str
    square: tuple[int, int, int]
    landmarks: dict[str, tuple[float, float]]


SUBJECTS = (
    Subject(
        "astronaut",
        "astronaut.png",
        (96, 10, 256),
        {
            "right eye": (203.0, 101.0),
            "left eye": (246.0, 103.5),
            "nose": (224.0, 126.0),
            "right mouth corner": (203.0, 140.0),
            "left mouth corner": (244.0, 141.5),
            "chin": (223.0, 177.0),
            "left ear lobe": (270.0, 136.0),
        },
    ),
    Subject(
        "cat",
        "chelsea.png",
        (33, -7, 384),
        {
            "right pupil": (171.0, 112.0),
            "left pupil": (314.0, 132.0),
            "right eye, outer corner": (136.0, 103.0),
            "left eye, inner corner": (297.0, 158.0),
            "nose, right": (242.0, 235.0),
            "nose, left": (291.0, 234.0),
            "mouth": (257.0, 266.0),
        },
    ),
    Subject(
        "coffee",
        "coffee.png",
        (54, -44, 480),
        {
            "spoon tip": (411.0, 69.0),
            "spoon neck": (379.0, 236.0),
            "spoon bowl": (361.0, 323.0),
            "handle highlight": (226.0, 256.0),
            "handle end": (215.0, 305.0),
            "spoon at the rim": (399.0, 76.0),
            "rim, front": (298.0, 206.0),
        },
    ),
    Subject(
        "rocket",
        "rocket.jpg",
        (91, 50, 450),
        {
            "nose": (322.0, 126.5),
            "emblem": (322.0, 150.0),
            "fairing foot": (322.0, 178.0),
            "foot": (321.0, 406.0),
            "left lamp": (192.0, 394.0),
            "middle lamp": (363.0, 397.0),
            "right lamp": (433.0, 394.0),
        },
    ),
)


@dataclass(frozen=True)
class Views:
    """A batch of warped photographs, on the device of the network."""

    image: Tensor  # (B, 3, VIEW, VIEW), in [0, 1]
    subject: Tensor  # (B,), an index into SUBJECTS
    truth: Tensor  # (B, L, 2): (x, y) in view pixels of the landmarks of that subject
    visible: Tensor  # (B, L), whether the landmark lies inside the view


class Photographs:
    """The photographs and their landmarks, and random views of them.

    Positions in a photograph and in a view are measured from -1 to 1 between the outer *edges* of the square, so that
    pixel ``i`` of ``n`` has its centre at ``(2 i + 1) / n - 1``: what ``grid_sample(align_corners=False)`` expects.
    """

    def __init__(self, device: torch.device) -> None:
        pixels, landmarks = [], []
        for subject in SUBJECTS:
            left, top, side = subject.square
            with files("skimage").joinpath("data", subject.file).open("rb") as stream:
                photograph = Image.open(stream).convert("RGB").crop((left, top, left + side, top + side))
            pixels.append(np.asarray(photograph.resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)))
            points = torch.tensor(list(subject.landmarks.values())) - torch.tensor([left, top])
            landmarks.append((2 * points + 1) / side - 1)
        self.pixels = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 255  # (S, 3, H, W)
        self.landmarks = torch.stack(landmarks).to(device)  # (S, L, 2)

    def draw(self, subject: Tensor, generator: torch.Generator) -> Views:
        """One random view of each of the photographs ``subject``. ``generator`` lives on the CPU, for every device."""
        device = self.pixels.device
        warp = random_homographies(len(subject), generator).to(device)
        subject = subject.to(device)
        centres = (2 * torch.arange(VIEW, device=device) + 1) / VIEW - 1
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).view(1, -1, 2)
        grid = project(warp, grid).view(-1, VIEW, VIEW, 2)
        image = F.grid_sample(self.pixels[subject], grid, align_corners=False)
        truth = (project(torch.linalg.inv(warp), self.landmarks[subject]) + 1) * VIEW / 2 - 0.5
        visible = ((truth >= MARGIN) & (truth <= VIEW - 1 - MARGIN)).all(-1)
        return Views(relight(image, generator), subject, truth, visible)


def project(homography: Tensor, points: Tensor) -> Tensor:
    """Send points (B or 1, N, 2) through homographies (B, 3, 3)."""
    mapped = points @ homography[:, :, :2].mT + homography[:, :, 2].unsqueeze(1)
    return mapped[..., :2] / mapped[..., 2:]


def random_homographies(count: int, generator: torch.Generator) -> Tensor:
    """Homographies (B, 3, 3) from a view to the photograph: turn, zoom, shear, shift and tilt."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, zoom = between(-0.5, 0.5), 2 / 3 * between(-0.25, 0.25).exp()
    stretch, shear = between(-0.12, 0.12).exp(), between(-0.15, 0.15)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(count), torch.ones(count)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, -1).view(count, 3, 3)

    move = matrix(one, zero, between(-0.12, 0.12), zero, one, between(-0.12, 0.12), zero, zero, one)
    turn = matrix(cos, -sin, zero, sin, cos, zero, zero, zero, one)
    scale = matrix(zoom * stretch, zoom * shear, zero, zero, zoom / stretch, zero, zero, zero, one)
    tilt = matrix(one, zero, zero, zero, one, zero, between(-0.15, 0.15), between(-0.15, 0.15), one)
    return move @ turn @ scale @ tilt


def relight(image: Tensor, generator: torch.Generator) -> Tensor:
    """Another light on every image (B, 3, H, W): blur, gamma, gain, colour cast, a gradient, bias and noise."""

    def between(low: float, high: float, channels: int = 1) -> Tensor:
        drawn = torch.rand(len(image), channels, 1, 1, generator=generator)
        return (low + (high - low) * drawn).to(image.device)

    image = torch.lerp(image, F.avg_pool2d(image, 3, 1, 1, count_include_pad=False), between(0, 1))
    image = image.clamp_min(1e-3) ** between(-0.4, 0.4).exp()
    across = torch.linspace(-1, 1, image.shape[-1], device=image.device)
    gradient = 1 + between(-0.3, 0.3) * across + between(-0.3, 0.3) * across[:, None]
    image = image * between(-0.3, 0.3).exp() * between(-0.15, 0.15, 3).exp() * gradient + between(-0.08, 0.08)
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    return (image + between(0, 0.05) * noise).clamp(0, 1)


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each normalised and rectified."""
    layers: list[nn.Module] = []
    for first in (channels_in, channels_out):
        layers += [nn.Conv2d(first, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]
    return nn.Sequential(*layers)


class LandmarkNet(nn.Module):
    """A small U-Net at strides 4, 8 and 16, with a heatmap for every landmark of every subject.

    Its only ways down and up (pixel unshuffle, average pooling, pixel shuffle) keep blocks of pixels centred, so pixel
    ``i`` of a heatmap stands for view pixel ``STRIDE * i + (STRIDE - 1) / 2``.
    """

    def __init__(self, subjects: int, landmarks: int) -> None:
        super().__init__()
        self.subjects, self.landmarks = subjects, landmarks
        self.fine, self.middle, self.coarse = block(3 * STRIDE**2, 32), block(32, 48), block(48, 96)
        self.up_middle, self.up_fine = nn.Conv2d(96, 4 * 48, 1), nn.Conv2d(48, 4 * 32, 1)
        self.join_middle, self.join_fine = block(48, 48), block(32, 32)
        self.heat = nn.Conv2d(32, subjects * landmarks, 1)
        self.head = SoftArgmax2d(BETA, coordinates="pixel")

    def heatmaps(self, views: Views) -> Tensor:
        """The heatmaps (B, L, VIEW / STRIDE, VIEW / STRIDE) of each view's own subject: raw logits."""
        blocks = F.pixel_unshuffle(views.image - 0.5, STRIDE)
        fine = self.fine(blocks.contiguous(memory_format=torch.channels_last))  # the faster layout for convolutions
        middle = self.middle(F.avg_pool2d(fine, 2))
        coarse = self.coarse(F.avg_pool2d(middle, 2))
        middle = self.join_middle(middle + F.pixel_shuffle(self.up_middle(coarse), 2))
        fine = self.join_fine(fine + F.pixel_shuffle(self.up_fine(middle), 2))
        every: Tensor = self.heat(fine).unflatten(1, (self.subjects, self.landmarks))
        return every[torch.arange(len(every), device=every.device), views.subject]

    def forward(self, views: Views) -> tuple[Tensor, Tensor]:
        """Landmarks (B, L, 2) as (x, y) in view pixels, and the heatmaps they come from."""
        heatmaps = self.heatmaps(views)
        return to_view(self.head(heatmaps)), heatmaps


def to_view(points: Tensor) -> Tensor:
    """Heatmap pixels to view pixels: pixel i covers the view pixels from STRIDE * i to STRIDE * i + STRIDE - 1."""
    return STRIDE * points + (STRIDE - 1) / 2


def argmax2d(heatmaps: Tensor) -> Tensor:
    """The (x, y) of the largest pixel of each map. (..., H, W) to (..., 2)."""
    index = heatmaps.flatten(-2).argmax(-1)
    return torch.stack((index % heatmaps.shape[-1], index // heatmaps.shape[-1]), -1).float()


def distances(predicted: Tensor, views: Views) -> Tensor:
    """Errors of the landmarks (B, L), in view pixels."""
    error: Tensor = torch.linalg.vector_norm(predicted - views.truth, dim=-1)
    return error


def cross_entropy(heatmaps: Tensor, views: Views) -> Tensor:
    """Cross-entropy (B, L) of each softmax against a Gaussian of one heatmap pixel around the truth."""
    pixels = to_view(torch.arange(heatmaps.shape[-1], device=heatmaps.device))
    x, y = ((-0.5 * ((pixels - views.truth[..., axis, None]) / STRIDE) ** 2).exp() for axis in (0, 1))
    target = (y[..., :, None] * x[..., None, :]).flatten(-2)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-9)  # far outside the view all of it can underflow
    return -(target * torch.log_softmax(BETA * heatmaps.flatten(-2), -1)).sum(-1)


def cycle(count: int) -> Tensor:
    """The subjects of a batch: each in turn."""
    return torch.arange(count) % len(SUBJECTS)


def train(network: LandmarkNet, photographs: Photographs, steps: int, seed: int) -> None:
    """Fit the network to ``steps`` batches of fresh views."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1, pct_start=0.15)
    network.train()
    progress = tqdm(range(steps), desc="training", unit="step")
    for _ in progress:
        views = photographs.draw(cycle(BATCH), generator)
        predicted, heatmaps = network(views)
        error = distances(predicted, views)[views.visible].mean()
        loss = error + 2 * cross_entropy(heatmaps, views)[views.visible].mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f"error {error.item():5.2f} px", refresh=False)


@torch.no_grad()
def predict(network: LandmarkNet, batches: Sequence[Views]) -> tuple[list[Tensor], list[Tensor]]:
    """Landmarks of every batch by soft-argmax, and by the argmax of the same heatmaps."""
    network.eval()
    outputs = [network(views) for views in batches]
    return [soft for soft, _ in outputs], [to_view(argmax2d(heatmaps)) for _, heatmaps in outputs]


@dataclass(frozen=True)
class Errors:
    """Summary of the errors of one method over all visible landmarks of the held-out views, in view pixels."""

    mean: float
    median: float
    percentile95: float

    @classmethod
    def of(cls, predicted: Sequence[Tensor], batches: Sequence[Views]) -> Errors:
        error = torch.cat([distances(p, views)[views.visible] for p, views in zip(predicted, batches, strict=True)])
        return cls(error.mean().item(), error.median().item(), error.quantile(0.95).item())


def draw_sheet(views: Views, predicted: Tensor, title: str) -> Image.Image:
    """The first views in a grid, a photograph per column, with true points as rings and predicted ones as crosses."""
    smooth = 2  # drawn this much larger and reduced at the end, which smooths rings and crosses
    columns, gap, header = len(SUBJECTS), 6 * smooth, 64 * smooth
    zoom = ZOOM * smooth
    tile, font = VIEW * zoom, ImageFont.load_default(size=22 * smooth)
    size = (columns * (tile + gap) + gap, header + ROWS * (tile + gap))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    error = distances(predicted, views)
    for index in range(min(ROWS * columns, len(predicted))):
        left, top = gap + index % columns * (tile + gap), header + index // columns * (tile + gap)
        pixels = (views.image[index].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
        sheet.paste(Image.fromarray(pixels).resize((tile, tile), Image.Resampling.BICUBIC), (left, top))
        shown = views.visible[index]
        label = f"{error[index][shown].mean().item():.2f} px"
        box = pen.textbbox((left + 10 * smooth, top + 8 * smooth), label, font=font)
        pen.rounded_rectangle((left, top, box[2] + 10 * smooth, box[3] + 8 * smooth), 6 * smooth, fill=(24, 24, 28))
        pen.text((left + 10 * smooth, top + 8 * smooth), label, fill="white", font=font)
        for points, mark in ((views.truth, ring), (predicted, cross)):
            for x, y in points[index][shown].tolist():
                mark(pen, left + (x + 0.5) * zoom, top + (y + 0.5) * zoom, smooth)
    middle = header // 2
    pen.text((gap, middle), title, fill=(24, 24, 28), font=font, anchor="lm")
    for mark, text, place in ((ring, "true", size[0] - 280 * smooth), (cross, "predicted", size[0] - 160 * smooth)):
        mark(pen, place, middle, smooth)
        pen.text((place + 18 * smooth, middle), text, fill=(24, 24, 28), font=font, anchor="lm")
    return sheet.resize((size[0] // smooth, size[1] // smooth), Image.Resampling.LANCZOS)


def ring(pen: ImageDraw.ImageDraw, x: float, y: float, unit: int) -> None:
    """A green ring with a dark edge."""
    for radius, width, colour in ((11, 5, (0, 40, 0)), (10, 3, (60, 255, 90))):
        r = radius * unit
        pen.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=width * unit)


def cross(pen: ImageDraw.ImageDraw, x: float, y: float, unit: int) -> None:
    """A magenta cross with a dark edge."""
    for arm, width, colour in ((8, 5, (50, 0, 40)), (7, 2, (255, 60, 220))):
        a = arm * unit
        for dx, dy in ((a, a), (a, -a)):
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=width * unit)


@dataclass(frozen=True)
class Result:
    """What the demo found on held-out views."""

    soft_argmax: Errors
    argmax: Errors
    untrained: Errors

    def table(self) -> str:
        rows = (
            ("soft-argmax, trained", self.soft_argmax),
            ("argmax of the same heatmaps", self.argmax),
            ("soft-argmax, untrained", self.untrained),
        )
        lines = [f"{'error on held-out views, px':<30}{'mean':>8}{'median':>8}{'95 %':>8}"]
        lines += [f"{name:<30}{e.mean:8.2f}{e.median:8.2f}{e.percentile95:8.2f}" for name, e in rows]
        return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find landmarks on real photographs with a SoftArgmax2d head.")
    parser.add_argument("--device", default="cpu", help="where to run, as torch names it: cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the views")
    parser.add_argument("--steps", type=int, default=480, help=f"training batches, of {BATCH} views each")
    parser.add_argument("--output", type=Path, default=Path("out/landmarks.png"), help="the sheet of held-out views")
    options = parser.parse_args(argv)
    if options.steps < 0:
        parser.error(f"--steps must not be negative; got {options.steps}")
    try:
        torch.zeros(1, device=options.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    return options


def main(argv: Sequence[str] | None = None) -> Result:
    """Train, test, print the table and write the sheet."""
    options = arguments(argv)
    torch.manual_seed(options.seed)
    photographs = Photographs(torch.device(options.device))
    generator = torch.Generator().manual_seed(options.seed + 1_000_003)  # not a seed of training
    held_out = [photographs.draw(cycle(BATCH), generator) for _ in range(HELD_OUT // BATCH)]
    network = LandmarkNet(len(SUBJECTS), len(SUBJECTS[0].landmarks)).to(options.device)
    untrained = Errors.of(predict(network, held_out)[0], held_out)
    train(network, photographs, options.steps, options.seed)
    soft, hard = predict(network, held_out)
    result = Result(Errors.of(soft, held_out), Errors.of(hard, held_out), untrained)
    print(result.table())
    title = f"{HELD_OUT} held-out views: mean error {result.soft_argmax.mean:.2f} px"
    title += f"  (argmax {result.argmax.mean:.2f}, untrained {untrained.mean:.1f})"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(held_out[0], soft[0], title).save(options.output, optimize=True)
    print(f"wrote {options.output}")
    return result


if __name__ == "__main__":
    main()
