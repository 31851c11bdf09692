"""The zoo: one small network of every family of timm, torchvision's models, and families of Hugging Face.

Each is a class that people train, with random weights: the smallest of its family, with fewer blocks a stage where they
repeat, and with small inputs, so that a compile takes seconds. What was made smaller stands in its arguments.
"""

from __future__ import annotations

import fnmatch
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SITE = Path(sys.prefix) / "zoo"
"""where `make zoo` puts timm and torchvision: beside the other packages, torchvision would break who looks for it"""
CLASSES, VOCABULARY, TOKENS = 10, 96, 12
SEED = 0
MISSING_OPERATORS = (
    "nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d", "_roi_align_backward",
    "_roi_pool_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward", "_deform_conv2d_backward",
)  # fmt: skip
"""what torchvision's compiled half defines, which does not load beside a build of torch for CPUs alone"""
_declared: list[torch.library.Library] = []


def packages() -> None:
    """Import torchvision and timm. Operators of torchvision's compiled half, where that is missing, are declared first.

    No network of the zoo calls one. Raises `ImportError` where a package is not installed.
    """
    if not _declared:
        sys.path.append(str(SITE))
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in MISSING_OPERATORS:
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor x) -> Tensor")
        _declared.append(library)
    for name in ("torchvision", "timm"):
        importlib.import_module(name)


@dataclass(frozen=True)
class Specimen:
    """A network of the zoo: where its class comes from, with which arguments, and what its inputs look like."""

    package: str
    """timm, torchvision or transformers"""
    model: str
    """the name that the package knows it by"""
    family: str
    """timm's module, torchvision's kind, or the model type of transformers"""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keep: Mapping[str, int] = field(default_factory=dict)
    """pattern of containers -> how many of their children are kept, the first ones"""
    drop: tuple[str, ...] = ()
    """children that are taken out of their containers"""
    shape: tuple[int, ...] = (3, 64, 64)
    """of one input"""
    kind: str = "image"
    """image, map (an answer for each pixel), wave, spectrum or text"""
    strides: int = 1
    """of a map: pixels of the input in each direction to one of the answer"""
    seconds: int = 240
    """of one core that its compile may take"""
    candidates: int = 0
    """random inputs of which those are judged by that the teacher is surest of; 0: the first ones, whatever it says.

    Depths of layers without training amplify one step of one value until it decides between classes that are near."""
    output: str = ""
    """the part of the answer that is taken; the whole answer where empty"""

    def build(self) -> nn.Module:
        """The network in eval mode, with weights that are always the same and none of them constant."""
        torch.manual_seed(SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = BUILDERS[self.package](self)
        shorten(module, self.keep, self.drop)
        if self.output:
            module = Part(module, self.output, self.kind == "text")
        spread(module)
        settle(module, [self.inputs(8, seed) for seed in (1, 2)])
        return module.eval()

    def inputs(self, count: int, seed: int) -> tuple[Tensor, ...]:
        """Random inputs; of texts, token ids and their mask."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind != "text":
            return (torch.randn(count, *self.shape, generator=generator),)
        ids = torch.randint(3, VOCABULARY, (count, TOKENS), generator=generator)
        lengths = torch.randint(4, TOKENS + 1, (count, 1), generator=generator)
        mask = (torch.arange(TOKENS) < lengths).long()
        return ids * mask + (1 - mask), mask


class Part(nn.Module):
    """A network of which one part of the answer is taken."""

    def __init__(self, model: nn.Module, output: str, masked: bool) -> None:
        super().__init__()
        self.model, self.output, self.masked = model, output, masked

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        answer = self.model(x, attention_mask=mask) if self.masked else self.model(x)
        return answer[self.output]


def shorten(module: nn.Module, keep: Mapping[str, int], drop: tuple[str, ...]) -> None:
    """Take repeated blocks out of a network."""
    for pattern, count in keep.items():
        containers = [m for name, m in module.named_modules() if fnmatch.fnmatchcase(name, pattern)]
        assert containers, f"no module is called {pattern}"
        for container in containers:
            for name in [name for name, _ in container.named_children()][count:]:
                del container._modules[name]
    for path in drop:
        parent, _, name = path.rpartition(".")
        del module.get_submodule(parent)._modules[name]


def spread(module: nn.Module) -> None:
    """Give values of their own to parameters that start alike: gains of one, biases of zero, scales next to nothing.

    Otherwise residual branches would add nothing, and what is wrong with them could not be seen.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel() > 1
                and bool((parameter == parameter.view(-1)[0]).all())
            ):
                noise = torch.randn(parameter.shape, generator=generator)
                gain = parameter.view(-1)[0] > 0 or name.endswith(("weight", "gamma"))
                parameter.copy_(1 + 0.2 * noise if gain else 0.1 * noise)


