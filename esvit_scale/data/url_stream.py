"""Samples of plain WebDataset tars, which have no manifest and index: local files, `pipe:` commands, URLs, braces, mixes.

Such tars can only be read from the front, and do not say how many samples they hold. So `data.epoch_samples` gives the
length of an epoch, and the tars are divided among ranks × workers, on whose number the order therefore depends. Every
epoch starts from the beginning of its tars, so a resume reads again, without decoding, what its epoch had read before; at
the same number of ranks and workers the batches are then the same bit for bit.
"""

import errno
import glob
import io
import itertools
import logging
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import filters, shardlists

from esvit_scale.config import Data
from esvit_scale.data import signals
from esvit_scale.data.decode import BadImage
from esvit_scale.data.hashing import derive_seed
from esvit_scale.data.loader import LoaderAssignment, NoValidSamples, reason
from esvit_scale.data.mix import require_epoch_samples
from esvit_scale.data.order import permutation
from esvit_scale.data.reader import StorageGone
from esvit_scale.data.tar_names import TAR, parse_label
from esvit_scale.data.tar_reader import NO_ZSTD, open_zstd
from esvit_scale.data.tar_stream import Raw, TarSamples
from esvit_scale.data.worker_batch import SLOW_SECONDS, DecodedSample, decode_for_crops, decode_modalities, member_rows
from esvit_scale.errors import UserError
from esvit_scale.store_urls import is_set_url

log = logging.getLogger(__name__)

SHUFFLE = 1000  # encoded samples in a worker's shuffle buffer
SHUFFLE_CLIPS = 100  # the same, where samples have videos of some megabytes
RESERVES = 8  # first samples of an epoch that a worker keeps as substitutes for bad ones


class UrlSet(NamedTuple):
    """The tars of one set, and its weight in a mix."""

    urls: tuple[str, ...]
    weight: float  # share of the samples, relative to the other sets'


@dataclass(frozen=True)
class UrlSets:
    """One or several sets of plain tars."""

    sets: tuple[UrlSet, ...]
    samples: int  # per epoch, from data.epoch_samples

    @staticmethod
    def wanted(data: Data) -> bool:
        """Return whether `data` names tars rather than the folder of an indexed set; True for any mix."""
        if data.mix or is_set_url(data.train):
            return bool(data.mix)
        url = data.train.startswith("pipe:") or "://" in data.train or TAR.search(data.train)
        return bool(url or "{" in data.train) and not _is_dir(data.train)

    @staticmethod
    def open(data: Data) -> "UrlSets":
        """Expand braces and patterns and check that local files exist; no tar is opened.

        Raises:
            UserError: data.epoch_samples is not set, data.train and data.mix are both set, a local tar is missing, or a
                set in a store is mixed with tars.
        """
        if data.mix and data.train:
            raise UserError("data.mix: data.train is set too; list every set in data.mix, or give data.train alone")
        if remote := next((mixed.urls for mixed in data.mix if is_set_url(mixed.urls)), None):
            raise UserError(
                f"data.mix: {remote} is a shard set in a store and cannot be mixed with plain tars; make a set of the "
                "tars with `esvit-scale shards create --from tars`, or leave one of the two out"
            )
        require_epoch_samples(data)
        assert data.epoch_samples is not None
        mix = [(m.urls, m.weight) for m in data.mix] or [(data.train, 1.0)]
        return UrlSets(tuple(UrlSet(tuple(_expanded(urls)), weight) for urls, weight in mix), data.epoch_samples)

    def check_consumers(self, consumers: int) -> None:
        """Raise UserError when a set has fewer tars than there are processes that read them."""
        for s in self.sets:
            if len(s.urls) < consumers:
                raise UserError(
                    f"data.workers: {consumers} loader processes over all ranks, but the set of {s.urls[0]} has "
                    f"{len(s.urls)} tars; a tar without an index is read by one process: set fewer data.workers, or make more "
                    "and smaller tars"
                )


def _is_dir(place: str) -> bool:
    """Return whether a path, pattern, URL or command is a folder; a long pattern is no valid path."""
    try:
        return Path(place).is_dir()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _expanded(spec: str) -> list[str]:
    if _is_dir(spec):
        urls = sorted(map(str, Path(spec).glob("*.tar")))
    else:
        urls = [match for url in shardlists.expand_urls(spec) for match in _matches(url)]
    local = [Path(url) for url in urls if not url.startswith("pipe:") and "://" not in url]
    missing = [path for path in local if not path.is_file()]
    if missing or not urls:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"data: {missing[0] if missing else spec}: no such tar{more}")
    if any(url.lower().endswith(".zst") for url in urls) and open_zstd(io.BytesIO()) is None:
        raise UserError(f"data: {urls[0]}: is compressed with zstd; {NO_ZSTD}")
    return urls


def _matches(url: str) -> list[str]:
    """Return the local files that a pattern of `*`, `?` and `[…]` matches, sorted; return anything else unchanged.

    Raises:
        UserError: no file matches the pattern.
    """
    if url.startswith("pipe:") or "://" in url or not glob.has_magic(url) or Path(url).exists():
        return [url]
    found = sorted(path for path in glob.glob(url, recursive=True) if Path(path).is_file())  # noqa: PTH207 (may be absolute)
    if not found:
        raise UserError(f"data: {url}: no file matches this pattern")
    return found


