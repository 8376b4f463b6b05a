# SPDX-License-Identifier: MIT
"""Find landmarks on real photographs with a small fully-convolutional network whose head is ``SoftArgmax2d``.

    pip install kpfused scikit-image pillow tqdm
    python examples/landmarks.py

Four photographs carry seven marked points each. Every training view is a fresh random perspective warp, crop and
lighting of one of them; its true points are the marked ones sent through the same homography, so they are exact. The
network sees a 128 x 128 view and gives one 32 x 32 heatmap a landmark; ``SoftArgmax2d`` turns heatmaps into coordinates,
and the only loss is the distance of those to the truth. It is then tested on views drawn from another seed, against the
argmax of the same heatmaps and against itself before training, and a sheet of held-out views is drawn.

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
BATCH = 32
HELD_OUT = 256


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
        (64, -32, 456),
        {
            "spoon tip": (411.0, 69.0),
            "spoon neck": (379.0, 236.0),
            "spoon bowl": (361.0, 323.0),
            "handle highlight": (226.0, 256.0),
            "rim, left": (174.0, 110.0),
            "rim, right": (407.0, 115.0),
            "rim, front": (298.0, 206.0),
        },
    ),
    Subject(
        "rocket",
        "rocket.jpg",
        (66, 12, 506),
        {
            "nose": (322.0, 126.5),
            "left mast": (200.5, 124.0),
            "right mast": (446.0, 123.5),
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
        self.head = SoftArgmax2d(coordinates="pixel")

    def heatmaps(self, views: Views) -> Tensor:
        """The heatmaps (B, L, VIEW / STRIDE, VIEW / STRIDE) of each view's own subject: raw logits."""
        fine = self.fine(F.pixel_unshuffle(views.image - 0.5, STRIDE))
        middle = self.middle(F.avg_pool2d(fine, 2))
        coarse = self.coarse(F.avg_pool2d(middle, 2))
        middle = self.join_middle(middle + F.pixel_shuffle(self.up_middle(coarse), 2))
        fine = self.join_fine(fine + F.pixel_shuffle(self.up_fine(middle), 2))
        every = self.heat(fine).unflatten(1, (self.subjects, self.landmarks))
        return every[torch.arange(len(every), device=every.device), views.subject]

    def forward(self, views: Views) -> Tensor:
        """Landmarks (B, L, 2) as (x, y) in view pixels."""
        return to_view(self.head(self.heatmaps(views)))


def to_view(points: Tensor) -> Tensor:
    """Heatmap pixels to view pixels: the centre of a block of STRIDE pixels is half a pixel short of its middle edge."""
    return STRIDE * points + (STRIDE - 1) / 2


def argmax2d(heatmaps: Tensor) -> Tensor:
    """The (x, y) of the largest pixel of each map. (..., H, W) to (..., 2)."""
    index = heatmaps.flatten(-2).argmax(-1)
    return torch.stack((index % heatmaps.shape[-1], index // heatmaps.shape[-1]), -1).float()


def distances(predicted: Tensor, views: Views) -> Tensor:
    """Errors in view pixels of all visible landmarks, in one dimension."""
    return torch.linalg.vector_norm(predicted - views.truth, dim=-1)[views.visible]


def train(network: LandmarkNet, photographs: Photographs, steps: int, generator: torch.Generator) -> None:
    """Minimise the mean distance to the truth over fresh views."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 2), pct_start=0.15)
    subject = torch.arange(BATCH) % len(SUBJECTS)
    network.train()
    progress = tqdm(range(steps), desc="training", unit="step")
    for _ in progress:
        views = photographs.draw(subject, generator)
        loss = distances(network(views), views).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f"error {loss.item():.2f} px")
