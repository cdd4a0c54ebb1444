"""The modules that DeepSpeed wraps: a trunk and an objective together, as student or as teacher; and other teachers."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esvit_scale import ranges
from esvit_scale.config import Config
from esvit_scale.models import products
from esvit_scale.models.masking import Mask, MaskToken, cells_of, draw_cells
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Features, Trunk
from esvit_scale.objective import frozen
from esvit_scale.objective.gram import gram_loss
from esvit_scale.objective.koleo import CROPS, koleo
from esvit_scale.objective.objective import Logs, Objective, spread
from esvit_scale.objective.registry import build_objective

AnyNetwork = TypeVar("AnyNetwork", bound="Network")
Signals = Mapping[str, tuple[Tensor, Tensor]]  # by modality: values and lengths (data/signals.Signal)


class Network(nn.Module):
    """A trunk and an objective, whose parameters are named `trunk.…` and `objective.<head>.…`.

    Where crops are masked, `mask_token.values` is a parameter too. Further students of a distillation are networks inside
    this one, whose parameters are named `students.<number>.trunk.…` and `students.<number>.objective.…`.

    Student and teacher have parameters of the same names and shapes, but compute different things. Each is a subclass
    with its own forward, because DeepSpeed runs a module only through its forward.
    """

    def __init__(self, trunk: Trunk, objective: Objective) -> None:
        super().__init__()
        self.trunk = trunk
        self.objective = objective
        self.mask_token: MaskToken | None = None  # beside the trunk, because trained weights are used without it
        self.students = nn.ModuleList()

    @property
    def networks(self) -> list["Network"]:
        """This network, and the further students inside it."""
        return [self, *(student for student in self.students if isinstance(student, Network))]

    @property
    def trunks(self) -> list[Trunk]:
        """The trunks of `networks`."""
        return [network.trunk for network in self.networks]

    @property
    def objectives(self) -> list[Objective]:
        """The objectives of `networks`."""
        return [network.objective for network in self.networks]

    def features(
        self,
        crops: list[Tensor],
        drop_keys: Tensor | None,
        mask: Mask | None,
        signals: Signals | None = None,
        has_image: Tensor | None = None,
    ) -> Features:
        """Return the trunk's features of crops, some of them masked, and of the signals beside them."""
        if signals:
            features: Features = self.trunk(crops, drop_keys, signals)
            return features._replace(has_image=has_image)
        features = self.trunk(crops, drop_keys, *([] if mask is None else [mask]))
        return features


