"""The same work in PyTorch and torchvision, for `speed.py`, which starts it in a process of its own.

    python benchmarks/rivals.py step 18 32 64        a pretraining step: depth, pixels, batch
    python benchmarks/rivals.py step 18 32 64 half   the same under autocast to bfloat16
    python benchmarks/rivals.py views pillow         JPEG of 500 x 375 to two views of 224 pixels, with blur
    python benchmarks/rivals.py views tensors        the same with torchvision.transforms.v2 on tensors

It says how many images a part of the work is, and that it is ready. Then it does one part for each line that it reads,
and answers with a line. The step runs eagerly, with channels last, on the GPU if there is one, in TF32 as
TensorFlow's; two processes make the views. It needs torch, torchvision and scikit-learn (for its photographs); this
program itself needs neither torch nor torchvision.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

TAU = 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKERS = 2
BATCH_OF_VIEWS = 16
PHOTOGRAPH = (500, 375)  # width and height of ImageNet's usual photograph


def network(depth: int, size: int) -> nn.Module:
    """Encoder and projection head."""
    net = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    if size <= 32:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    width = net.fc.in_features
    layers: list[nn.Module] = []
    for out in (width, width, 128):
        layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
    net.fc = nn.Sequential(*layers[:-1])
    return net.to(DEVICE, memory_format=torch.channels_last)


def step(depth: int, size: int, batch: int, half: bool) -> tuple[Callable[[], object], int]:
    """A pretraining step without memory, on random images, and its number of images."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    net = network(depth, size)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    images = torch.rand(2 * batch, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    positive = torch.arange(2 * batch, device=DEVICE).roll(batch)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            z = net(images)
        z = functional.normalize(z.float(), dim=1)
        logits = (z @ z.T / TAU).fill_diagonal_(-1e9)
        loss = functional.cross_entropy(logits, positive)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run, batch


class TwoViews(torch.utils.data.IterableDataset):
    """Two views of each of two photographs, again and again."""

    def __init__(self, of: str) -> None:
        self.jpegs = [jpeg(photo) for photo in load_sample_images().images]
        kit = transforms if of == "pillow" else v2
        self.decode = self.by_pillow if of == "pillow" else self.as_tensor
        last = kit.ToTensor() if of == "pillow" else v2.ToDtype(torch.float32, scale=True)
        self.view = kit.Compose([
            kit.RandomResizedCrop(224, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC),
            kit.RandomHorizontalFlip(),
            kit.RandomApply([kit.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            kit.RandomGrayscale(0.2),
            kit.RandomApply([kit.GaussianBlur(23, (0.1, 2.0))], 0.5),
            last,
        ])  # fmt: skip

    @staticmethod
    def by_pillow(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    @staticmethod
    def as_tensor(data: bytes) -> torch.Tensor:
        return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def __iter__(self) -> Iterator:
        torch.set_num_threads(1)
        for data in itertools.cycle(self.jpegs):
            image = self.decode(data)
            yield self.view(image), self.view(image)


def jpeg(photo: object) -> bytes:
    """A photograph as JPEG."""
    file = io.BytesIO()
    Image.fromarray(photo).resize(PHOTOGRAPH).save(file, "JPEG", quality=90)
    return file.getvalue()


def views(of: str) -> tuple[Callable[[], object], int]:
    """A batch of two views, and its number of images."""
    loader = torch.utils.data.DataLoader(TwoViews(of), BATCH_OF_VIEWS, num_workers=WORKERS)
    return iter(loader).__next__, BATCH_OF_VIEWS


def main() -> None:
    kind, *rest = sys.argv[1:]
    run, images = step(*map(int, rest[:3]), half="half" in rest) if kind == "step" else views(*rest)
    run()
    print(images, flush=True)
    for _ in sys.stdin:
        run()
        print("done", flush=True)


if __name__ == "__main__":
    main()
