"""Giving a checkpoint another image size: its position embeddings interpolated, once and for all.

What transformers computes at each call with interpolate_pos_encoding=True does not depend on the
image, so the graphs get the result as their weights and cost what any checkpoint of that size does.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import VisionEncoderDecoderModel

from captionserve_server.core.preprocessing import PreprocessorConfig

# Attention's memory grows with its fourth power: at 1024 and patches of 16 it is 800 MB an image.
MAX_IMAGE_SIZE = 1024


class UnsupportedImageSizeError(ValueError):
    """The checkpoint cannot read images of the size asked for."""


def check_image_size(encoder: Any, image_size: int) -> None:
    """Refuse a size before any weights are read.

    Args:
        encoder: a ViT or DeiT configuration.
        image_size: rows and columns of the images, in pixels.

    Raises:
        UnsupportedImageSizeError: if it is no multiple of the patches or too large, or transformers
            could not interpolate either.
    """
    patch = encoder.patch_size
    # transformers takes the root of the number of patches, and one number for a patch's sides.
    own = encoder.image_size if isinstance(encoder.image_size, int) else None
    if own is None and len(set(encoder.image_size)) == 1:
        own = encoder.image_size[0]
    if own is None or not isinstance(patch, int):
        raise UnsupportedImageSizeError(
            "the checkpoint's images and patches must be squares to be interpolated"
        )
    if image_size % patch or not 0 < image_size <= MAX_IMAGE_SIZE:
        raise UnsupportedImageSizeError(
            f"must be a multiple of the checkpoint's patches of {patch} pixels, "
            f"at most {MAX_IMAGE_SIZE}, is {image_size}"
        )


@torch.no_grad()
def interpolate_positions(model: VisionEncoderDecoderModel, image_size: int) -> None:
    """Let a model read images of another size, as transformers does with interpolation."""
    embeddings: Any = model.encoder.embeddings
    patches: Any = embeddings.patch_embeddings
    special = embeddings.position_embeddings.shape[1] - patches.num_patches
    count = (image_size // embeddings.patch_size) ** 2
    of_new_size = torch.empty(1, special + count, embeddings.position_embeddings.shape[2])
    positions = embeddings.interpolate_pos_encoding(of_new_size, image_size, image_size)
    embeddings.position_embeddings = nn.Parameter(positions.clone())
    patches.num_patches = count
    embeddings.image_size = patches.image_size = (image_size, image_size)
    whole: Any = model.config
    for config in (whole.encoder, model.encoder.config):
        config.image_size = image_size


def preprocessor_of_size(preprocessor: PreprocessorConfig, image_size: int) -> PreprocessorConfig:
    """The image processor with results of another size; what is cut off keeps its share."""
    if not preprocessor.do_center_crop:
        return dataclasses.replace(preprocessor, height=image_size, width=image_size)
    share = image_size / preprocessor.crop_height
    edges = {
        name: round(edge * share)
        for name in ("height", "width", "shortest_edge")
        if (edge := getattr(preprocessor, name)) is not None
    }
    return dataclasses.replace(preprocessor, crop_height=image_size, crop_width=image_size, **edges)
