"""Classification with labels: a linear classifier on the trunk's view features, for fine-tuning.

L = mean over images of −Σ_k y_k · log softmax(W f + b)_k,   y = (1 − ε) · Σ_j w_j · onehot(c_j) + ε / K

c and w are an image's one or two classes and their weights (data/mixing.py), ε the label smoothing, K the number of
classes. The EMA of the student's weights is an average for evaluation and export; it gives no targets.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from esvit_scale import config as configs
from esvit_scale.data.mixing import SoftLabels
from esvit_scale.models.descriptions import Activations, Count, ObjectiveCard
from esvit_scale.models.trunk import Features
from esvit_scale.objective.objective import Logs, Objective, smoothed_cross_entropy

WIDE = 4  # bytes of a number in fp32


class Classify(Objective):
    """The cross-entropy of a linear classifier with smoothed, possibly mixed labels."""

    multi_crop = False
    has_teacher = False
    takes_labels = True
    image_views = (1,)

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the classifier for trunk features of width `dim`."""
        super().__init__()
        self.classifier = nn.Linear(dim, config.classes)
        self.smoothing = config.label_smoothing

    def targets(self, teacher: Features) -> Tensor:
        """Return the logits [B, K] of images, which evaluation reads."""
        logits: Tensor = self.classifier(teacher.view)
        return logits

    def forward(self, student: Features, targets: SoftLabels, teacher_temp: float) -> tuple[Tensor, Logs]:
        """Return the student's mean cross-entropy.

        It logs train_top1: the fraction of images whose highest logit is that of the class with the larger weight.
        """
        logits = self.classifier(student.view)  # [B, K]
        loss, top1 = smoothed_cross_entropy(logits, targets, self.smoothing)
        return loss, {"train_top1": top1}

    def formulas(self) -> "ClassifyFormulas":
        """Return the formulas for the FLOPs and activations of the classifier and the loss."""
        return ClassifyFormulas(self.classifier)

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        return ObjectiveCard("classification with labels", (("classes", f"{self.classifier.out_features:,}"),))


class ClassifyFormulas:
    """Formulas for the FLOPs and activation bytes of a linear classifier and its loss."""

    def __init__(self, classifier: nn.Linear) -> None:
        self.dim, self.classes = classifier.in_features, classifier.out_features

    def image_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return the FLOPs of the classifier per image, forward and backward; `grids` are those of each crop."""
        return 3 * len(grids) * 2 * self.dim * self.classes

    def teacher_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return 0: there is no teacher."""
        return 0

    def kept(self, grids: Sequence[tuple[int, int]], element: int) -> Activations:
        """Return the bytes that classifier and loss keep for the backward: its input, and log probabilities in fp32."""
        return Activations(len(grids) * (self.dim * element + self.classes * WIDE), 0)
