"""Names of ResNets: torchvision's, which timm and many others share, and those of CIFAR ResNets."""

import functools

from mpq_jax.models.pretrained.naming import Naming, renamed, split_block


def _name(module: str, *, shortcut: str, head: str) -> str:
    inside = split_block(module)
    if inside is None:
        return {"stem_conv": "conv1", "stem_norm": "bn1", "head": head}[module]
    stage, block, part = inside
    parts = {"shortcut_conv": f"{shortcut}.0", "shortcut_norm": f"{shortcut}.1"}
    return f"layer{stage + 1}.{block}.{parts.get(part, part.replace('norm', 'bn'))}"


def _naming(publisher: str, *, shortcut: str, head: str) -> Naming:
    name = functools.partial(_name, shortcut=shortcut, head=head)
    return Naming(publisher, functools.partial(renamed, name=name))


TORCHVISION = _naming("torchvision and timm", shortcut="downsample", head="fc")
PYTORCH_CIFAR_MODELS = TORCHVISION._replace(publisher="pytorch-cifar-models")
PYTORCH_RESNET_CIFAR10 = _naming("pytorch_resnet_cifar10", shortcut="shortcut", head="linear")
