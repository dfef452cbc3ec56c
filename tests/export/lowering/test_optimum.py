"""A second opinion on the text encoder: the same checkpoint through optimum's exporter, which users know."""

import numpy as np
import onnxruntime
import pyrexport
import pytest
from optimum.exporters.onnx import export
from optimum.exporters.onnx.config import TextEncoderOnnxConfig
from optimum.utils import NormalizedTextConfig
from pyrexport.runtime.bundle.manifest import TOKENIZER_FILE
from pyrexport.runtime.pipeline.text import Tokenizer
from pyrexport.runtime.proof.metrics import distance
from transformers import UMT5EncoderModel


class Umt5EncoderOnnxConfig(TextEncoderOnnxConfig):
    """optimum has none for UMT5."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig.with_args(
        hidden_size="d_model", num_attention_heads="num_heads", num_layers="num_layers", vocab_size="vocab_size"
    )
    ATOL_FOR_VALIDATION = 1e-4

    @property
    def inputs(self):
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"input_ids": axes, "attention_mask": axes}

    @property
    def outputs(self):
        return {"last_hidden_state": {0: "batch_size", 1: "sequence_length"}}


@pytest.mark.slow
def test_optimums_graph_of_the_text_encoder_gives_the_same_embeddings(bundle, tiny, tmp_path):
    """TorchScript export: about 15 s."""
    model = UMT5EncoderModel.from_pretrained(tiny / "text_encoder").eval()
    export(model, Umt5EncoderOnnxConfig(model.config, task="feature-extraction"), tmp_path / "text.onnx", opset=17)
    theirs = onnxruntime.InferenceSession(str(tmp_path / "text.onnx"))
    ids = Tokenizer(bundle / TOKENIZER_FILE, 64)("a red circle moving left").ids
    inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    expected = theirs.run(None, inputs)[0][0]
    with pyrexport.load(bundle) as pipeline:
        found = pipeline.encode("a red circle moving left")
    assert distance(found[: len(ids)], expected).relative_l2 <= 1e-5
    assert not found[len(ids) :].any()
