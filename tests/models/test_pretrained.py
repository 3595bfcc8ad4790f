"""State dicts are put together here from the publishers' own structure, not from our modules.

That these names and the models are those of the packages is the matter of test_published_torch.
"""

import json
import sys

import numpy as np
import pytest
import safetensors.numpy

from mpq_jax.models import MODELS, pretrained
from mpq_jax.models.efficientnet_lite import Stage as LiteStage
from mpq_jax.models.mobilenet_v2 import Stage
from mpq_jax.models.pretrained import (
    MismatchedWeightsError,
    files,
    from_tensors,
    importing,
    read_tensors,
)
from mpq_jax.program import paths


class StateDict(dict):
    """Tensors by name, all numbers different."""

    def add(self, name, *shape):
        start = 1 + sum(tensor.size for tensor in self.values())
        self[name] = np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)

    def conv(self, name, out, channels, size):
        self.add(f"{name}.weight", out, channels, size, size)

    def dense(self, name, out, channels):
        self.add(f"{name}.weight", out, channels)
        self.add(f"{name}.bias", out)

    def norm(self, name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            self.add(f"{name}.{part}", channels)
        self[f"{name}.num_batches_tracked"] = np.array(7)

    def layer_norm(self, name, channels):
        self.add(f"{name}.weight", channels)
        self.add(f"{name}.bias", channels)


def cifar_resnet8(*, shortcut, head):
    """ResNet-8 with 4 channels and 5 classes; `shortcut` "" for those without parameters."""
    state = StateDict()
    state.conv("conv1", 4, 3, 3)
    state.norm("bn1", 4)
    channels = 4
    for layer, out in ((1, 4), (2, 8), (3, 16)):
        state.conv(f"layer{layer}.0.conv1", out, channels, 3)
        state.norm(f"layer{layer}.0.bn1", out)
        state.conv(f"layer{layer}.0.conv2", out, out, 3)
        state.norm(f"layer{layer}.0.bn2", out)
        if shortcut and out != channels:
            state.conv(f"layer{layer}.0.{shortcut}.0", out, channels, 1)
            state.norm(f"layer{layer}.0.{shortcut}.1", out)
        channels = out
    state.dense(head, 5, 16)
    return state


def torchvision_resnet50():
    """ResNet-50 with two blocks in two stages, 2 channels and 3 classes."""
    state = StateDict()
    state.conv("conv1", 2, 3, 7)
    state.norm("bn1", 2)
    channels = 2
    for layer, inner in ((1, 2), (2, 4)):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            state.conv(f"{name}.conv1", inner, channels, 1)
            state.norm(f"{name}.bn1", inner)
            state.conv(f"{name}.conv2", inner, inner, 3)
            state.norm(f"{name}.bn2", inner)
            state.conv(f"{name}.conv3", 4 * inner, inner, 1)
            state.norm(f"{name}.bn3", 4 * inner)
            if block == 0:
                state.conv(f"{name}.downsample.0", 4 * inner, channels, 1)
                state.norm(f"{name}.downsample.1", 4 * inner)
            channels = 4 * inner
    state.dense("fc", 3, channels)
    return state


def torchvision_mobilenet_v2():
    """MobileNetV2 with stages of one and of two blocks, 3 classes."""
    state = StateDict()
    state.conv("features.0.0", 32, 3, 3)
    state.norm("features.0.1", 32)
    state.conv("features.1.conv.0.0", 32, 1, 3)
    state.norm("features.1.conv.0.1", 32)
    state.conv("features.1.conv.1", 16, 32, 1)
    state.norm("features.1.conv.2", 16)
    for number, channels in ((2, 16), (3, 24)):
        state.conv(f"features.{number}.conv.0.0", 2 * channels, channels, 1)
        state.norm(f"features.{number}.conv.0.1", 2 * channels)
        state.conv(f"features.{number}.conv.1.0", 2 * channels, 1, 3)
        state.norm(f"features.{number}.conv.1.1", 2 * channels)
        state.conv(f"features.{number}.conv.2", 24, 2 * channels, 1)
        state.norm(f"features.{number}.conv.3", 24)
    state.conv("features.4.0", 1280, 24, 1)
    state.norm("features.4.1", 1280)
    state.dense("classifier.1", 3, 1280)
    return state


def timm_inverted_residuals(*, size):
    """The same blocks by timm's names; depthwise kernels of the second stage have this size."""
    state = StateDict()
    state.conv("conv_stem", 32, 3, 3)
    state.norm("bn1", 32)
    state.conv("blocks.0.0.conv_dw", 32, 1, 3)
    state.norm("blocks.0.0.bn1", 32)
    state.conv("blocks.0.0.conv_pw", 16, 32, 1)
    state.norm("blocks.0.0.bn2", 16)
    for number, channels in ((0, 16), (1, 24)):
        state.conv(f"blocks.1.{number}.conv_pw", 2 * channels, channels, 1)
        state.norm(f"blocks.1.{number}.bn1", 2 * channels)
        state.conv(f"blocks.1.{number}.conv_dw", 2 * channels, 1, size)
        state.norm(f"blocks.1.{number}.bn2", 2 * channels)
        state.conv(f"blocks.1.{number}.conv_pwl", 24, 2 * channels, 1)
        state.norm(f"blocks.1.{number}.bn3", 24)
    state.conv("conv_head", 1280, 24, 1)
    state.norm("bn2", 1280)
    state.dense("classifier", 3, 1280)
    return state


def efficientnet_lite_pytorch():
    """The same blocks by efficientnet_lite_pytorch's names."""
    state = StateDict()
    state.conv("_conv_stem", 32, 3, 3)
    state.norm("_bn0", 32)
    state.conv("_blocks.0._depthwise_conv", 32, 1, 3)
    state.norm("_blocks.0._bn1", 32)
    state.conv("_blocks.0._project_conv", 16, 32, 1)
    state.norm("_blocks.0._bn2", 16)
    for number, channels in ((1, 16), (2, 24)):
        state.conv(f"_blocks.{number}._expand_conv", 2 * channels, channels, 1)
        state.norm(f"_blocks.{number}._bn0", 2 * channels)
        state.conv(f"_blocks.{number}._depthwise_conv", 2 * channels, 1, 5)
        state.norm(f"_blocks.{number}._bn1", 2 * channels)
        state.conv(f"_blocks.{number}._project_conv", 24, 2 * channels, 1)
        state.norm(f"_blocks.{number}._bn2", 24)
    state.conv("_conv_head", 1280, 24, 1)
    state.norm("_bn1", 1280)
    state.dense("_fc", 3, 1280)
    return state


def pytorch_cifar_vgg(*, biases):
    """VGG with stages of one and of two convolutions, 3 classes."""
    state = StateDict()
    for place, channels, out in ((0, 3, 4), (4, 4, 6), (7, 6, 6)):  # a pooling is at 3
        state.conv(f"features.{place}", out, channels, 3)
        if biases:
            state.add(f"features.{place}.bias", out)
        state.norm(f"features.{place + 1}", out)
    state.dense("classifier", 3, 6)
    return state


def timm_vit():
    """ViT with one block of 12 channels, patches of 4 pixels of an image of 8, 5 classes."""
    state = StateDict()
    state.add("cls_token", 1, 1, 12)
    state.add("pos_embed", 1, 5, 12)
    state.conv("patch_embed.proj", 12, 3, 4)
    state.add("patch_embed.proj.bias", 12)
    state.layer_norm("blocks.0.norm1", 12)
    state.dense("blocks.0.attn.qkv", 36, 12)
    state.dense("blocks.0.attn.proj", 12, 12)
    state.layer_norm("blocks.0.norm2", 12)
    state.dense("blocks.0.mlp.fc1", 24, 12)
    state.dense("blocks.0.mlp.fc2", 12, 24)
    state.layer_norm("norm", 12)
    state.dense("head", 5, 12)
    return state


TWO_STAGES = {"stages": (Stage(1, 16, 1, 1), Stage(2, 24, 2, 2))}
LITE_STAGES = {"stages": (LiteStage(1, 3, 16, 1, 1), LiteStage(2, 5, 24, 2, 2))}
TINY_VGG = {"stage_sizes": (1, 2), "stage_channels": (4, 6)}
TINY_VIT = {"dim": 12, "depth": 1, "mlp_ratio": 2.0, "patch_size": 4, "image_shape": (8, 8, 3)}
CASES = {
    # name: (state dict, model, options, some of our arrays and the tensors that they are)
    "resnet, pytorch_resnet_cifar10, A": (
        cifar_resnet8(shortcut="", head="linear"),
        "resnet8",
        {"width": 4},
        {
            "params/stem_conv/kernel": "conv1.weight",
            "params/stem_norm/scale": "bn1.weight",
            "params/stage1_block0/conv2/kernel": "layer2.0.conv2.weight",
            "batch_stats/stage2_block0/norm1/mean": "layer3.0.bn1.running_mean",
            "batch_stats/stage0_block0/norm2/var": "layer1.0.bn2.running_var",
            "params/head/kernel": "linear.weight",
            "params/head/bias": "linear.bias",
        },
    ),
    "resnet, pytorch_resnet_cifar10, B": (
        cifar_resnet8(shortcut="shortcut", head="linear"),
        "resnet8",
        {"width": 4, "shortcut": "B"},
        {"params/stage1_block0/shortcut_conv/kernel": "layer2.0.shortcut.0.weight"},
    ),
    "resnet, pytorch-cifar-models": (
        cifar_resnet8(shortcut="downsample", head="fc"),
        "resnet8",
        {"width": 4, "shortcut": "B"},
        {
            "params/stage2_block0/shortcut_norm/bias": "layer3.0.downsample.1.bias",
            "params/head/kernel": "fc.weight",
        },
    ),
    "resnet, torchvision": (
        torchvision_resnet50(),
        "resnet50",
        {"width": 2, "stage_sizes": (2, 2)},
        {
            "params/stage0_block0/shortcut_conv/kernel": "layer1.0.downsample.0.weight",
            "params/stage1_block1/conv3/kernel": "layer2.1.conv3.weight",
            "batch_stats/stage1_block0/norm3/mean": "layer2.0.bn3.running_mean",
        },
    ),
    "mobilenet, torchvision": (
        torchvision_mobilenet_v2(),
        "mobilenet_v2",
        TWO_STAGES,
        {
            "params/stage0_block0/depthwise/kernel": "features.1.conv.0.0.weight",
            "params/stage0_block0/project/kernel": "features.1.conv.1.weight",
            "params/stage1_block1/expand/kernel": "features.3.conv.0.0.weight",
            "params/stage1_block0/depthwise/kernel": "features.2.conv.1.0.weight",
            "batch_stats/stage1_block1/project_norm/var": "features.3.conv.3.running_var",
            "params/last_conv/kernel": "features.4.0.weight",
            "params/head/kernel": "classifier.1.weight",
        },
    ),
    "mobilenet, timm": (
        timm_inverted_residuals(size=3),
        "mobilenet_v2",
        TWO_STAGES,
        {
            "params/stage0_block0/project/kernel": "blocks.0.0.conv_pw.weight",
            "batch_stats/stage0_block0/depthwise_norm/mean": "blocks.0.0.bn1.running_mean",
            "params/stage1_block1/expand/kernel": "blocks.1.1.conv_pw.weight",
            "params/stage1_block1/project_norm/bias": "blocks.1.1.bn3.bias",
            "params/last_norm/scale": "bn2.weight",
            "params/head/kernel": "classifier.weight",
        },
    ),
    "efficientnet, timm": (
        timm_inverted_residuals(size=5),
        "efficientnet_lite0",
        LITE_STAGES,
        {
            "params/stage1_block0/depthwise/kernel": "blocks.1.0.conv_dw.weight",
            "params/stage1_block0/project/kernel": "blocks.1.0.conv_pwl.weight",
        },
    ),
    "efficientnet, efficientnet_lite_pytorch": (
        efficientnet_lite_pytorch(),
        "efficientnet_lite0",
        LITE_STAGES,
        {
            "params/stem_conv/kernel": "_conv_stem.weight",
            "batch_stats/stage0_block0/project_norm/mean": "_blocks.0._bn2.running_mean",
            "params/stage1_block1/depthwise/kernel": "_blocks.2._depthwise_conv.weight",
            "params/stage1_block0/expand_norm/scale": "_blocks.1._bn0.weight",
            "params/last_conv/kernel": "_conv_head.weight",
            "params/head/bias": "_fc.bias",
        },
    ),
    "vgg, pytorch-cifar": (
        pytorch_cifar_vgg(biases=False),
        "vgg19_bn",
        TINY_VGG,
        {
            "params/stage0_conv0/kernel": "features.0.weight",
            "params/stage1_conv0/kernel": "features.4.weight",
            "params/stage1_norm1/scale": "features.8.weight",
            "batch_stats/stage1_norm0/var": "features.5.running_var",
        },
    ),
    "vit, timm": (
        timm_vit(),
        "vit_tiny",
        TINY_VIT,
        {
            "params/class_token": "cls_token",
            "params/position_embedding": "pos_embed",
            "params/patch_embed/kernel": "patch_embed.proj.weight",
            "params/block0/out/kernel": "blocks.0.attn.proj.weight",
            "params/block0/norm2/scale": "blocks.0.norm2.weight",
            "params/block0/mlp1/kernel": "blocks.0.mlp.fc1.weight",
            "params/block0/mlp2/bias": "blocks.0.mlp.fc2.bias",
            "params/norm/bias": "norm.bias",
            "params/head/kernel": "head.weight",
        },
    ),
}


def as_ours(tensor):
    """Puts the axes (out, in, ...) at the end, as (..., in, out); vectors and tokens stay."""
    if tensor.ndim == 4:
        return np.einsum("oihw->hwio", tensor)
    return tensor.T


def numbers(arrays):
    return np.sort(np.concatenate([np.ravel(array) for array in arrays]))


@pytest.mark.slow_but_first
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_finds_its_place(name):
    state, model, options, expected = CASES[name]
    found = paths.flatten(from_tensors(model, dict(state), **options))
    for path, tensor in expected.items():
        wanted = state[tensor] if state[tensor].ndim == 3 else as_ours(state[tensor])
        np.testing.assert_array_equal(found[path], wanted, err_msg=path)
    tensors = [tensor for name, tensor in state.items() if "num_batches" not in name]
    np.testing.assert_array_equal(numbers(found.values()), numbers(tensors))
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in found.values())


