"""`esvit-scale evaluate modalities`: what the features of a multimodal run know, modality by modality and across them.

- *Retrieval*, without training: every sample's view of one modality (the query) ranks the views of another of all
  samples by cosine similarity, in the space in which the objective compares the two. R@k is the percentage of queries
  with a relevant sample among the k nearest. Relevant are the query's own sample, and samples of the same text.
- *Classification*, with a labelled training set: k-NN (as `evaluate knn`) and logistic regression (as `evaluate
  linear`) on the trunk's view features of each modality alone.

Beside R@k stand its value for a random order, and what a ranking by length alone reaches, without any weights: where two
modalities have durations or numbers of tokens, the nearest are those whose length is as far from the mean, in standard
deviations. A sample takes part in what it has.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esvit_scale.checkpoint import state, state_file, step_folders
from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data.evaluation_signals import evaluation_signals
from esvit_scale.errors import UserError
from esvit_scale.evaluate import baselines, logistic
from esvit_scale.evaluate.features import default_device, source_info
from esvit_scale.evaluate.knn import knn, write_result
from esvit_scale.evaluate.labels import split_held_out
from esvit_scale.evaluate.metrics import accuracy, wilson_interval
from esvit_scale.evaluate.ranking import mean_with_interval, rank_relevant
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import Network, build_network

KS: tuple[int, ...] = (1, 5, 10)
NEIGHBOURS = 20  # of the k-NN accuracy
ORDER = ("image", "video", "audio", "text")

Json = dict[str, Any]


class Trained(NamedTuple):
    """A trained network of several modalities."""

    network: Network
    config: Config
    step: int


class Modality(NamedTuple):
    """The view features of one modality of all samples of a set."""

    views: Tensor  # float32 [N, C]
    present: Tensor  # bool [N]
    lengths: Tensor | None  # int64 [N]; None for images


class MultimodalSet(NamedTuple):
    """The view features of a set, in the order of the source."""

    modalities: dict[str, Modality]
    labels: Tensor  # int64 [N], −1 without classes
    classes: tuple[str, ...]
    texts: Tensor  # int64 [N], equal for samples of the same text; −1 without text


def run_modalities(
    checkpoint: Path, data: Path, out: Path, ks: Sequence[int] = KS, train: Path | None = None, batch: int = 64
) -> Json:
    """Run `esvit-scale evaluate modalities`: write `out`/modalities.json and return its content.

    Args:
        data: the shard set whose samples are ranked, and classified if there is a training set.
        ks: numbers of nearest samples for R@k.
        train: labelled shard set to classify from; None: no classification.

    Raises:
        UserError: the checkpoint is no run of several modalities, or a set does not suit it.
    """
    trained = load(checkpoint)
    row: Json = {"checkpoint": str(checkpoint), "step": trained.step, "data": manifests.address(data)}
    tested = extract(trained, data, batch)
    result = row | {"samples": len(tested.labels)} | {"retrieval": retrieve(trained, tested, ks)}
    if train is not None:
        result |= {"train": manifests.address(train)} | {
            "classification": classify(extract(trained, train, batch), tested)
        }
    write_result(result, out / "modalities.json")
    print(table(result))
    return result


def load(checkpoint: Path) -> Trained:
    """Load the teacher's network of a run dir or step folder, with its objective's heads; or that of `untrained:CONFIG`.

    Raises:
        UserError: it is none of these, or the run reads images alone.
    """
    kind, colon, value = str(checkpoint).partition(":")
    if kind + colon == baselines.UNTRAINED:
        config = baselines.untrained_config(value)
        _require_signals(checkpoint, config)
        network = build_network(config)
        initialize(network, config.seed)
        return Trained(network.eval(), config, 0)
    folder = step_folders.resolve(step_folders.follow_pointer(checkpoint))
    weights = state.read_weights(folder)
    _require_signals(checkpoint, weights.config)
    network = build_network(weights.config)
    network.load_state_dict(weights.networks["teacher"])
    return Trained(network.eval(), weights.config, int(state_file.read_state(folder)["cursor"]["step"]))


def _require_signals(checkpoint: Path, config: Config) -> None:
    if not config.signal_views:
        raise UserError(f"{checkpoint}: reads images alone; evaluate modalities needs a run that reads others")


@torch.no_grad()
def extract(trained: Trained, source: Path, batch: int = 64) -> MultimodalSet:
    """Return the view features of all samples of a shard set, of one view without augmentation."""
    device = default_device()
    trunk = trained.network.trunk.to(device)
    labels: list[Tensor] = []
    views: dict[str, list[Tensor]] = {}
    present: dict[str, list[Tensor]] = {}
    lengths: dict[str, list[Tensor]] = {}
    texts: list[bytes] = []
    for part in evaluation_signals(source, trained.config, batch):
        signals = {name: (s.values.to(device), s.lengths.to(device)) for name, s in part.signals.items()}
        found = trunk([part.images.to(device)], None, signals)
        labels.append(part.labels)
        for name, view, has in [
            ("image", found.view, part.has_image),
            *((name, signal.view, signal.present) for name, signal in found.signals.items()),
        ]:
            views.setdefault(name, []).append(view.float().cpu())
            present.setdefault(name, []).append(has.cpu())
        for name, signal in part.signals.items():
            lengths.setdefault(name, []).append(signal.lengths)
        if "text" in part.signals:
            texts += [row.numpy().tobytes() for row in part.signals["text"].values]
    if not labels:
        raise UserError(f"{source}: has no readable sample")
    all_labels = torch.cat(labels)
    modalities = {
        name: Modality(
            torch.cat(views[name]), torch.cat(present[name]), torch.cat(lengths[name]) if name in lengths else None
        )
        for name in sorted(views, key=ORDER.index)
    }
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    groups = torch.tensor([number[text] for text in texts]) if texts else torch.full_like(all_labels, -1)
    if texts:
        groups = groups.masked_fill(~modalities["text"].present, -1)
    return MultimodalSet(modalities, all_labels, source_info(source).classes, groups)


def retrieve(trained: Trained, data: MultimodalSet, ks: Sequence[int] = KS) -> list[Json]:
    """Return R@k of every direction between two modalities, with intervals, chance and the baseline of lengths.

    Raises:
        UserError: a k is larger than the number of samples to search.
    """
    device = default_device()
    objective = trained.network.objective.to(device)
    rows = []
    names = list(data.modalities)
    for a in names:
        for b in names:
            both = data.modalities[a].present & data.modalities[b].present
            if a == b or int(both.sum()) < 2:
                continue
            with torch.no_grad():
                pair = objective.comparable({m: data.modalities[m].views[both].to(device) for m in (a, b)}, a, b)
            if pair is None:
                continue
            n = int(both.sum())
            if max(ks) > n:
                raise UserError(f"--k {max(ks)}: larger than the {n} samples that have {a} and {b}")
            texts = data.texts[both]
            relevant = torch.eye(n, dtype=torch.bool) | ((texts[:, None] == texts) & (texts[:, None] >= 0))
            row: Json = {"query": a, "found": b, "samples": n, "chance": chance(relevant, ks)}
            row["recall"] = recall((pair[0] @ pair[1].t()).cpu(), relevant, ks)
            of_a, of_b = data.modalities[a].lengths, data.modalities[b].lengths
            row["lengths"] = None
            if of_a is not None and of_b is not None:
                row["lengths"] = recall(by_length(of_a[both], of_b[both]), relevant, ks)
            rows.append(row)
    return rows


def recall(similarity: Tensor, relevant: Tensor, ks: Sequence[int]) -> Json:
    """Return R@k in percent with bootstrap intervals over the queries, given [n, n] similarities and what is relevant."""
    first = rank_relevant(similarity, relevant).first.numpy()
    found = {}
    for k in ks:
        mean, interval = mean_with_interval((first <= k).astype(np.float64))
        found[str(k)] = {"value": mean, "interval": interval}
    return found


def chance(relevant: Tensor, ks: Sequence[int]) -> Json:
    """Return R@k in percent of a random order: the mean over queries of 1 − C(n − r, k) / C(n, k), r relevant ones."""
    n, counts = relevant.shape[1], relevant.sum(1).numpy().astype(np.float64)
    found = {}
    for k in ks:
        none = np.ones_like(counts)
        for i in range(k):
            none *= np.clip(n - counts - i, 0, None) / (n - i)
        found[str(k)] = 100 * float((1 - none).mean())
    return found


def by_length(a: Tensor, b: Tensor) -> Tensor:
    """Return similarities [n, n] of lengths: minus the distance of their standard scores."""
    scores = [(x.double() - x.double().mean()) / x.double().std().clamp_min(1e-9) for x in (a, b)]
    return -(scores[0][:, None] - scores[1]).abs()


def classify(train: MultimodalSet, test: MultimodalSet) -> list[Json]:
    """Return the k-NN accuracy and that of logistic regression of every modality, in percent.

    Samples without a label or without the modality are left out.

    Raises:
        UserError: a set has no classes, or the test set has a class that the training set lacks.
    """
    number = {name: i for i, name in enumerate(train.classes)}
    if not number or not test.classes:
        raise UserError("--train: the samples of both sets need classes")
    renumbered = torch.tensor([number.get(name, -1) for name in test.classes] + [-1])[test.labels]
    rows = []
    for name, seen in train.modalities.items():
        asked = test.modalities[name]
        of_train = (seen.present & (train.labels >= 0)).nonzero()[:, 0]
        of_test = (asked.present & (renumbered >= 0)).nonzero()[:, 0]
        if len(train.labels[of_train].unique()) < 2 or not len(of_test):
            continue
        features, truth = seen.views[of_train], train.labels[of_train]
        votes = knn(features, truth, asked.views[of_test], renumbered[of_test], (NEIGHBOURS,))
        [(k, found)] = votes.items()
        linear = _logistic(features, truth, asked.views[of_test], len(train.classes))
        rows.append(
            {
                "modality": name,
                "n_train": len(of_train),
                "n_test": len(of_test),
                "largest_class": 100 * float(renumbered[of_test].bincount().max()) / len(of_test),
                "knn": _scored(found.top1, len(of_test)) | {"k": k},
                "linear": _scored(accuracy(linear, renumbered[of_test]), len(of_test)),
            }
        )
    return rows


def _logistic(features: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Return the scores [N, K] of a classifier whose penalty is selected on a held-out part of the training set."""

    def of(rows: Tensor) -> logistic.LabelledFeatures:
        return logistic.LabelledFeatures(features, rows, labels[rows], classes)

    fit, held_out = split_held_out(labels, 0)
    best, _ = logistic.search_penalty(of(fit), of(held_out))
    return logistic.fit(of(torch.arange(len(labels))), best.l2).scores(test)