def settle(module: nn.Module, batches: list[tuple[Tensor, ...]]) -> None:
    """Give batch norms the statistics of some batches, so that values stay in bounds in eval mode."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
    with torch.no_grad():
        for batch in batches if norms else ():
            module.train()(*batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def _timm(specimen: Specimen) -> nn.Module:
    packages()
    import timm

    return timm.create_model(specimen.model, num_classes=CLASSES, **specimen.arguments)


def _torchvision(specimen: Specimen) -> nn.Module:
    packages()
    from torchvision.models import get_model

    extra = {"weights_backbone": None} if specimen.kind == "map" else {}
    return get_model(specimen.model, weights=None, num_classes=CLASSES, **extra, **specimen.arguments)


def _transformers(specimen: Specimen) -> nn.Module:
    import transformers

    model_class = getattr(transformers, specimen.model)
    return model_class(model_class.config_class(num_labels=CLASSES, **specimen.arguments))


BUILDERS: dict[str, Callable[[Specimen], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def timm(family: str, model: str, size: int = 64, *, keep: Mapping[str, int] | None = None, drop: tuple[str, ...] = (),
         **arguments: Any) -> Specimen:  # fmt: skip
    return Specimen("timm", model, family, arguments, keep or {}, drop, (3, size, size))


def vision(
    family: str, model: str, size: int = 64, *, keep: Mapping[str, int] | None = None, **arguments: Any
) -> Specimen:
    return Specimen("torchvision", model, family, arguments, keep or {}, shape=(3, size, size))


def segmentation(family: str, model: str, size: int = 64, *, keep: Mapping[str, int] | None = None) -> Specimen:
    return Specimen(
        "torchvision", model, family, {}, keep or {}, shape=(3, size, size), kind="map", output="out", candidates=128
    )


def text(family: str, model: str, **arguments: Any) -> Specimen:
    arguments = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 1,
    } | arguments  # fmt: skip
    return Specimen(
        "transformers", model, family, {k: v for k, v in arguments.items() if v is not None}, shape=(TOKENS,),
        kind="text", output="logits",
    )  # fmt: skip


def picture(family: str, model: str, size: int = 32, **arguments: Any) -> Specimen:
    return Specimen("transformers", model, family, arguments, shape=(3, size, size), output="logits")


def sound(family: str, model: str, shape: tuple[int, ...] = (800,), **arguments: Any) -> Specimen:
    kind = "wave" if len(shape) == 1 else "spectrum"
    return Specimen("transformers", model, family, arguments, shape=shape, kind=kind, output="logits")


ONE = (1, 1, 1, 1)
VIT = {"img_size": 64, "depth": 2}
SMALL_VIT = VIT | {"embed_dim": 192, "num_heads": 3}
TIMM = (
    timm("beit", "beit_base_patch16_224", **SMALL_VIT),
    timm("byoanet", "lambda_resnet26t", keep={"stages.[0-9]": 2}),
    timm("byobnet", "mobileone_s1", keep={"stages.[0-9]": 2}),
    timm("cait", "cait_xxs24_224", **VIT, depth_token_only=1),
    timm("coat", "coat_lite_tiny", img_size=64, serial_depths=ONE),
    timm("convit", "convit_tiny", **VIT, local_up_to_layer=1),
    timm("convmixer", "convmixer_768_32", keep={"blocks": 2}),
    timm("convnext", "convnext_zepto_rms", depths=ONE),
    timm("cpubone", "cpubone_nano"),
    timm("crossvit", "crossvit_9_240", 120, img_size=120, depth=[[1, 1, 0]] * 2),
    timm("csatv2", "csatv2", depths=ONE, transformer_depths=(0, 0, 1, 1)),
    timm("cspnet", "cs3darknet_s"),
    timm("cspnext", "cspnext_tiny"),
    timm("davit", "davit_tiny", depths=ONE, embed_dims=(32, 64, 128, 256), num_heads=(1, 2, 4, 8)),
    timm("deepseek_vit", "deepseek_vit_412m", 84, img_size=84, depth=2, embed_dim=192, num_heads=3),
    timm("deit", "deit_tiny_patch16_224", **VIT),
    timm("densenet", "densenet121", block_config=(2, 2, 2, 2)),
    timm("dla", "dla46_c"),
    timm("dpn", "dpn48b", k_sec=ONE),
    timm("edgenext", "edgenext_xx_small", depths=(1, 2, 2, 2)),
    timm("efficientformer", "efficientformer_l1", 224, depths=(1, 1, 1, 2)),
    timm("efficientformer_v2", "efficientformerv2_s0", img_size=64),
    timm("efficientnet", "mobilenetv2_035"),
    timm("efficientvim", "efficientvim_m1", depths=(1, 1, 1)),
    timm("efficientvit_mit", "efficientvit_b0"),
    timm("efficientvit_msra", "efficientvit_m0", img_size=64),
    timm("eva", "vit_tiny_patch16_dinov3_qkvb", **VIT),
    timm("fasternet", "fasternet_t0", depths=(1, 1, 2, 1)),
    timm("fastvit", "fastvit_t8", layers=ONE),
    timm("focalnet", "focalnet_tiny_srf", keep={"layers.*.blocks": 1}),
    timm("gcvit", "gcvit_xxtiny", 224, keep={"stages.[0-9].blocks": 2}),
    timm("gemma4_vit", "gemma4_vit_167m", 96, img_size=96, depth=2, embed_dim=192, num_heads=3, intermediate_size=384),
    timm("ghostnet", "ghostnet_050"),
    timm("hardcorenas", "hardcorenas_a", keep={"blocks.[0-9]": 1}),
    timm("hgnet", "hgnetv2_b0", keep={"stages.*.blocks": 1}),
    timm("hiera", "hiera_tiny_224", img_size=(64, 64), stages=ONE),
    timm("hieradet_sam2", "sam2_hiera_tiny", stages=(1, 1, 2, 1), global_att_blocks=(3,)),
    timm("hrnet", "hrnet_w18_small"),
    timm("iformer", "iformer_t", depths=(1, 1, 3, 3), attn_groups=(0, 0, 1, 1)),
    timm("inception_next", "inception_next_atto", depths=ONE),
    timm("inception_resnet_v2", "inception_resnet_v2", 96, keep={"repeat": 1, "repeat_1": 1, "repeat_2": 1}),
    timm("inception_v3", "inception_v3", 96),
    timm("inception_v4", "inception_v4", 96, drop=tuple(f"features.{i}" for i in (7, 8, 9, *range(12, 18), 20, 21))),
    timm("lcnetv2", "lcnetv2_small", depths=ONE),
    timm("levit", "levit_128s", img_size=64, depth=(1, 1, 1)),
    timm("lowformer", "lowformer_b0", depth_list=[0, 1, 1, 1, 1]),
    timm("mambaout", "mambaout_femto", depths=ONE),
    replace(timm("maxxvit", "test_maxvit", img_size=64), candidates=128),
    timm("maxxvit", "coatnet_pico_rw_224", img_size=64, keep={"stages.*.blocks": 1}),
    timm("metaformer", "poolformer_s12", keep={"stages.*.blocks": 1}),
    timm("mlp_mixer", "resmlp_12_224", img_size=64, keep={"blocks": 2}),
    timm("mobilenetv3", "lcnet_035"),
    timm("mobilenetv3", "mobilenetv4_conv_small_050"),
    timm("mobilenetv5", "mobilenetv5_300m", channel_multiplier=0.25, keep={"blocks.[0-9]": 2}),
    timm("mobilevit", "mobilevit_xxs"),
    timm("mvitv2", "mvitv2_tiny", img_size=64, keep={"stages.*.blocks": 1}),
    timm("naflexvit", "naflexvit_base_patch16_gap", **SMALL_VIT),
    replace(timm("nasnet", "nasnetalarge", stem_size=24, num_features=576), seconds=900),
    timm("nest", "nest_tiny", img_size=64, keep={"levels.*.transformer_encoder": 1}),
    timm("nextvit", "nextvit_small", depths=(1, 1, 5, 1)),
    timm("nfnet", "test_nfnet"),
    timm("nfnet", "nf_resnet26", keep={"stages.[0-9]": 1}),
    timm("pit", "pit_ti_224", img_size=64, depth=(1, 1, 1)),
    replace(timm("pnasnet", "pnasnet5large", 96), seconds=900, candidates=128),
    timm("pvt_v2", "pvt_v2_b0", depths=ONE),
    timm("qwen3_vit", "qwen3_vit_88m", **SMALL_VIT),
    timm("rdnet", "rdnet_tiny", num_init_features=32, growth_rates=(32, 32, 32), num_blocks_list=(1, 1, 1),
         is_downsample_block=(None, True, True), block_type=("Block", "BlockESE", "BlockESE")),
    timm("regnet", "regnetx_002", keep={"s[0-9]": 1}),
    timm("repghost", "repghostnet_050"),
    timm("repvit", "repvit_m0_9", depth=(1, 1, 2, 1)),
    timm("res2net", "res2net50_14w_8s", layers=ONE),
    timm("resnest", "resnest14d"),
    timm("resnet", "resnet10t"),
    timm("resnetv2", "resnetv2_50", layers=ONE),
    replace(timm("rexnet", "rexnet_100"), candidates=128),
    timm("selecsls", "selecsls42b"),
    timm("senet", "legacy_seresnet18", layers=ONE),
    timm("sequencer", "sequencer2d_s", img_size=64, layers=ONE),
    timm("shvit", "shvit_s1", depth=(1, 2, 2)),
    timm("sknet", "skresnet18", layers=ONE),
    timm("starnet", "starnet_s050"),
    timm("swiftformer", "swiftformer_xs", layers=ONE),
    timm("swin_transformer", "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=48, depths=(2, 2),
         num_heads=(3, 6)),
    timm("swin_transformer_v2", "swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=48, depths=(2, 2),
         num_heads=(3, 6)),
    timm("swin_transformer_v2_cr", "swinv2_cr_tiny_224", img_size=64, window_size=4, embed_dim=48, depths=(2, 2),
         num_heads=(3, 6)),
    timm("tiny_vit", "tiny_vit_5m_224", depths=ONE),
    timm("tnt", "tnt_s_patch16_224", **VIT),
    timm("tresnet", "tresnet_m", layers=ONE),
    timm("twins", "twins_svt_small", img_size=64, depths=(1, 1, 2, 1)),
    timm("vgg", "vgg11", mlp_ratio=0.125),
    timm("visformer", "visformer_tiny", img_size=64, depth=(1, 1, 1)),
    timm("vision_transformer", "vit_tiny_patch16_224", **VIT),
    timm("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", **VIT),
    timm("vision_transformer_relpos", "vit_relpos_small_patch16_224", **VIT),
    timm("vision_transformer_sam", "samvit_base_patch16", **SMALL_VIT, window_size=2, global_attn_indexes=[1]),
    timm("vitamin", "vitamin_small_224", img_size=64, depth=2),
    timm("volo", "volo_d1_224", img_size=64, keep={"network.[0234]": 1}),
    timm("vovnet", "ese_vovnet19b_slim"),
    timm("xception", "legacy_xception"),
    timm("xception_aligned", "xception41", block_cfg=[
        {"in_chs": 64, "out_chs": 128, "stride": 2}, {"in_chs": 128, "out_chs": 128, "stride": 1},
        {"in_chs": 128, "out_chs": (256, 256, 512), "stride": 1, "no_skip": True, "start_with_relu": False},
    ]),
    timm("xcit", "xcit_nano_12_p16_224", **VIT, cls_attn_layers=1),
)  # fmt: skip

TORCHVISION = (
    vision("alexnet", "alexnet"),
    vision("convnext", "convnext_tiny", keep={"features.[1357]": 1}),
    vision("densenet", "densenet121", keep={}),
    vision("efficientnet", "efficientnet_b0", keep={"features.[1-7]": 1}),
    vision("efficientnet_v2", "efficientnet_v2_s", keep={"features.[1-6]": 1}),
    vision("googlenet", "googlenet", init_weights=False, aux_logits=False),
    vision("inception", "inception_v3", 96, init_weights=False, aux_logits=False),
    vision("maxvit", "maxvit_t", 224, keep={"blocks.[0-9].layers": 1}),
    vision("mnasnet", "mnasnet0_5"),
    vision("mobilenet_v2", "mobilenet_v2", width_mult=0.5),
    vision("mobilenet_v3", "mobilenet_v3_small"),
    vision("regnet_x", "regnet_x_400mf", keep={"trunk_output.block[0-9]": 1}),
    vision("regnet_y", "regnet_y_400mf", keep={"trunk_output.block[0-9]": 1}),
    vision("resnet", "resnet18"),
    vision("resnet", "resnet50", keep={"layer[1-4]": 1}),
    vision("resnext", "resnext50_32x4d", keep={"layer[1-4]": 1}),
    vision("shufflenet_v2", "shufflenet_v2_x0_5"),
    vision("squeezenet", "squeezenet1_1"),
    vision("swin", "swin_t", keep={"features.[1357]": 1}),
    vision("swin_v2", "swin_v2_t", keep={"features.[1357]": 1}),
    vision("vgg", "vgg11_bn"),
    vision("vit", "vit_b_32", image_size=64, keep={"encoder.layers": 2}),
    vision("wide_resnet", "wide_resnet50_2", keep={"layer[1-4]": 1}),
    segmentation("fcn", "fcn_resnet50", keep={"backbone.layer[1-4]": 1}),
    segmentation("deeplabv3", "deeplabv3_resnet50", keep={"backbone.layer[1-4]": 1}),
    replace(
        segmentation("deeplabv3_mobilenet", "deeplabv3_mobilenet_v3_large"),
        drop=tuple(f"backbone.{number}" for number in (5, 6, 8, 9, 10, 12, 14, 15)),
    ),
    segmentation("lraspp", "lraspp_mobilenet_v3_large"),
)  # fmt: skip

HF_VIT = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64,
}  # fmt: skip
WAV = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 32,
    "vocab_size": VOCABULARY,
}  # fmt: skip
TRANSFORMERS = (
    # text
    text("bert", "BertForSequenceClassification"),
    text("roberta", "RobertaForSequenceClassification"),
    text("electra", "ElectraForSequenceClassification", embedding_size=16),
    text("albert", "AlbertForSequenceClassification", embedding_size=16),
    text("distilbert", "DistilBertForSequenceClassification", hidden_size=None, num_hidden_layers=None,
         num_attention_heads=None, intermediate_size=None, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    text("mpnet", "MPNetForSequenceClassification"),
    text("deberta-v2", "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"],
         position_buckets=8, type_vocab_size=0, position_biased_input=False, norm_rel_ebd="layer_norm",
         share_att_key=True),
    text("mobilebert", "MobileBertForSequenceClassification", embedding_size=16, intra_bottleneck_size=16,
         intermediate_size=32, true_hidden_size=16, num_feedforward_networks=2),
    text("squeezebert", "SqueezeBertForSequenceClassification", embedding_size=32),
    text("modernbert", "ModernBertForSequenceClassification", attn_implementation="eager", reference_compile=False,
         cls_token_id=0, sep_token_id=2, bos_token_id=0, eos_token_id=2),
    text("gpt2", "GPT2ForSequenceClassification", hidden_size=None, num_hidden_layers=None, num_attention_heads=None,
         intermediate_size=None, max_position_embeddings=None, n_positions=40, n_embd=32, n_layer=2, n_head=4),
    text("opt", "OPTForSequenceClassification", ffn_dim=64, word_embed_proj_dim=32, intermediate_size=None),
    text("llama", "LlamaForSequenceClassification", num_key_value_heads=2),
    text("qwen2", "Qwen2ForSequenceClassification", num_key_value_heads=2),
    # vision
    picture("vit", "ViTForImageClassification", **HF_VIT),
    picture("deit", "DeiTForImageClassification", **HF_VIT),
    picture("beit", "BeitForImageClassification", **HF_VIT),
    picture("dinov2", "Dinov2ForImageClassification", **{k: v for k, v in HF_VIT.items() if k != "intermediate_size"}),
    picture("swin", "SwinForImageClassification", image_size=32, patch_size=4, embed_dim=16, num_heads=[2, 4],
            window_size=4, depths=[2, 2]),
    picture("swinv2", "Swinv2ForImageClassification", image_size=32, patch_size=4, embed_dim=16, num_heads=[2, 4],
            window_size=4, depths=[2, 2]),
    picture("convnext", "ConvNextForImageClassification", depths=[2, 2], hidden_sizes=[16, 32], num_stages=2),
    picture("convnextv2", "ConvNextV2ForImageClassification", depths=[2, 2], hidden_sizes=[16, 32], num_stages=2),
    picture("resnet", "ResNetForImageClassification", embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1]),
    picture("mobilenet_v1", "MobileNetV1ForImageClassification", depth_multiplier=0.25),
    replace(
        picture("segformer", "SegformerForSemanticSegmentation", depths=[1, 1], sr_ratios=[2, 1],
                hidden_sizes=[16, 32], strides=[4, 2], patch_sizes=[7, 3], num_attention_heads=[2, 4],
                mlp_ratios=[2, 2], num_encoder_blocks=2, decoder_hidden_size=32),
        kind="map", strides=4,
    ),
    picture("poolformer", "PoolFormerForImageClassification", hidden_sizes=[16, 32], depths=[1, 1],
            num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1]),
    picture("cvt", "CvtForImageClassification", embed_dim=[16, 32, 64], depth=[1, 2, 3], num_heads=[1, 2, 4]),
    picture("levit", "LevitForImageClassification", 64, image_size=64, hidden_sizes=[32, 64, 96],
            num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[16, 16, 16]),
    # audio
    sound("wav2vec2", "Wav2Vec2ForSequenceClassification", **WAV),
    sound("hubert", "HubertForSequenceClassification", **WAV),
    sound("wavlm", "WavLMForSequenceClassification", **WAV),
    sound("unispeech", "UniSpeechForSequenceClassification", **WAV),
    sound("data2vec-audio", "Data2VecAudioForSequenceClassification", **WAV),
    sound("audio-spectrogram-transformer", "ASTForAudioClassification", (40, 16), hidden_size=32, num_hidden_layers=2,
          num_attention_heads=4, intermediate_size=64, patch_size=8, frequency_stride=8, time_stride=8, max_length=40,
          num_mel_bins=16),
    sound("whisper", "WhisperForAudioClassification", (16, 40), d_model=32, encoder_layers=2, encoder_attention_heads=4,
          encoder_ffn_dim=64, num_mel_bins=16, max_source_positions=20, vocab_size=VOCABULARY, decoder_layers=1,
          classifier_proj_size=32, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=0),
)  # fmt: skip

ZOO: dict[str, Specimen] = {f"{s.package}/{s.model}": s for s in (*TIMM, *TORCHVISION, *TRANSFORMERS)}
assert len(ZOO) == len(TIMM) + len(TORCHVISION) + len(TRANSFORMERS), "two networks of one name"