class StudentNetwork(Network):
    """The network that is trained; its forward computes the loss.

    Attributes:
        koleo_weight: weight of the KoLeo loss of the view features, beside the objective's loss.
        koleo_across_ranks: whether KoLeo compares with the images of all ranks.
        gram_weight: weight of the Gram loss of the region features, at steps at which the Gram teacher is on.
        mask_share, mask_ratio: how many global crops are masked, and how much of them (`masking.draw_cells`).
    """

    gram_weight = 0.0
    koleo_weight = 0.0
    koleo_across_ranks = False
    mask_share = 0.0
    mask_ratio = (0.0, 0.0)

    @ranges.named("student forward")
    def forward(
        self,
        crops: list[Tensor],
        targets: Any,
        drop_keys: Tensor | None,
        teacher_temp: float,
        anchors: Tensor | None = None,
        signals: Signals | None = None,
        has_image: Tensor | None = None,
    ) -> tuple[Tensor, Logs, Tensor]:
        """Return the loss of all crops, scalars to log, and the detached view features [ΣB, C] that monitors watch.

        Args:
            crops: one tensor per resolution group, [V_g·B, channels, S_g, S_g], the two globals first.
            targets: what the teacher, or the frozen teacher, returned for the globals; or the labels; None for an objective
                with none of them.
            drop_keys: int64 [ΣB], one key per crop image, and one per view of each signal, for drop path, DropToken and
                masks; None drops and masks nothing.
            teacher_temp: temperature of the teacher's softmax at this step.
            anchors: what the Gram teacher returned for the globals; None while it is off.
            signals: the other modalities of the same samples, in the order of `drop_keys`.
            has_image: bool [B], which samples have an image; only with signals.
        """
        mask = None if drop_keys is None else self._mask(crops[0], drop_keys)
        features = self.features(crops, drop_keys, mask, signals, has_image)
        view = watched(features)
        hidden = [] if mask is None else [mask.cells.flatten()]
        loss, logs = self.objective(features, targets, teacher_temp, *hidden)
        for number, student in enumerate(self.networks[1:]):
            its_loss, its_logs = student.objective(student.trunk(crops, drop_keys), targets, teacher_temp)
            loss = loss + its_loss
            logs |= {
                f"{name}_student{number}": value for name, value in {"loss": its_loss.detach(), **its_logs}.items()
            }
        if self.koleo_weight:
            term = koleo(features.view, features.grids[0][0] // CROPS, self.koleo_across_ranks)
            loss, logs = loss + self.koleo_weight * term, {**logs, "loss_koleo": term.detach()}
        if anchors is not None:
            term = gram_loss(features.regions, anchors, features.grids[0])
            loss, logs = loss + self.gram_weight * term, {**logs, "loss_gram": term.detach()}
        return loss, {**logs, "feature_std": spread(view)}, view

    def _mask(self, globals_: Tensor, drop_keys: Tensor) -> Mask | None:
        """Return the mask of global crops [2B, channels, S, S]; None if the run masks none."""
        if self.mask_token is None or self.trunk.mask_geometry is None:
            return None
        h, w = (cells_of(self.trunk.mask_geometry, side) for side in globals_.shape[-2:])
        cells = draw_cells(drop_keys[: len(globals_)], h, w, self.mask_share, self.mask_ratio)
        return Mask(cells, self.mask_token)


class TeacherNetwork(Network):
    """The network that computes the targets: a moving average of the student, or frozen. It uses no drop path."""

    @ranges.named("teacher forward")
    def forward(self, crops: list[Tensor], signals: Signals | None = None, has_image: Tensor | None = None) -> Any:
        """Return the targets of the two global crops and of the signals beside them; call it without gradient.

        `crops` has a single tensor, [2·B, channels, S, S]; `StudentNetwork.forward` explains the others.
        """
        return self.objective.targets(self.features(crops, None, None, signals, has_image))


class GramNetwork(nn.Module):
    """The trunk of an earlier teacher, to whose region features the student's are anchored; it has no objective.

    Its parameters have the names of the student's, `trunk.…`.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    @property
    def trunks(self) -> list[Trunk]:
        """The trunk, as `Network.trunks` has it."""
        return [self.trunk]

    @ranges.named("Gram teacher forward")
    def forward(self, crops: list[Tensor]) -> Tensor:
        """Return the region features of the two global crops, [2·B·T, C]; call it without gradient.

        `crops` has a single tensor, [2·B, channels, S, S].
        """
        regions: Tensor = self.trunk(crops, None).regions
        return regions


def watched(features: Features) -> Tensor:
    """Return the detached view features [ΣB, C] that show whether features collapse.

    Where a sample has no image, whose crops would be all alike, they are those of the first modality that it has.
    """
    view = features.view.detach()
    if features.has_image is None:
        return view
    there, samples = features.has_image, len(features.has_image)
    rows = view.unflatten(0, (-1, samples))
    for signal in features.signals.values():  # without indexing by masks, which would wait for the device
        own, present = signal.view.detach()[:samples], signal.present[:samples]
        rows = torch.where((present & ~there)[:, None], own, rows)
        there = there | present
    return rows.flatten(0, 1)


def build_network(config: Config) -> Network:
    """Build the trunk and objective of a config as one module without a forward, to look at parameters and shapes.

    Raises:
        UserError: trunk and objective do not fit each other or the config; the message is one line.
    """
    return _build(Network, config)


def build_student(config: Config) -> StudentNetwork:
    """Build the student network of a config; raises UserError in the same cases as `build_network`."""
    student = _build(StudentNetwork, config)
    student.koleo_weight = config.objective.koleo_weight
    student.koleo_across_ranks = config.objective.koleo_across_ranks
    student.gram_weight = config.objective.gram_weight
    student.mask_share, student.mask_ratio = config.objective.mask_crops, config.objective.mask_ratio
    return student


def build_teacher(config: Config) -> TeacherNetwork:
    """Build the teacher network of a config; raises UserError in the same cases as `build_network`."""
    return _build(TeacherNetwork, config)


def build_gram_network(config: Config) -> GramNetwork:
    """Build the Gram teacher's network of a config."""
    trunk = build_trunk(config)
    products.replace(trunk)
    return GramNetwork(trunk)


def build_frozen_teacher(config: Config, objective: Objective) -> TeacherNetwork:
    """Build the frozen teacher's network: the trunk that `objective.teacher_config` describes, and its part of `objective`.

    Args:
        objective: the objective of the config, from any of its networks; only what it was built with is used.

    Raises:
        UserError: the config does not describe the teacher, or its heads do not fit the student's.
    """
    theirs = frozen.teacher_config(config.objective)
    trunk = build_trunk(theirs)
    of_teacher = objective.of_frozen_teacher(trunk.dim, theirs.objective)
    for part in (trunk, of_teacher):
        products.replace(part)
    return TeacherNetwork(trunk, of_teacher)


def _build(kind: type[AnyNetwork], config: Config) -> AnyNetwork:
    trunk = build_trunk(config)
    if config.model.freeze_patch_embed:
        trunk.patch_projection.requires_grad_(False)
    objective = build_objective(trunk, config)
    for part in (trunk, objective):
        products.replace(part)
    network = kind(trunk, objective)
    if config.objective.mask_weight and trunk.mask_geometry is not None:
        network.mask_token = MaskToken(trunk.mask_geometry.width)
    network.students.extend(_build(Network, alone) for alone in configs_of_students(config)[1:])
    return network


def configs_of_students(config: Config) -> list[Config]:
    """Return for every student of a run the config that trains it alone: that of `model`, then `objective.students`.

    KoLeo and Gram anchoring are the first student's.
    """
    first = config.objective.model_copy(update={"students": []})
    found = [config.model_copy(update={"objective": first})]
    for student in config.objective.students:
        own = {**student.model_dump(), "init_from": None, "freeze_patch_embed": False}
        objective = first.model_copy(update={"koleo_weight": 0.0, "gram_weight": 0.0})
        model = config.model.model_copy(update=own)
        found.append(config.model_copy(update={"model": model, "objective": objective}))
    return found
