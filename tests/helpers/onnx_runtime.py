"""Runs of ONNX graphs and of the networks that they were made from."""

import jax
import numpy as np
import onnxruntime

from mpq_jax.export import exported_model
from mpq_jax.export.onnx.converter import IMAGES

# Sums are rounded in another order and norms are folded: some float32 roundings in all, part of
# the largest logit. The images are such that no input of a layer changes its integer by them.
ROUNDING = 1e-5
LEVELS = onnxruntime.GraphOptimizationLevel


def run(model, images, *, level=LEVELS.ORT_ENABLE_ALL, outputs=None, fold=False):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    if fold:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found = session.run(outputs, {IMAGES: images})
    return found if outputs else found[0]


def logits_of(exported, images):
    return np.asarray(jax.jit(lambda x: exported_model.logits(exported, x))(images))
