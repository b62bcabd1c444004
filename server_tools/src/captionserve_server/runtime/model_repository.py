"""Where everything lies in a model repository: folders of models, files of their versions.

    decoder/            bundle.json, tokenizer.json, preprocessor.json, prefill, step and top graphs
    vision_encoder/     the encoder's graph
    captioner/          a front for KServe callers, without files of its own
    captioner_stream/   likewise, decoupled

Each has a config.pbtxt and a folder for every version. `export` writes it; Triton and the edge mode
read it.
"""

from __future__ import annotations

DECODER = "decoder"
VISION_ENCODER = "vision_encoder"
CAPTIONER = "captioner"
CAPTIONER_STREAM = "captioner_stream"
MODELS = (DECODER, VISION_ENCODER, CAPTIONER, CAPTIONER_STREAM)

BUNDLE_FILE = "bundle.json"
TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor.json"
# The graphs' files in ONNX; GraphFormat.file says what they are called in another format.
ENCODER_GRAPH_FILE = "model.onnx"
PREFILL_GRAPH_FILE = "prefill.onnx"
STEP_GRAPH_FILE = "step.onnx"
TOP_GRAPH_FILE = "top.onnx"
