"""The caption that shows that a decoder works: real, and as cheap as there is one."""

from __future__ import annotations

import json

from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.gateway.decoder_client import Description
from captionserve_server.gateway.kserve import InputTensor, encode_strings
from captionserve_server.triton import wire

# One black pixel as a binary PPM, the smallest image there is.
_IMAGE = b"P6 1 1 255\n\0\0\0"
# A step for one token; the same caption for a checkpoint whose own options are long or wide.
_OPTIONS = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "max_new_tokens": 1}


def canary(description: Description) -> list[InputTensor]:
    """The decoder's inputs that ask a version for it."""
    options = _OPTIONS
    try:
        description.defaults.with_given(options)
    except InvalidOptionsError:  # The checkpoint asks for more, such as a least length.
        options = {}
    image = InputTensor(wire.IMAGE, (1,), encode_strings([_IMAGE]))
    encoded = json.dumps(options).encode()
    return [image, InputTensor(wire.OPTIONS, (1,), encode_strings([encoded]))]
