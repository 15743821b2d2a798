"""unet.py: a plain residual U-Net, the kind of baseline that The Well reports.

well_i2v.py uses it as --mode unet, without a video model, and as the last part of its inverse adapter.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class Conv(nn.Conv2d):
    """A 3x3 convolution with circular padding on periodic axes and replicate padding on others."""
    def __init__(self, c_in, c_out, periodic=(False, False)):
        super().__init__(c_in, c_out, 3)
        self.modes = ["circular" if axis else "replicate" for axis in periodic]

    def forward(self, x):
        x = F.pad(x, (0, 0, 1, 1), mode=self.modes[0])
        return super().forward(F.pad(x, (1, 1, 0, 0), mode=self.modes[1]))


class ConvBlock(nn.Module):
    """A residual block, B c_in H W -> B c_out H W."""
    def __init__(self, c_in, c_out, periodic):
        super().__init__()
        self.conv1 = Conv(c_in, c_out, periodic)
        self.norm = nn.GroupNorm(4, c_out)
        self.conv2 = Conv(c_out, c_out, periodic)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.skip(x) + self.conv2(F.silu(self.norm(self.conv1(x))))


class UNet(nn.Module):
    """A plain residual U-Net on patches of 2 x 2, B c_in H W -> B c_out H W, initially zero. H and W are
    multiples of 8."""
    def __init__(self, c_in, c_out, width, periodic, autocast):
        super().__init__()
        self.autocast = autocast
        self.first = Conv(4 * c_in, width, periodic)
        self.down = nn.ModuleList([ConvBlock(width, width, periodic), ConvBlock(width, 2 * width, periodic)])
        self.middle = ConvBlock(2 * width, 4 * width, periodic)
        self.up = nn.ModuleList([ConvBlock(6 * width, 2 * width, periodic),
                                 ConvBlock(3 * width, width, periodic)])
        self.last = Conv(width, 4 * c_out, periodic)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def change(self, x):
        with self.autocast():
            skips, x = [], self.first(F.pixel_unshuffle(x, 2))
            for block in self.down:
                skips.append(block(x))
                x = F.avg_pool2d(skips[-1], 2)
            x = self.middle(x)
            for block in self.up:
                x = block(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], dim=1))
            return F.pixel_shuffle(self.last(F.silu(x)), 2).float()
