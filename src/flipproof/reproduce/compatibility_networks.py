"""Networks of other people in small configurations with random weights: what `flipproof.reproduce.compatibility` tries.

Nothing is downloaded. Weights and inputs are a function of the seed; the targets are the network's own answers, so that
the fault-free run is always right. Random weights prove that a verb can be used, not that its numbers make sense:
`flipproof.reproduce.trained` is for that.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from flipproof.hardening.methods import AVC, Guard, Hardening
from flipproof.running.data import Output, call, take
from flipproof.running.evaluation import eval_mode
from flipproof.running.tasks import Classification, Detection, Segmentation, Task, Tokens

BATCH = 4
"""Samples of a batch; there are two batches to judge on, and two more to calibrate on."""

CLASSES = 10

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Subject:
    """A network with data, and how it is read.

    Attributes:
        model: in eval mode.
        data: two batches `(inputs, targets)`.
        calibration: the same and two more.
        reading: what every verb is told about its answers: `task=` and `output=`.
        method: how it is hardened.
    """

    model: nn.Module
    data: list[Batch]
    calibration: list[Batch]
    reading: dict[str, Any] = field(default_factory=dict)
    method: Hardening = field(default_factory=Guard)

    def answers(self, model: nn.Module | None = None) -> Tensor:
        """All numbers that a network answers on the data, one behind the other."""
        chosen = self.model if model is None else model
        with eval_mode(chosen):
            return torch.cat([numbers(call(chosen, x)) for x, _ in self.data])


def numbers(raw: Any) -> Tensor:
    """All floating-point numbers in what a model returns, one behind the other."""
    leaves = [leaf for leaf in pytree.tree_leaves(raw) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


@dataclass(frozen=True)
class Network:
    """One row of the table.

    Attributes:
        name: as the package has it, with what was made smaller.
        family: of networks that are alike; the test suite runs one of each.
        package: where it comes from; "torch" for what PyTorch has itself.
        make: makes model and inputs of so many samples.
        output: picks what is judged.
        task: what it is for; class scores by default.
        method: how it is hardened.
    """

    name: str
    family: str
    package: str
    make: Callable[[], tuple[nn.Module, Callable[[int], Any]]]
    output: Output = None
    task: Task = field(default_factory=Classification)
    method: Hardening = field(default_factory=Guard)

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return find_spec(self.package) is not None

    def subject(self) -> Subject:
        """The network with random weights, and data that it is right about."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages themselves
            model, inputs = self.make()
            if "eval" not in vars(model):  # an exported program refuses it, and is in the mode that it was exported in
                model.eval()
            batches = [inputs(BATCH) for _ in range(4)]
            with eval_mode(model):
                answers = [call(model, x) for x in batches]
        labelled = [(x, _right(self.task, take(found, self.output))) for x, found in zip(batches, answers, strict=True)]
        reading: dict[str, Any] = {"task": self.task, "output": self.output}
        return Subject(model, labelled[:2], labelled, reading, self.method)


def _right(task: Task, found: Any) -> Any:
    """Targets that the network is right about."""
    if isinstance(task, Detection):
        return [{"boxes": each["boxes"], "labels": each["labels"]} for each in found]
    scores: Tensor = found
    return scores.argmax(dim=2 if isinstance(task, Tokens) else 1)


def _package(name: str) -> Any:
    """A package that flipproof does not depend on."""
    return import_module(name)


def _images(size: int, channels: int = 3) -> Callable[[int], Tensor]:
    return lambda samples: torch.randn(samples, channels, size, size)


# --- torchvision ---------------------------------------------------------------------------------------------------


def _vision(name: str, size: int, **options: Any) -> Callable[[], tuple[nn.Module, Callable[[int], Any]]]:
    def make() -> tuple[nn.Module, Callable[[int], Any]]:
        options.setdefault("num_classes", CLASSES)
        return _package("torchvision.models").get_model(name, weights=None, **options), _images(size)

    return make


