"""Networks of the papers and of the demo, each `f(num_classes=…)`, and the loader of trained weights."""

from flipproof.models.alexnet import alexnet, alexnet_227
from flipproof.models.choices import Choices
from flipproof.models.compact_cnn import compact_cnn
from flipproof.models.digits_cnn import digits_cnn
from flipproof.models.gpt import small_gpt
from flipproof.models.greedy import Greedy
from flipproof.models.inception import inception_v3
from flipproof.models.key_values import KeyValues
from flipproof.models.lenet import lenet5
from flipproof.models.mlp import mlp
from flipproof.models.resnet import resnet18, resnet50
from flipproof.models.resnet_cifar import resnet20, resnet56
from flipproof.models.stagenet import stage_72, stage_384, stage_conv_72, stage_conv_384
from flipproof.models.vgg import vgg11, vgg16
from flipproof.models.vit import small_vit
from flipproof.models.weights import load_weights

__all__ = [
    "Choices",
    "Greedy",
    "KeyValues",
    "alexnet",
    "alexnet_227",
    "compact_cnn",
    "digits_cnn",
    "inception_v3",
    "lenet5",
    "load_weights",
    "mlp",
    "resnet18",
    "resnet20",
    "resnet50",
    "resnet56",
    "small_gpt",
    "small_vit",
    "stage_72",
    "stage_384",
    "stage_conv_72",
    "stage_conv_384",
    "vgg11",
    "vgg16",
]