def test_every_model_has_namings():
    assert set(importing.NAMINGS) == set(MODELS)


def test_query_key_and_value_are_thirds_of_one_matrix():
    state = timm_vit()
    block = from_tensors("vit_tiny", state, **TINY_VIT)["params"]["block0"]
    weight, bias = state["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.bias"]
    for number, part in enumerate(("query", "key", "value")):
        rows = slice(12 * number, 12 * number + 12)
        np.testing.assert_array_equal(block[part]["kernel"], weight[rows].T)
        np.testing.assert_array_equal(block[part]["bias"], bias[rows])


def test_biases_before_a_norm_go_into_its_mean():
    state = pytorch_cifar_vgg(biases=True)
    stats = from_tensors("vgg19_bn", state, **TINY_VGG)["batch_stats"]
    mean = state["features.8.running_mean"] - state["features.7.bias"]
    np.testing.assert_array_equal(stats["stage1_norm1"]["mean"], mean)
    np.testing.assert_array_equal(stats["stage1_norm1"]["var"], state["features.8.running_var"])


def test_biases_before_a_norm_have_its_shape():
    state = pytorch_cifar_vgg(biases=True)
    state["features.4.bias"] = np.zeros(1, np.float32)
    with pytest.raises(MismatchedWeightsError) as caught:
        from_tensors("vgg19_bn", state, **TINY_VGG)
    assert caught.value.unexpected == ["features.4.bias"]