def _small_vision(build: Callable[[Any], Any], size: int) -> Callable[[], tuple[nn.Module, Callable[[int], Any]]]:
    """A class of torchvision with fewer and narrower layers than its named networks have."""
    return lambda: (build(_package("torchvision.models")), _images(size))


def _alexnet(models: Any) -> Any:
    """AlexNet, its two hidden layers narrower."""
    net = models.AlexNet(num_classes=CLASSES)
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier[1], net.classifier[4], net.classifier[6] = (
        nn.Linear(256, 64),
        nn.Linear(64, 64),
        nn.Linear(64, CLASSES),
    )
    return net


def _vgg(models: Any) -> Any:
    """VGG with batch normalisation, its two hidden layers narrower."""
    features = models.vgg.make_layers([16, "M", 32, "M", 32, 32, "M"], batch_norm=True)
    net = models.VGG(features, num_classes=CLASSES)
    net.avgpool = nn.AdaptiveAvgPool2d(2)
    net.classifier = nn.Sequential(
        nn.Linear(128, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Linear(64, CLASSES)
    )
    return net


def _resnet(models: Any) -> Any:
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def _resnext(models: Any) -> Any:
    return models.ResNet(
        models.resnet.Bottleneck,
        [1, 1, 1, 1],
        num_classes=CLASSES,
        groups=8,
        width_per_group=4,
        zero_init_residual=False,
    )


def _regnet(models: Any) -> Any:
    setting = models.regnet.BlockParams.from_init_params(
        depth=4, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return models.RegNet(setting, num_classes=CLASSES)


def _densenet(models: Any) -> Any:
    return models.DenseNet(growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=CLASSES)


def _convnext(models: Any) -> Any:
    setting = models.convnext.CNBlockConfig
    return models.ConvNeXt([setting(16, 32, 1), setting(32, 64, 2), setting(64, None, 1)], num_classes=CLASSES)


def _vit(models: Any) -> Any:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASSES
    )


def _swin(models: Any) -> Any:
    return models.SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4], num_classes=CLASSES
    )


def _swin_v2(models: Any) -> Any:
    v2 = models.swin_transformer
    return models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[4, 4],
        num_classes=CLASSES,
        block=v2.SwinTransformerBlockV2,
        downsample_layer=v2.PatchMergingV2,
    )


def _maxvit(models: Any) -> Any:
    return models.MaxVit(
        input_size=(32, 32),
        stem_channels=16,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        partition_size=4,
        num_classes=CLASSES,
    )


def _video() -> tuple[nn.Module, Callable[[int], Any]]:
    resnet = _package("torchvision.models.video.resnet")
    net = resnet.VideoResNet(
        resnet.BasicBlock, [resnet.Conv3DSimple] * 4, [1, 1, 1, 1], resnet.BasicStem, num_classes=CLASSES
    )
    return net, lambda samples: torch.randn(samples, 3, 4, 16, 16)


def _efficientnet(models: Any) -> Any:
    package = models.efficientnet
    blocks = [package.MBConvConfig(4, 3, 2, size, 2 * size, 1, width_mult=1.0, depth_mult=1.0) for size in (8, 16, 32)]
    first = package.MBConvConfig(1, 3, 1, 8, 8, 1, width_mult=1.0, depth_mult=1.0)
    return package.EfficientNet([first, *blocks], dropout=0.1, last_channel=64, num_classes=CLASSES)


def _efficientnet_v2(models: Any) -> Any:
    package = models.efficientnet
    blocks = [
        package.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        package.FusedMBConvConfig(4, 3, 2, 8, 16, 1),
        package.MBConvConfig(4, 3, 2, 16, 32, 1),
    ]
    return package.EfficientNet(blocks, dropout=0.1, last_channel=64, num_classes=CLASSES)