def _scored(top1: float, n: int) -> Json:
    return {"top1": top1, "interval": wilson_interval(top1, n)}


def table(result: Json) -> str:
    """Format the content of modalities.json as text tables."""
    ks = list(result["retrieval"][0]["recall"]) if result["retrieval"] else []
    head = "".join(f"{f'R@{k}':>7}{'95 %':>14}{'chance':>8}{'lengths':>9}" for k in ks)
    lines = [f"{'retrieval, %':<18}{'n':>6}{head}"]
    for row in result["retrieval"]:
        cells = ""
        for k in ks:
            found, lengths = row["recall"][k], row["lengths"]
            cells += f"{found['value']:7.1f}" + "{:>14}".format("{:.1f}–{:.1f}".format(*found["interval"]))
            cells += f"{row['chance'][k]:8.1f}" + (f"{lengths[k]['value']:9.1f}" if lengths else f"{'–':>9}")
        lines.append(f"{row['query'] + ' → ' + row['found']:<18}{row['samples']:>6}{cells}")
    if result.get("classification"):
        lines += [
            "",
            f"{'accuracy, %':<18}{'n':>6}{'k-NN':>8}{'95 %':>14}{'linear':>8}{'95 %':>14}{'largest class':>15}",
        ]
        for row in result["classification"]:
            cells = "".join(
                f"{row[p]['top1']:8.1f}" + "{:>14}".format("{:.1f}–{:.1f}".format(*row[p]["interval"]))
                for p in ("knn", "linear")
            )
            lines.append(f"{row['modality']:<18}{row['n_test']:>6}{cells}{row['largest_class']:15.1f}")
    return "\n".join(lines)