def test_what_does_not_fit_is_listed_by_name():
    state = cifar_resnet8(shortcut="", head="linear")
    state["layer2.0.bn1.extra"] = state.pop("layer2.0.bn1.weight")
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    state["layer1.0.bn1.bias"] = np.float32(1)
    with pytest.raises(MismatchedWeightsError) as caught:
        from_tensors("resnet8", state, width=4)
    error = caught.value
    assert error.missing == ["layer2.0.bn1.weight"]
    assert error.unexpected == ["layer2.0.bn1.extra"]
    assert list(error.misshaped) == ["layer1.0.bn1.bias", "conv1.weight"]
    lines = [
        "these tensors are not those of 'resnet8', width=4, by the names of pytorch_resnet_cifar10 "
        "(also known: those of pytorch-cifar-models):",
        "1 missing:",
        "layer2.0.bn1.weight",
        "1 unexpected:",
        "layer2.0.bn1.extra",
        "2 wrongly shaped:",
        "conv1.weight (4, 1, 3, 3) makes params/stem_conv/kernel (3, 3, 1, 4), wanted (3, 3, 3, 4)",
    ]
    assert [line for line in lines if line not in str(error)] == []


def test_a_head_must_have_as_many_biases_as_classes():
    state = cifar_resnet8(shortcut="", head="linear")
    state["linear.bias"] = np.zeros(4, np.float32)
    with pytest.raises(MismatchedWeightsError) as caught:
        from_tensors("resnet8", state, width=4)
    assert list(caught.value.misshaped) == ["linear.bias"]