def _backbone() -> nn.Module:
    """Four convolutions, as a backbone with one level of features."""
    layers: list[nn.Module] = []
    for inside, outside in ((3, 16), (16, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
    net = nn.Sequential(*layers)
    net.out_channels = 32  # type: ignore[assignment]  # where torchvision's detectors look for it
    return net


def _detector(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Callable[[int], Any]]]:
    """A small detector of torchvision's, which keeps boxes of any score: random weights are sure of none."""

    def make() -> tuple[nn.Module, Callable[[int], Any]]:
        detection = _package("torchvision.models.detection")
        anchors = detection.anchor_utils.AnchorGenerator(sizes=((16, 32),), aspect_ratios=((1.0,),))
        one = detection.anchor_utils.AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
        classes = {
            "Faster R-CNN": lambda **more: detection.FasterRCNN(
                _backbone(),
                CLASSES,
                rpn_anchor_generator=anchors,
                box_score_thresh=0.0,
                box_detections_per_img=10,
                **more,
            ),
            "RetinaNet": lambda **more: detection.RetinaNet(
                _backbone(), CLASSES, anchor_generator=anchors, score_thresh=0.0, detections_per_img=10, **more
            ),
            "FCOS": lambda **more: detection.FCOS(
                _backbone(), CLASSES, anchor_generator=one, score_thresh=0.0, detections_per_img=10, **more
            ),
        }
        net = classes[name](min_size=64, max_size=64, **options)
        return net, lambda samples: ([*torch.rand(samples, 3, 64, 64)],)

    return make


def _segmenter(name: str) -> Callable[[], tuple[nn.Module, Callable[[int], Any]]]:
    """A head of torchvision's on two stages of a ResNet."""

    def make() -> tuple[nn.Module, Callable[[int], Any]]:
        models = _package("torchvision.models")
        resnet = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        backbone = _package("torchvision.models._utils").IntermediateLayerGetter(resnet, {"layer2": "out"})
        if name == "FCN":
            net = models.segmentation.FCN(backbone, models.segmentation.fcn.FCNHead(128, 5))
        else:
            net = models.segmentation.DeepLabV3(backbone, models.segmentation.deeplabv3.DeepLabHead(128, 5, (1, 2, 3)))
        return net, _images(32)

    return make


# --- timm ----------------------------------------------------------------------------------------------------------


def _timm(name: str, size: int = 32, **options: Any) -> Callable[[], tuple[nn.Module, Callable[[int], Any]]]:
    def make() -> tuple[nn.Module, Callable[[int], Any]]:
        return _package("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options), _images(size)

    return make


def _mixer(residual: bool) -> tuple[nn.Module, Callable[[int], Any]]:
    mixers = _package("timm.models.mlp_mixer")
    options = {"block_layer": mixers.ResBlock, "norm_layer": mixers.Affine, "mlp_ratio": 4} if residual else {}
    return mixers.MlpMixer(CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=32, **options), _images(32)


def _poolformer() -> tuple[nn.Module, Callable[[int], Any]]:
    package = _package("timm.models.metaformer")
    return package.MetaFormer(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), _images(32)


# --- Hugging Face --------------------------------------------------------------------------------------------------

_WORDS = 64
"""Size of the vocabularies."""

_TEXT = {"vocab_size": _WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def _hugging_face(
    head: str, config: str, inputs: Callable[[int], Any], **options: Any
) -> Callable[[], tuple[nn.Module, Callable[[int], Any]]]:
    def make() -> tuple[nn.Module, Callable[[int], Any]]:
        hf = _package("transformers")
        made = getattr(hf, config)(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **options})
        made.use_cache = False  # keys and values of tokens before are no answer
        return getattr(hf, head)(made), inputs

    return make


def _tokens(samples: int) -> dict[str, Tensor]:
    ids = torch.randint(3, _WORDS, (samples, 12))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(samples: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(samples, 3, 32, 32)}


def _sound(samples: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(samples, 800)}


def _spectrogram(samples: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(samples, 16, 40),
        "decoder_input_ids": torch.randint(3, _WORDS, (samples, 6)),
    }


def _two_texts(samples: int) -> dict[str, Tensor]:
    return {**_tokens(samples), "decoder_input_ids": torch.randint(3, _WORDS, (samples, 6))}


# --- PyTorch itself ------------------------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(8, 24, batch_first=True, **options)
        self.head = nn.Linear(24 * (2 if options.get("bidirectional") else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layer(x)[0][:, -1]))


class _Causal(nn.Module):
    """A block of a temporal convolutional network: two dilated convolutions of the past."""

    def __init__(self, inside: int, outside: int, dilation: int) -> None:
        super().__init__()
        self.room = 2 * dilation
        norm = nn.utils.parametrizations.weight_norm
        self.first = norm(nn.Conv1d(inside, outside, 3, padding=self.room, dilation=dilation))
        self.second = norm(nn.Conv1d(outside, outside, 3, padding=self.room, dilation=dilation))
        self.skip = nn.Conv1d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x)[..., : -self.room])
        h = F.relu(self.second(h)[..., : -self.room])
        return F.relu(h + self.skip(x))


