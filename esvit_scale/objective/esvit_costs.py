"""Closed-form FLOPs and activation bytes of EsViT's heads and fused loss; DINO's are those without regions."""

from collections.abc import Sequence

from esvit_scale.models.descriptions import Activations, Count
from esvit_scale.models.heads import ProjectionHead

TEACHER_VIEWS = 2  # the globals
WIDE = 4  # bytes of a number in fp32


class EsViTFormulas:
    """Formulas for the FLOPs and activation bytes of EsViT's heads, region matching and loss.

    Args:
        head: the view head; the region head, where there is one, has the same sizes.
        regions: whether there is a region head.
        teacher: the view head of a teacher with other sizes (K and the bottleneck are the same); None: as `head`.
    """

    def __init__(self, head: ProjectionHead, regions: bool, teacher: ProjectionHead | None = None) -> None:
        self.head, self.regions, self.teacher = head, regions, teacher or head

    def image_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return the FLOPs of heads, region matching and loss per image, of teacher and student, forward and backward.

        `grids` are (H, W) of the region tokens of each crop, the two global crops first.
        """
        head = self.head
        regions = [h * w for h, w in grids] if self.regions else []
        student_tokens = len(grids) + sum(regions)
        teacher_tokens = TEACHER_VIEWS + sum(regions[:TEACHER_VIEWS])
        mlp, of_teacher = self._mlp(head), self._mlp(self.teacher)
        logits = 2 * head.bottleneck * head.prototypes
        compared = sum(regions) if count == "executed" else sum(regions[1:])  # with either teacher view
        match = 2 * TEACHER_VIEWS * regions[0] * head.dim * compared if regions else 0
        flops = 3 * student_tokens * (mlp + logits) + teacher_tokens * (of_teacher + logits) + match
        if count == "executed":
            # The fused loss takes four products per token of either network: the logits twice, the expected prototype
            # and the prototypes' gradient.
            flops += (3 * teacher_tokens + student_tokens) * logits
        return flops

    def teacher_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return the FLOPs of the teacher's heads per image. Its logits belong to them, except in the fused loss, where
        every student computes them again."""
        tokens = TEACHER_VIEWS + (sum(h * w for h, w in grids[:TEACHER_VIEWS]) if self.regions else 0)
        logits = 0 if count == "executed" else 2 * self.head.bottleneck * self.head.prototypes
        return tokens * (self._mlp(self.teacher) + logits)

    @staticmethod
    def _mlp(head: ProjectionHead) -> int:
        """Return the FLOPs of a head before its prototypes, per token."""
        return 2 * (head.dim * head.hidden + head.hidden**2 + head.hidden * head.bottleneck)

    def kept(self, grids: Sequence[tuple[int, int]], element: int) -> Activations:
        """Return the bytes that heads and loss keep for the backward, at `element` bytes per value."""
        head = self.head
        # Per token of a head: the inputs of its layers and GELUs, the bottleneck with its length, the loss's gradient.
        token = (head.dim + 4 * head.hidden + head.bottleneck) * element
        token += (head.bottleneck if element != WIDE else 0) * WIDE + 2 * WIDE
        token += head.bottleneck * (WIDE - element)  # the bottleneck is normalised in fp32
        tokens = sum(1 + (h * w if self.regions else 0) for h, w in grids)
        heads = 2 if self.regions else 1
        prototypes = head.prototypes * (head.bottleneck * element + WIDE)  # the loss's gradient, and the lengths
        return Activations(tokens * token, heads * prototypes)
