"""What networks are for: one task a file."""

from flipproof.running.tasks.base import Task
from flipproof.running.tasks.classification import Classification
from flipproof.running.tasks.custom import Custom
from flipproof.running.tasks.detection import Detection
from flipproof.running.tasks.embedding import Embedding
from flipproof.running.tasks.generation import Generation
from flipproof.running.tasks.multi_label import MultiLabel
from flipproof.running.tasks.regression import Regression
from flipproof.running.tasks.segmentation import Segmentation
from flipproof.running.tasks.tokens import Tokens

__all__ = [
    "Classification",
    "Custom",
    "Detection",
    "Embedding",
    "Generation",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Task",
    "Tokens",
]
