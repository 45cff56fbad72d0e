"""Models of images of the `transformers` library, built from configurations, without dropout.

Norms with running statistics are in eval mode, as in fine-tuning; DETR's have neither statistics
nor an affine that is trained.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
)

from bench.zoo.hugging_face import COMMON, image_inputs
from bench.zoo.model import Inputs, Recipe
from bench.zoo.tuning import LowRank, adapt

CLASSES = 10


def _classifier(build: Callable[[], nn.Module], batch: int, side: int) -> Recipe:
    def build_with_norms_in_eval() -> nn.Module:
        model = build().train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return model

    names = ("pixel_values", "labels")
    return Recipe(
        build_with_norms_in_eval, lambda seed: image_inputs(names, CLASSES, batch, side, seed)
    )


def regnet(
    depths: Sequence[int], widths: Sequence[int], group: int, *, batch: int, side: int
) -> Recipe:
    """RegNet-y, whose blocks have grouped convolutions and squeeze-and-excitation."""
    config = RegNetConfig(
        embedding_size=widths[0] // 4, depths=[*depths], hidden_sizes=[*widths],
        groups_width=group, layer_type="y", num_labels=CLASSES,
    )  # fmt: skip
    return _classifier(lambda: RegNetForImageClassification(config), batch, side)


def mobilenet_v2(*, batch: int, side: int) -> Recipe:
    """MobileNetV2: 17 inverted residuals with depthwise convolutions."""
    config = MobileNetV2Config(
        tf_padding=False, image_size=side, classifier_dropout_prob=0.0, num_labels=CLASSES
    )
    return _classifier(lambda: MobileNetV2ForImageClassification(config), batch, side)


def efficientnet(*, batch: int, side: int, **shape: Any) -> Recipe:
    """EfficientNet; b0, where no other ``shape`` is given in the library's names."""
    b0: dict[str, Any] = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    config = EfficientNetConfig(
        image_size=side, dropout_rate=0.0, drop_connect_rate=0.0, num_labels=CLASSES,
        **(b0 | shape),
    )  # fmt: skip
    return _classifier(lambda: EfficientNetForImageClassification(config), batch, side)


def convnext(depths: Sequence[int], widths: Sequence[int], *, batch: int, side: int) -> Recipe:
    """ConvNeXt, with layer norms and layer scales."""
    config = ConvNextConfig(
        num_stages=len(depths),
        depths=[*depths],
        hidden_sizes=[*widths],
        image_size=side,
        num_labels=CLASSES,
    )
    return _classifier(lambda: ConvNextForImageClassification(config), batch, side)


def tuned_vit(
    layers: int, hidden: int, heads: int, *, tuned: str, batch: int, side: int, patch: int
) -> Recipe:
    """ViT of which a part is trained: ``"lora"`` at queries and values, or the ``"head"``."""
    config = ViTConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        intermediate_size=4 * hidden, image_size=side, patch_size=patch, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **COMMON,
    )  # fmt: skip

    def build() -> nn.Module:
        model: nn.Module = ViTForImageClassification(config)
        if tuned == "lora":
            adapt(model, LowRank, "query", "value", "q_proj", "v_proj")
        else:
            model.requires_grad_(False)
            cast(nn.Module, model.classifier).requires_grad_(True)
        return model

    return _classifier(build, batch, side)


class Detector(nn.Module):
    """DETR and a loss that needs no matching: each query has a class and a box to learn."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.model = DetrForObjectDetection(config)
        for name, parameter in self.model.named_parameters():
            if "backbone" in name:  # of which DETR freezes what is before the second stage
                parameter.requires_grad_(".stages." in name and ".stages.0." not in name)

    def forward(
        self, pixel_values: Tensor, classes: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = self.model(pixel_values=pixel_values)
        loss = F.cross_entropy(found.logits.flatten(0, 1), classes.flatten())
        return loss + F.l1_loss(found.pred_boxes, boxes), found.pred_boxes


def detr(
    widths: Sequence[int], hidden: int, heads: int, *, queries: int, batch: int, side: int
) -> Recipe:
    """DETR: a ResNet with frozen norms, one encoder and one decoder layer."""
    backbone = ResNetConfig(
        embedding_size=widths[0] // 4, hidden_sizes=[*widths], depths=[1] * len(widths),
        out_features=[f"stage{len(widths)}"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=hidden, num_queries=queries, num_labels=CLASSES,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=2 * hidden, decoder_ffn_dim=2 * hidden,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.randn(batch, 3, side, side, generator=generator),
            "classes": torch.randint(0, CLASSES, (batch, queries), generator=generator),
            "boxes": torch.rand(batch, queries, 4, generator=generator),
        }

    return Recipe(lambda: Detector(config).train(), inputs)
