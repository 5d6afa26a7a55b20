"""Networks of timm (https://github.com/huggingface/pytorch-image-models) as a user would bring them."""

from __future__ import annotations

from pq_sweep.types import Model, Preprocess

# One small network of each family.
FAMILIES = (
    "convnext_atto", "edgenext_xx_small", "efficientnet_lite0", "ghostnet_050", "levit_128s", "mixer_s32_224",
    "mobilenetv3_small_050", "mobilevit_xxs", "regnety_002", "repvgg_a0", "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
)  # fmt: skip


def timm_model(*, name: str) -> Model:
    """Return a network of timm with random weights and the preprocessing that it was trained with."""
    import timm

    network = timm.create_model(name, pretrained=False)
    about = network.pretrained_cfg
    size, resize = about["input_size"][1], round(about["input_size"][1] / about["crop_pct"])
    return Model(network, about["num_classes"], Preprocess(size, resize, 3, about["mean"], about["std"]))
