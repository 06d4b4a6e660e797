"""Small versions of well-known architectures for images of 16 x 16 pixels, trained from scratch in seconds.

The convolutional ones end in a 4 x 4 feature map that is flattened, as in digits-cnn, since digits need position.
"""

import torch
from torch import Tensor, nn

from flatlab.models.transformer import WIDTH, Block

SIDE, PATCH, LAYERS = 16, 4, 3  # of the patch transformer: side of an image and of a patch (pixels), number of blocks
PLACES = 4  # side of the last feature map of the convolutional networks
EMBEDDED = 32  # dimension of the space that images and captions share


class PatchTransformer(nn.Module):
    """A vision transformer (ViT, DeiT): patches and a class token through pre-norm blocks; returns the class token.

    Args:
        in_channels: channels of the images.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, WIDTH, PATCH, stride=PATCH)
        self.token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.position = nn.Parameter(torch.empty(1 + (SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        for table in (self.token, self.position):
            nn.init.trunc_normal_(table, std=0.02)  # as DeiT's

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, WIDTH) of images (N, C, SIDE, SIDE)."""
        cells = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(images.shape[0], -1, -1), cells], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """ResNeXt's block (Xie et al. 2017): 1 x 1, 3 x 3 in eight groups and 1 x 1 convolutions, with a shortcut."""

    def __init__(self, wide: int, wider: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.Conv2d(wide, wider, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()),
            nn.Conv2d(wider, wider, 3, stride=stride, padding=1, groups=8, bias=False),
            *(nn.BatchNorm2d(wider), nn.ReLU()),
            *(nn.Conv2d(wider, wider, 1, bias=False), nn.BatchNorm2d(wider)),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(wide, wider, 1, stride=stride, bias=False), nn.BatchNorm2d(wider))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's feature maps."""
        return self.relu(self.inner(x) + self.shortcut(x))  # type: ignore[no-any-return]


class Dense(nn.Module):
    """DenseNet's layer (Huang et al. 2017): BatchNorm, ReLU, 3 x 3 convolution, concatenated with its input."""

    def __init__(self, wide: int, growth: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(wide), nn.ReLU()
        self.convolution = nn.Conv2d(wide, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return input and output, concatenated along the channels."""
        return torch.cat([x, self.convolution(self.relu(self.norm(x)))], dim=1)


class Embedded(nn.Module):
    """A network whose projected features are unit vectors times a learned factor, the inverse of CLIP's temperature.

    Args:
        tower: returns features (N, width).
        width: width of these features.
    """

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower, self.projection = tower, nn.Linear(width, EMBEDDED, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's initial value

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features (N, EMBEDDED)."""
        return self.log_scale.exp() * nn.functional.normalize(self.projection(self.tower(inputs)), dim=-1)


def vit(in_channels: int) -> tuple[nn.Module, int]:
    """Return a patch transformer, and the width of its features."""
    return PatchTransformer(in_channels), WIDTH


def clip(in_channels: int) -> tuple[nn.Module, int]:
    """Return the image tower of a small CLIP: a patch transformer, projected and scaled."""
    return Embedded(PatchTransformer(in_channels), WIDTH), EMBEDDED


def resnext(in_channels: int) -> tuple[nn.Module, int]:
    """Return a ResNeXt of three blocks, and the width of its features."""
    stem = (nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Bottleneck(16, 16, 1), Bottleneck(16, 32, 2), Bottleneck(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(PLACES), nn.Flatten()), PLACES**2 * 64


def densenet(in_channels: int) -> tuple[nn.Module, int]:
    """Return a DenseNet of three dense blocks of three layers, and the width of its features."""
    wide, growth = 16, 12
    layers: list[nn.Module] = [nn.Conv2d(in_channels, wide, 3, padding=1, bias=False)]
    for block in range(3):
        if block:
            half = wide // 2
            layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, half, 1, bias=False), nn.AvgPool2d(2)]
            wide = half
        layers.append(nn.Sequential(*(Dense(wide + index * growth, growth) for index in range(3))))
        wide += 3 * growth
    layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.AdaptiveAvgPool2d(PLACES), nn.Flatten()]
    return nn.Sequential(*layers), PLACES**2 * wide


class CaptionTower(nn.Module):
    """From captions, as ids of characters (N, T) with 0 for padding, to unit vectors in the space of the images."""

    def __init__(self, characters: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(length, WIDTH))
        self.block, self.norm = Block(), nn.LayerNorm(WIDTH)
        self.projection = nn.Linear(WIDTH, EMBEDDED, bias=False)

    def forward(self, captions: Tensor) -> Tensor:
        """Return the vectors (N, EMBEDDED)."""
        seen = captions != 0
        x = self.norm(self.block(self.embedding(captions) + self.position, seen[:, None, None])) * seen[..., None]
        return nn.functional.normalize(self.projection(x.sum(1)), dim=-1)
