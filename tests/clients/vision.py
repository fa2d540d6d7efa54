"""Classifiers of timm."""

from torch.utils.data import TensorDataset

from tests.clients.plain import Supervised
from tests.clients.registry import Project, client, images, loaders


@client("timm_resnet18", "timm", model="resnet18")
@client("timm_vit_tiny", "timm", model="vit_tiny_patch16_224", img_size=32)
@client("timm_convnext_atto", "timm", model="convnext_atto")
@client("timm_mobilenetv3", "timm", model="mobilenetv3_small_050")
def ten_classes(model: str, **options: int) -> Project:
    import timm

    module = Supervised(timm.create_model(model, num_classes=10, **options))
    return Project(module, loaders(TensorDataset(*images(64, 10, 32)), TensorDataset(*images(168, 10, 32))))


@client("timm_resnet18_1000", "timm")
def thousand_classes() -> Project:
    """More classes than samples: no class has more than one of them."""
    import timm

    module = Supervised(timm.create_model("resnet18", num_classes=1000))
    return Project(module, loaders(TensorDataset(*images(64, 1000, 32)), TensorDataset(*images(136, 1000, 32))))