class _TCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_Causal(8, 16, 1), _Causal(16, 16, 2), _Causal(16, 16, 4))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.blocks(x.transpose(1, 2))[..., -1]))


class _Encoder(nn.Module):
    """PyTorch's own transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.words, self.layers = nn.Embedding(_WORDS, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layers(self.words(ids)).mean(dim=1)))


def _sequences(samples: int) -> Tensor:
    return torch.randn(samples, 8, 8)


def _ids(samples: int) -> Tensor:
    return torch.randint(0, _WORDS, (samples, 12))


def _cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def _half(dtype: torch.dtype) -> tuple[nn.Module, Callable[[int], Any]]:
    return _cnn().to(dtype), lambda samples: torch.randn(samples, 3, 8, 8, dtype=dtype)


# --- quantised -----------------------------------------------------------------------------------------------------


def _dynamic() -> tuple[nn.Module, Callable[[int], Any]]:
    ao: Any = torch.ao.quantization
    return ao.quantize_dynamic(_mlp().eval(), {nn.Linear}, dtype=torch.qint8), _images(8)


def _dynamic_lstm() -> tuple[nn.Module, Callable[[int], Any]]:
    ao: Any = torch.ao.quantization
    net = _Recurrent(nn.LSTM).eval()
    return ao.quantize_dynamic(net, {nn.LSTM, nn.Linear}, dtype=torch.qint8), _sequences


def _static() -> tuple[nn.Module, Callable[[int], Any]]:
    """Integers throughout, between a layer that quantises and one that gives floats back."""
    ao: Any = torch.ao.quantization
    net = nn.Sequential(ao.QuantStub(), _cnn(), ao.DeQuantStub()).eval()
    ao.fuse_modules(net, [["1.0", "1.1", "1.2"], ["1.4", "1.5"]], inplace=True)
    net.qconfig = ao.get_default_qconfig("x86")
    prepared = ao.prepare(net)
    prepared(_images(8)(32))
    return ao.convert(prepared), _images(8)


def _torchao(config: str) -> Callable[[], tuple[nn.Module, Callable[[int], Any]]]:
    def make() -> tuple[nn.Module, Callable[[int], Any]]:
        ao = _package("torchao.quantization")
        net = _mlp().eval()
        ao.quantize_(net, getattr(ao, config)())
        return net, _images(8)

    return make


def _scripted() -> tuple[nn.Module, Callable[[int], Any]]:
    return torch.jit.script(_cnn().eval()), _images(8)


def _exported() -> tuple[nn.Module, Callable[[int], Any]]:
    example = (torch.randn(2, 3, 8, 8),)
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(_cnn().eval(), example, dynamic_shapes=shapes).module(), _images(8)


NETWORKS: tuple[Network, ...] = (
    Network("AlexNet, narrower", "CNN", "torchvision", _small_vision(_alexnet, 64)),
    Network("VGG-BN, 4 convolutions", "CNN", "torchvision", _small_vision(_vgg, 32)),
    Network("ResNet, 4 blocks", "ResNet", "torchvision", _small_vision(_resnet, 32)),
    Network("ResNeXt, 4 blocks", "ResNet", "torchvision", _small_vision(_resnext, 32)),
    Network("DenseNet, 8 layers", "CNN", "torchvision", _small_vision(_densenet, 32)),
    Network("GoogLeNet", "Inception", "torchvision", _vision("googlenet", 32, aux_logits=False, init_weights=False)),
    Network("SqueezeNet 1.1", "CNN", "torchvision", _vision("squeezenet1_1", 32)),
    Network("MobileNet v2, width ¼", "mobile", "torchvision", _vision("mobilenet_v2", 32, width_mult=0.25)),
    Network("MobileNet v3 small", "mobile", "torchvision", _vision("mobilenet_v3_small", 32)),
    Network("EfficientNet, 4 blocks", "mobile", "torchvision", _small_vision(_efficientnet, 32)),
    Network("EfficientNet v2, 3 blocks", "mobile", "torchvision", _small_vision(_efficientnet_v2, 32)),
    Network("RegNet Y, 4 blocks", "ResNet", "torchvision", _small_vision(_regnet, 32)),
    Network("ShuffleNet v2 ×0.5", "mobile", "torchvision", _vision("shufflenet_v2_x0_5", 32)),
    Network("MNASNet 0.5", "mobile", "torchvision", _vision("mnasnet0_5", 32)),
    Network("ConvNeXt, 4 blocks", "ConvNeXt", "torchvision", _small_vision(_convnext, 32)),
    Network("ViT, 2 blocks", "vision transformer", "torchvision", _small_vision(_vit, 32)),
    Network("Swin, 4 blocks", "vision transformer", "torchvision", _small_vision(_swin, 32)),
    Network("Swin v2, 4 blocks", "vision transformer", "torchvision", _small_vision(_swin_v2, 32)),
    Network("MaxViT, 2 blocks", "vision transformer", "torchvision", _small_vision(_maxvit, 32)),
    Network("Video ResNet, 4 blocks", "ResNet", "torchvision", _video),
    Network("Faster R-CNN, small", "detection", "torchvision", _detector("Faster R-CNN"), task=Detection(score=0.0)),
    Network("RetinaNet, small", "detection", "torchvision", _detector("RetinaNet"), task=Detection(score=0.0)),
    Network("FCOS, small", "detection", "torchvision", _detector("FCOS"), task=Detection(score=0.0)),
    Network("FCN, small", "segmentation", "torchvision", _segmenter("FCN"), "out", Segmentation()),
    Network("DeepLab v3, small", "segmentation", "torchvision", _segmenter("DeepLab v3"), "out", Segmentation()),
    Network(
        "ViT, 2 blocks (timm)",
        "vision transformer",
        "timm",
        _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2),
    ),
    Network(
        "Mixer, 2 blocks",
        "Mixer",
        "timm",
        lambda: _mixer(False),
    ),
    Network(
        "ResMLP, 2 blocks",
        "Mixer",
        "timm",
        lambda: _mixer(True),
    ),
    Network(
        "ConvNeXt, 4 blocks (timm)",
        "ConvNeXt",
        "timm",
        _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    ),
    Network("MobileNet v3 small ×0.5 (timm)", "mobile", "timm", _timm("mobilenetv3_small_050")),
    Network("MobileNet v4 small ×0.5", "mobile", "timm", _timm("mobilenetv4_conv_small_050")),
    Network("ResNet-10-T", "ResNet", "timm", _timm("resnet10t")),
    Network(
        "PoolFormer, 4 blocks",
        "vision transformer",
        "timm",
        _poolformer,
    ),
    Network(
        "RepViT, 4 blocks",
        "vision transformer",
        "timm",
        _timm("repvit_m0_9", embed_dim=(8, 16, 24, 32), depth=(1, 1, 1, 1)),
    ),
    Network(
        "BERT, 2 layers",
        "BERT",
        "transformers",
        _hugging_face(
            "BertForSequenceClassification", "BertConfig", _tokens, **_TEXT, intermediate_size=64, num_labels=CLASSES
        ),
        "logits",
    ),
    Network(
        "DistilBERT, 2 layers",
        "BERT",
        "transformers",
        _hugging_face(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            _tokens,
            vocab_size=_WORDS,
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=64,
            num_labels=CLASSES,
        ),
        "logits",
    ),
    Network(
        "GPT-2, 2 layers",
        "language model",
        "transformers",
        _hugging_face(
            "GPT2LMHeadModel", "GPT2Config", _tokens, vocab_size=_WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=32
        ),
        "logits",
        Tokens(),
    ),
    Network(
        "Llama, 2 layers",
        "language model",
        "transformers",
        _hugging_face("LlamaForCausalLM", "LlamaConfig", _tokens, **_TEXT, intermediate_size=64),
        "logits",
        Tokens(),
    ),
    Network(
        "Mistral, 2 layers",
        "language model",
        "transformers",
        _hugging_face(
            "MistralForCausalLM", "MistralConfig", _tokens, **_TEXT, intermediate_size=64, num_key_value_heads=1
        ),
        "logits",
        Tokens(),
    ),
    Network(
        "T5, 2 + 2 layers",
        "encoder and decoder",
        "transformers",
        _hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            _two_texts,
            vocab_size=_WORDS,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
        ),
        "logits",
        Tokens(),
    ),
    Network(
        "Whisper, 2 + 2 layers",
        "encoder and decoder",
        "transformers",
        _hugging_face(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            _spectrogram,
            vocab_size=_WORDS,
            num_mel_bins=16,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=20,
            max_target_positions=16,
            decoder_start_token_id=1,
        ),
        "logits",
        Tokens(),
    ),
    Network(
        "ViT, 2 layers (HF)",
        "vision transformer",
        "transformers",
        _hugging_face(
            "ViTForImageClassification",
            "ViTConfig",
            _pixels,
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=CLASSES,
        ),
        "logits",
    ),
    Network(
        "Wav2Vec2, 2 layers",
        "sound",
        "transformers",
        _hugging_face(
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            _sound,
            vocab_size=_WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(16, 16),
            conv_kernel=(10, 4),
            conv_stride=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=16,
            num_labels=CLASSES,
        ),
        "logits",
    ),
    Network("MLP", "PyTorch's own", "torch", lambda: (_mlp(), _images(8))),
    Network("CNN", "PyTorch's own", "torch", lambda: (_cnn(), _images(8))),
    Network("Transformer encoder, 2 layers", "PyTorch's own", "torch", lambda: (_Encoder(), _ids)),
    Network("LSTM", "recurrent", "torch", lambda: (_Recurrent(nn.LSTM), _sequences), method=AVC()),
    Network(
        "LSTM, 2 layers, both ways",
        "recurrent",
        "torch",
        lambda: (_Recurrent(nn.LSTM, num_layers=2, bidirectional=True), _sequences),
        method=AVC(),
    ),
    Network("GRU", "recurrent", "torch", lambda: (_Recurrent(nn.GRU), _sequences), method=AVC()),
    Network("TCN, 3 blocks", "recurrent", "torch", lambda: (_TCN(), _sequences)),
    Network("CNN, bfloat16", "half precision", "torch", lambda: _half(torch.bfloat16)),
    Network("CNN, float16", "half precision", "torch", lambda: _half(torch.float16)),
    Network("MLP, dynamic int8", "quantised", "torch", _dynamic),
    Network("LSTM, dynamic int8", "quantised", "torch", _dynamic_lstm, method=AVC()),
    Network("CNN, static int8", "quantised", "torch", _static),
    Network("MLP, int8 weights (torchao)", "quantised", "torchao", _torchao("Int8WeightOnlyConfig")),
    Network("CNN, torch.jit.script", "programs", "torch", _scripted),
    Network("CNN, torch.export", "programs", "torch", _exported),
)
"""All rows."""