@dataclass(frozen=True)
class UrlSamples:
    """The samples that the calling loader process contributes to the batches of an assignment, in order."""

    assignment: LoaderAssignment
    source: UrlSets

    def __call__(self) -> Iterator[DecodedSample]:
        """Yield the decoded samples, batch by batch.

        Raises:
            NoValidSamples: a sample and its substitutes are bad, or the tars hold no samples.
            StorageGone: no tar can be read.
        """
        assignment = self.assignment
        if assignment.start and assignment.rank == 0 and assignment.worker()[0] == 0:
            log.warning(
                "streamed data: the resume is exact if the run had %d ranks × %d workers before; with another number, this "
                "epoch repeats some samples and leaves others out",
                assignment.world_size,
                assignment.worker()[1],
            )
        bad: list[dict[str, Any]] = []
        tars = TarSamples(signals.wanted(assignment.config.data))
        for epoch in range(
            assignment.start // assignment.steps_per_epoch, -(-assignment.stop // assignment.steps_per_epoch)
        ):
            first, last = epoch * assignment.steps_per_epoch, (epoch + 1) * assignment.steps_per_epoch
            yield from self._epoch(
                tars, epoch, max(assignment.start - first, 0), min(assignment.stop, last) - first, bad
            )

    def _epoch(
        self, tars: TarSamples, epoch: int, start: int, stop: int, bad: list[dict[str, Any]]
    ) -> Iterator[DecodedSample]:
        """Yield this worker's samples of steps start..stop-1 of an epoch; samples before them are read but not decoded.

        Args:
            bad: quarantine rows about tars: reading adds to them, and the next sample takes them with it.
        """
        assignment = self.assignment
        positions = assignment.images_of_worker(assignment.start)  # those of every batch
        stream = self._raw(tars, epoch, bad)
        reserves = list(itertools.islice(stream, RESERVES))
        stream = itertools.chain(reserves, stream)
        numbered = enumerate(itertools.islice(stream, stop * len(positions)))
        for number, raw in itertools.islice(numbered, start * len(positions), None):
            yield self._decoded(epoch, number, raw, reserves, positions[number % len(positions)])

    def _decoded(self, epoch: int, number: int, raw: Raw, reserves: list[Raw], position: int) -> DecodedSample:
        """Decode a sample, or, if it is bad, the first good one of the reserves.

        The stream is read in the same way whether samples are bad or not, since reserves are already in memory.

        Args:
            number: index of the sample in this worker's stream of the epoch.
            position: place in the global batch.
        """
        bad = list(raw.bad)
        stand_ins = [reserves[(number + i) % len(reserves)] for i in range(len(reserves))]
        for attempt, candidate in enumerate([raw, *stand_ins]):
            key, began = f"{candidate.crop_key}#{number}" if attempt else candidate.crop_key, time.monotonic()
            where = {"shard": candidate.url, "key": candidate.key, "epoch": epoch, "position": number}
            try:
                views: Mapping[str, signals.Views] = {}
                if candidate.members:
                    image, views, problems = decode_modalities(
                        self.assignment.config, epoch, key, list(candidate.members), candidate.member
                    )
                    bad += member_rows(where, problems)
                elif not candidate.image:
                    raise BadImage("empty file")
                else:
                    image = decode_for_crops(self.assignment.config, epoch, key, candidate.image)
            except BadImage as error:
                bad.append({**where, "reason": reason(error), **({"stand_in": True} if attempt else {})})
                continue
            if (took := time.monotonic() - began) > SLOW_SECONDS:
                bad.append({**where, "reason": f"slow: {took:.0f} s to decode", "used": True})
            return DecodedSample(position, candidate.key, parse_label(candidate.label), *image, bad, views)
        raise NoValidSamples(
            f"{raw.url}: {raw.key} and all {len(reserves)} samples that could replace it are bad (last: {bad[-1]['reason']})"
        )

    def _raw(self, tars: TarSamples, epoch: int, bad: list[dict[str, Any]]) -> Iterator[Raw]:
        """Yield this worker's samples without end: its share of every set, mixed by weight and shuffled.

        It is a pure function of (seed, epoch, worker) as long as every tar can be read.
        """
        worker, workers = self.assignment.worker()
        consumer, consumers = self.assignment.rank * workers + worker, self.assignment.world_size * workers
        key = (self.assignment.config.seed, epoch, consumer, consumers)
        sets = [self._set(tars, n, epoch, consumer, consumers, bad) for n in range(len(self.source.sets))]
        chooser = random.Random(derive_seed(*key, "mix"))
        weights = [s.weight for s in self.source.sets]
        while True:
            yield next(sets[chooser.choices(range(len(sets)), weights)[0]])

    def _set(
        self, tars: TarSamples, number: int, epoch: int, consumer: int, consumers: int, bad: list[dict[str, Any]]
    ) -> Iterator[Raw]:
        """Yield this worker's samples of one set without end; each pass deals out tars and shuffles samples anew."""
        seed, urls = self.assignment.config.seed, self.source.sets[number].urls
        clips = self.assignment.config.data.video.views > 0
        buffer = max((SHUFFLE_CLIPS if clips else SHUFFLE) // len(self.source.sets), 2)
        for turn in itertools.count():
            order = permutation(len(urls), seed, epoch, "tars", number, turn)[consumer::consumers]
            samples = tars.of([urls[i] for i in order], epoch, bad)
            chooser = random.Random(derive_seed(seed, epoch, "shuffle", number, turn, consumer, consumers))
            came = False
            for raw in filters._shuffle(samples, buffer, buffer // 2, chooser):
                came = True
                again = f"#{turn}" if turn else ""
                yield raw._replace(crop_key=raw.key + again, bad=[bad.pop(0) for _ in range(len(bad))])
            if not came:
                last = bad[-1] if bad else {"shard": urls[0], "reason": "it holds no samples"}
                message = f"{last['shard']}: {last['reason']}; none of this worker's {len(order)} tars gave a sample"
                raise StorageGone(message) if last.get("io") else NoValidSamples(message)