def test_a_long_list_is_cut_in_the_message_only():
    with pytest.raises(MismatchedWeightsError, match=r"\.\.\. and 17 more") as caught:
        from_tensors("resnet8", {"foo": np.zeros(1)})
    assert len(caught.value.missing) == 37 and caught.value.unexpected == ["foo"]


def test_import_reads_a_file_and_says_which_does_not_fit(tmp_path):
    state = cifar_resnet8(shortcut="", head="linear")
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(state, path)
    found = pretrained.import_torch("resnet8", path, width=4)
    np.testing.assert_array_equal(found["params"]["head"]["bias"], state["linear.bias"])
    with pytest.raises(MismatchedWeightsError, match=r"weights\.safetensors: these tensors"):
        pretrained.import_torch("resnet20", path, width=4)
    with pytest.raises(ValueError, match="'resnet9'; known models"):
        pretrained.import_torch("resnet9", path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_away(prefix):
    tensors = {f"{prefix}{name}": np.zeros(1) for name in ("module.a", "conv1.weight")}
    assert set(files.without_wrappers(tensors)) == {"module.a", "conv1.weight"}


def test_prefixes_that_not_all_names_share_stay():
    tensors = {"module.a": np.zeros(1), "b": np.zeros(1)}
    assert set(files.without_wrappers(tensors)) == {"module.a", "b"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"a": 1}, {"a": 1}),
        ({"state_dict": {"a": 1}, "epoch": 3}, {"a": 1}),
        ({"model": {"a": 1}, "optimizer": {}}, {"a": 1}),
        ({"net": {"a": 1}, "acc": 0.9}, {"a": 1}),
        ({"state_dict": {"a": 1}, "state_dict_ema": {"a": 2}}, {"a": 2}),
        ({"model": {"state_dict": {"a": 1}}}, {"a": 1}),
        ({"model": 5}, {"model": 5}),
        ([1, 2], None),
    ],
)
def test_envelopes_are_opened(content, found):
    assert files.open_envelope(content) == found


