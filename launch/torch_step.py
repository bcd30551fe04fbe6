"""A plain PyTorch train step of the sizes of Latent MIM, as a yardstick; not the official code.

    python launch/torch_step.py cifar10|vit_ti|vit_b [--batch_size=8] [--steps=10] [--device=cuda]

Encoder on the visible patches, EMA encoder on the masked ones, projectors, decoder with
cross-attention, InfoNCE, AdamW, EMA; torch's fused attention; bfloat16 autocast on a GPU, float32
on a CPU. The input is random patches. Prints a line of JSON: the median step, images per second.
"""

import argparse
import itertools
import json
import statistics
import time
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Sizes(NamedTuple):
    """Sizes of a recipe of the same name, and the batch size of a CPU."""

    grid: int
    patch_size: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_heads: int
    num_visible: int
    projector_width: int
    batch_size: int


RECIPES = {
    "cifar10": Sizes(8, 4, 192, 6, 3, 128, 4, 10, 512, 256),
    "vit_ti": Sizes(14, 16, 192, 12, 3, 128, 4, 20, 1024, 32),
    "vit_b": Sizes(14, 16, 768, 12, 12, 512, 16, 20, 4096, 8),
}
DECODER_DEPTH = 3
TAU = 0.2
EMA_RATE = 0.01
WARMUP = 2  # steps


class Attention(nn.Module):
    """Self-attention, or cross-attention to a context."""

    def __init__(self, width: int, heads: int, cross: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width if cross else 3 * width)
        self.key_value = nn.Linear(width, 2 * width) if cross else None
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        if self.key_value is None:
            parts = self.query(x).chunk(3, -1)
        else:
            parts = (self.query(x), *self.key_value(context).chunk(2, -1))
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        y = functional.scaled_dot_product_attention(*heads)
        return self.output(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block, with cross-attention in a decoder."""

    def __init__(self, width: int, heads: int, cross: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(layer_norm(width) for _ in range(4 if cross else 2))
        self.attention = Attention(width, heads)
        self.cross = Attention(width, heads, cross=True) if cross else None
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attention(self.norms[0](x))
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), self.norms[3](context))
        return x + self.mlp(self.norms[1](x))


class Encoder(nn.Module):
    """A vision transformer with a projector behind it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        hidden = sizes.projector_width
        self.embed = nn.Linear(3 * sizes.patch_size**2, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, sizes.heads) for _ in range(sizes.depth))
        self.norm = layer_norm(width)
        self.projector = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, width, bias=False),
            nn.LayerNorm(width),
        )

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cls = self.cls.expand(len(patches), -1, -1)
        x = torch.cat([cls, self.embed(patches) + positions], 1)
        for block in self.blocks:
            x = block(x)
        return self.projector(self.norm(x))


class Model(nn.Module):
    """What is trained: encoder and decoder."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.encoder = Encoder(sizes)
        self.stem = nn.Linear(sizes.width, sizes.decoder_width)
        self.decoder = nn.ModuleList(
            Block(sizes.decoder_width, sizes.decoder_heads, cross=True)
            for _ in range(DECODER_DEPTH)
        )
        self.head = nn.Linear(sizes.decoder_width, sizes.width)


def layer_norm(width: int) -> nn.LayerNorm:
    """The LayerNorm of transformer blocks."""
    return nn.LayerNorm(width, eps=1e-6)


def take(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The patches [B, N, D] of an order [B, V]: [B, V, D]."""
    return torch.gather(x, 1, order[..., None].expand(-1, -1, x.shape[-1]))


class Step:
    """The train step on one random batch."""

    def __init__(self, sizes: Sizes, batch_size: int, device: str) -> None:
        self.sizes = sizes
        self.device = device
        self.patches = sizes.grid**2
        self.model = Model(sizes).to(device)
        self.target = Encoder(sizes).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=1e-4,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            fused=device == "cuda",
        )
        pixels = 3 * sizes.patch_size**2
        self.batch = torch.randn(batch_size, self.patches, pixels, device=device)
        self.positions = torch.randn(self.patches, sizes.width, device=device)
        self.decoder_positions = torch.randn(self.patches, sizes.decoder_width, device=device)

    def run(self) -> torch.Tensor:
        """Start one step; its loss, which may not be computed yet."""
        order = torch.rand(len(self.batch), self.patches, device=self.device).argsort(1)
        visible = order[:, : self.sizes.num_visible]
        masked = order[:, self.sizes.num_visible :]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            prediction, target = self._forward(visible, masked)
        loss = info_nce(prediction.float(), target.float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.target.parameters()), list(self.model.encoder.parameters()), EMA_RATE
            )
        return loss.detach()

    def _forward(
        self, visible: torch.Tensor, masked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions and targets of the masked patches."""
        latents = self.model.encoder(take(self.batch, visible), self.positions[visible])
        with torch.no_grad():
            target = self.target(take(self.batch, masked), self.positions[masked])[:, 1:]
        context = self.model.stem(latents)
        queries = self.decoder_positions[masked]
        scores = queries @ self.decoder_positions[visible].mT / self.sizes.decoder_width**0.5
        y = torch.softmax(scores, -1) @ context[:, 1:] + queries
        for block in self.model.decoder:
            y = block(y, context)
        return self.model.head(y), target


def info_nce(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Patch InfoNCE with standardized predictions."""
    deviation = prediction.std(1, keepdim=True) + 1e-4
    prediction = (prediction - prediction.mean(1, keepdim=True)) / deviation
    prediction = functional.normalize(prediction, dim=-1)
    logits = prediction @ functional.normalize(target, dim=-1).mT / TAU
    labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return 2 * TAU * functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def main() -> None:
    """Time the step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--batch_size", type=int, help="by default that of a CPU")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    sizes = RECIPES[given.recipe]
    batch_size = given.batch_size or sizes.batch_size
    torch.manual_seed(0)
    step = Step(sizes, batch_size, given.device)
    for _ in range(WARMUP):
        step.run()
    # One step is in progress while the loss of the one before is fetched, as in training
    ends = []
    pending = step.run()
    for _ in range(given.steps + 1):
        loss = step.run()
        pending.item()
        ends.append(time.perf_counter())
        pending = loss
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    median = statistics.median(seconds)
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    result = {
        "recipe": given.recipe,
        "device": device,
        "torch": torch.__version__,
        "batch_size": batch_size,
        "milliseconds": round(1e3 * median, 2),
        "images_per_second": round(batch_size / median, 1),
        "fastest_milliseconds": round(1e3 * min(seconds), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
