"""Networks of the papers and of the demo, each `f(num_classes=…)`."""

from flipproof.models.digits_cnn import digits_cnn
from flipproof.models.resnet import resnet18

__all__ = ["digits_cnn", "resnet18"]
