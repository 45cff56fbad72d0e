"""The table of models: one line or two per entry."""

from collections.abc import Mapping

from bench.zoo import (
    behaviours,
    decoders,
    decoding,
    hugging_face,
    language,
    speech,
    vision,
    vision_library,
)
from bench.zoo.model import Model, Recipe


def _model(name: str, tags: str, **sizes: Recipe) -> Model:
    return Model(name=name, sizes=sizes, tags=frozenset(tags.split()))


_HF = "transformer hugging_face checkpoint inference"
_CAUSAL = _HF + " float32_loss"
_CONV = "conv checkpoint inference"

_ENTRIES = (
    _model("llama", _CAUSAL, tiny=hugging_face.llama(2, 512, 64, 128, 4, 2, batch=2, length=64)),
    _model("llama_a", _CAUSAL,
        bench=hugging_face.llama(4, 32000, 512, 1536, 8, 4, batch=1, length=1024)),
    _model("llama_b", _CAUSAL,
        bench=hugging_face.llama(8, 2048, 256, 768, 8, 4, batch=4, length=512)),
    _model("llama_head", _CAUSAL,
        small=hugging_face.llama(1, 16000, 64, 128, 4, 2, batch=1, length=256),
        bench=hugging_face.llama(2, 128256, 512, 1536, 8, 4, batch=1, length=1024)),
    _model("llama_grouped", _CAUSAL,
        long=hugging_face.llama(4, 2048, 256, 768, 8, 2, batch=1, length=2048)),
    _model("llama_written_out", _CAUSAL,
        tiny=hugging_face.llama(
            2, 512, 64, 128, 4, 2, batch=2, length=64, attn_implementation="eager"),
        long=hugging_face.llama(
            4, 2048, 256, 768, 8, 2, batch=1, length=2048, attn_implementation="eager")),
    _model("static_cache", "mutation inference",
        long=decoding.static_cache(8, 2, length=131072, width=64)),
    _model("qwen3", _CAUSAL,
        tiny=hugging_face.qwen3(2, 512, 64, 128, 4, 2, batch=2, length=64),
        bench=hugging_face.qwen3(4, 4096, 256, 768, 8, 4, batch=2, length=512)),
    _model("gpt2", _CAUSAL + " dropout",
        tiny=hugging_face.gpt2(2, 512, 64, 4, batch=2, length=64),
        bench=hugging_face.gpt2(4, 4096, 256, 4, batch=2, length=512)),
    _model("mixtral", _CAUSAL,
        tiny=hugging_face.mixtral(
            2, 512, 64, 128, 4, 2, experts="batched_mm", batch=2, length=32),
        bench=hugging_face.mixtral(
            2, 4096, 192, 384, 6, 3, experts="batched_mm", batch=2, length=64)),
    _model("mixtral_grouped", _CAUSAL + " custom_op float32_only",
        tiny=hugging_face.mixtral(
            2, 512, 64, 128, 4, 2, experts="grouped_mm", batch=2, length=32),
        bench=hugging_face.mixtral(
            4, 4096, 256, 512, 8, 4, experts="grouped_mm", batch=2, length=256),
        long=hugging_face.mixtral(
            4, 4096, 256, 512, 8, 4, experts="grouped_mm", batch=2, length=1024)),
    _model("bert", _HF,
        tiny=hugging_face.bert(2, 512, 64, 4, batch=2, length=64),
        bench=hugging_face.bert(4, 4096, 256, 4, batch=4, length=256)),
    _model("t5", _HF,
        tiny=hugging_face.t5(2, 512, 64, 4, batch=2, length=32),
        bench=hugging_face.t5(3, 4096, 256, 4, batch=4, length=256)),
    _model("vit", _HF,
        tiny=hugging_face.vit(2, 64, 4, batch=2, side=32, patch=8),
        bench=hugging_face.vit(6, 192, 3, batch=8, side=224, patch=16)),
    _model("resnet50", _CONV + " mutation",
        tiny=vision.resnet((1, 1, 1, 1), 8, frozen=False, batch=4, side=64),
        bench=vision.resnet((3, 4, 6, 3), 64, frozen=False, batch=4, side=128)),
    _model("resnet50_frozen_norm", _CONV,
        tiny=vision.resnet((1, 1, 1, 1), 8, frozen=True, batch=4, side=64),
        bench=vision.resnet((3, 4, 6, 3), 64, frozen=True, batch=8, side=128)),
    _model("densenet", _CONV + " mutation",
        tiny=vision.densenet((2, 2), 8, batch=4, side=16),
        bench=vision.densenet((6, 8, 8), 16, batch=8, side=64)),
    _model("unet", _CONV,
        tiny=vision.unet((8, 16, 32), batch=2, side=32),
        bench=vision.unet((32, 64, 128, 256), batch=2, side=128)),
    _model("vae_decoder", _CONV,
        tiny=decoders.latent_decoder((8, 16), 1, 4, batch=1, side=8),
        bench=decoders.latent_decoder((32, 64, 128, 128), 3, 8, batch=1, side=32)),
    _model("regnet", "conv inference",
        tiny=vision_library.regnet((1, 1), (32, 64), 16, batch=2, side=32),
        bench=vision_library.regnet(
            (2, 6, 12, 2), (128, 192, 512, 1088), 64, batch=4, side=128)),
    _model("mobilenet_v2", "conv inference",
        bench=vision_library.mobilenet_v2(batch=8, side=128)),
    _model("efficientnet", "conv inference",
        tiny=vision_library.efficientnet(
            batch=2, side=32, in_channels=[32, 16], out_channels=[16, 24],
            kernel_sizes=[3, 5], strides=[1, 2], num_block_repeats=[1, 1],
            expand_ratios=[1, 4], depthwise_padding=[]),
        bench=vision_library.efficientnet(batch=8, side=128)),
    _model("convnext", "conv inference",
        tiny=vision_library.convnext((1, 1), (8, 16), batch=2, side=32),
        bench=vision_library.convnext((3, 3, 9, 3), (96, 192, 384, 768), batch=4, side=128)),
    _model("detr", "conv transformer inference graph_break",
        tiny=vision_library.detr((8, 16), 16, 2, queries=4, batch=2, side=32),
        bench=vision_library.detr(
            (256, 512, 1024, 2048), 256, 8, queries=100, batch=2, side=128)),
    _model("vit_lora", "transformer inference",
        tiny=vision_library.tuned_vit(
            2, 64, 4, tuned="lora", batch=2, side=32, patch=8),
        bench=vision_library.tuned_vit(
            6, 192, 3, tuned="lora", batch=8, side=224, patch=16)),
    _model("vit_probe", "transformer inference",
        tiny=vision_library.tuned_vit(
            2, 64, 4, tuned="head", batch=2, side=32, patch=8),
        bench=vision_library.tuned_vit(
            6, 192, 3, tuned="head", batch=8, side=224, patch=16)),
    _model("chunk_encoder", "conv transformer inference",
        tiny=speech.frame_classifier(
            speech.chunk_encoder(8, 16, 2, 2, batch=2, positions=64), 16, 32),
        bench=speech.frame_classifier(
            speech.chunk_encoder(32, 128, 4, 4, chunk=16, positions=2048), 128, 64)),
    _model("lm8", "transformer checkpoint inference",
        tiny=language.language_model(4, 64, 176, 256, 4, batch=2, length=64),
        bench=language.language_model(8, 256, 704, 2048, 4, batch=2, length=512)),
    _model("lm_dropout", "transformer dropout checkpoint inference",
        tiny=language.language_model(2, 64, 176, 256, 4, batch=2, length=64, dropout=0.2),
        bench=language.language_model(
            8, 256, 704, 2048, 4, batch=2, length=512, dropout=0.1)),
    _model("shared_block", "transformer checkpoint inference",
        tiny=language.language_model(1, 64, 176, 256, 4, batch=2, length=64, rounds=2),
        bench=language.language_model(1, 256, 704, 2048, 4, batch=2, length=512, rounds=8)),
    _model("clip_head", "inference",
        tiny=behaviours.pairs(lambda: behaviours.ContrastiveHead(32, 16), 320, 32, 32),
        bench=behaviours.pairs(lambda: behaviours.ContrastiveHead(512, 512), 8192, 512, 512)),
    _model("custom_op", "custom_op inference",
        tiny=behaviours.pairs(lambda: behaviours.CustomOp(3, 32), 64, 32, 32),
        bench=behaviours.pairs(lambda: behaviours.CustomOp(8, 256), 2048, 256, 256)),
    _model("in_place", "mutation inference",
        tiny=behaviours.pairs(lambda: behaviours.InPlace(3, 32), 64, 32, 32),
        bench=behaviours.pairs(lambda: behaviours.InPlace(8, 512), 2048, 512, 512)),
    _model("control_flow", "graph_break inference",
        tiny=behaviours.pairs(lambda: behaviours.ControlFlow(32), 64, 32, 32),
        bench=behaviours.pairs(lambda: behaviours.ControlFlow(256), 2048, 256, 256)),
    _model("per_sample_gradients", "functorch inference",
        tiny=behaviours.pairs(lambda: behaviours.PerSampleGradients(16), 32, 16, 16),
        bench=behaviours.pairs(lambda: behaviours.PerSampleGradients(64), 256, 64, 64)),
    _model("nested_jvp", "functorch inference inductor_fails",
        tiny=behaviours.pairs(lambda: behaviours.NestedJvp(32), 64, 2, 1),
        bench=behaviours.pairs(lambda: behaviours.NestedJvp(512), 4096, 2, 1)),
)  # fmt: skip

MODELS: Mapping[str, Model] = {model.name: model for model in _ENTRIES}
