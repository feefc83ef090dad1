"""The product's decoder, as what is installed on a machine allows."""

import torch
from peers import why_not

from engine.data import turbojpeg
from engine.data.decode import Decoder
from engine.data.views import ViewPolicy

__all__ = ["decoder_of"]


def decoder_of(
    pixels: int, device: torch.device, threads: int, batch: int
) -> tuple[Decoder | None, str]:
    """What decodes `batch` images at a time to so many `pixels` a side, and its name; or none, and
    why."""
    policy = ViewPolicy(1, pixels)
    if device.type == "cuda" and not why_not("dali"):
        return Decoder(policy, str(device), threads, batch), "DALI on the GPU"
    if why := why_not("ours"):
        return None, why
    name = "TurboJPEG" if turbojpeg.library() else "DALI"
    return Decoder(policy, "cpu", threads, batch), f"{name} on {threads} cores"