def write_by_hand(path, dtype, content):
    """Writes a vector in safetensors' format; NumPy does not have all its types."""
    size = len(content) // {"F16": 2, "BF16": 2, "F64": 8}[dtype]
    entry = {"dtype": dtype, "shape": [size], "data_offsets": [0, len(content)]}
    header = json.dumps({"a": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)


@pytest.mark.parametrize(
    ("dtype", "content"),
    [
        ("F16", np.array([1.5, -2.0], np.float16).tobytes()),
        ("F64", np.array([1.5, -2.0], np.float64).tobytes()),
        ("BF16", np.array([1.5, -2.0], np.float32).view(np.uint16)[1::2].tobytes()),
    ],
)
def test_all_floats_become_float32(tmp_path, dtype, content):
    path = tmp_path / "a.safetensors"
    write_by_hand(path, dtype, content)
    tensor = read_tensors(path)["a"]
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, [1.5, -2.0])


def test_damaged_and_absent_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.safetensors"):
        read_tensors(path)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="not a complete safetensors file .* pointer to a file"):
        read_tensors(path)
    with pytest.raises(ValueError, match=r"called '.npz'; wanted a file of \['.safetensors'"):
        read_tensors(tmp_path / "a.npz")


def test_pickled_files_need_pytorch(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"a\.pth .* install mpq_jax\[torch\], or take"):
        read_tensors(path)
