"""`esvit-scale demo`: the whole pipeline on one small machine, in minutes and without a download.

Bundled photographs → patches → shards → k-NN of raw pixels and of the untrained teacher → pretraining with the view and
the region loss → k-NN of the trained teacher → report.html. A patch's class is the photograph it was cut from; training
never sees classes. Train and test patches come from disjoint halves of the photographs.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.data import samples, shard_writer, stream
from esvit_scale.errors import RestartCanHelp
from esvit_scale.evaluate import attention, correspondence, knn
from esvit_scale.evaluate.features import extract, load_frozen_trunk, raw_pixels
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network
from esvit_scale.report import evaluation_figures
from esvit_scale.report.html import write_report
from esvit_scale.train import learning, pretraining
from esvit_scale.train.run_dir import open_run
from esvit_scale.train.run_records import read_summary

LOOKED_AT = 100  # test patches for the figures of correspondences
K = 10  # the k whose accuracy is quoted: fixed in advance, not the k with the best accuracy
SAMPLES_PER_SHARD = 250
NAMES = ("raw pixels", "untrained teacher", "trained teacher")

Json = dict[str, Any]


def run(out: Path) -> int:
    """Run the demo in the run dir `out` and print its results; return the exit code.

    When the demo in `out` has finished before, only print its results again.

    Raises:
        UserError: `out` holds something else.
    """
    began = time.monotonic()
    out = out.resolve()
    code, results = pretrain_and_compare(out, seed=0)
    if code:
        return code
    if not (out / "attention" / "components.png").is_file():
        look(out, demo_config(out, seed=0))
    report = write_report(out)
    print(f"\n{comparison(results, read_summary(out))}\n")
    print(f"the demo took {time.monotonic() - began:.0f} s\nrun dir  {out}\nreport   {report}")
    return 0


def pretrain_and_compare(out: Path, seed: int) -> tuple[int, list[Json]]:
    """Pretrain in `out`; return the exit code and, when it is 0, the k-NN results in the order of NAMES.

    Raises:
        RestartCanHelp: SIGTERM or SIGUSR1 ended the training, after a checkpoint.
    """
    config = demo_config(out, seed)
    paths = [out / f"knn-{name.replace(' ', '-')}.json" for name in NAMES]
    _, finished = open_run(config)
    if finished and all(path.is_file() for path in paths):
        print(f"{out}: finished earlier; these are its results")
        return 0, [json.loads(path.read_text()) for path in paths]
    train, test = write_shards(out / "shards", config)
    baselines = [pixels_result(config, train, test), untrained_result(config, train, test)]
    print(knn.table(baselines, NAMES[:2]))
    with not_logged(learning.how_to_measure(config)):  # the demo measures it itself
        code = pretraining.pretrain(config)
    if code:
        return code, []
    if not read_summary(out).get("finished"):
        raise RestartCanHelp(f"{out}: saved after a signal; the same command continues it")
    results = [*baselines, trained_result(out, config, train, test)]
    for path, result in zip(paths, results, strict=True):  # not before training: a run dir is the training's to create
        knn.write_result(result, path)
    return 0, results


@contextmanager
def not_logged(lines: list[str]) -> Iterator[None]:
    """Keep log lines with exactly these texts from the console and the log file within a block."""
    log = logging.getLogger("esvit_scale")

    def is_other(record: logging.LogRecord) -> bool:
        return record.getMessage() not in lines

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def look(out: Path, config: Config) -> None:
    """Write correspondences between views and attention maps of the trained teacher into `out`, for the report."""
    test, workers = out / "shards" / "test", config.data.workers
    found = correspondence.run_correspondence(out, test, out / "correspondence", LOOKED_AT, workers)
    evaluation_figures.write_correspondences(found, out / "correspondence")
    seen = attention.save_attention(
        load_frozen_trunk(out), samples.photograph("astronaut"), out / "attention", 2 * config.data.global_crops.size
    )
    evaluation_figures.write_attention(seen, out / "attention")


def demo_config(out: Path, seed: int) -> Config:
    """Return the config of the preset `demo` with run dir `out`: in bf16 where the hardware computes it, else fp32."""
    values = configs.resolve("demo").model_dump(mode="json") | {"run_dir": str(out), "seed": seed}
    values["data"]["train"] = str(out / "shards" / "train")
    values["train"]["precision"] = "bf16" if has_fast_bf16() else "fp32"
    return configs.validate(values, where="demo")


def has_fast_bf16() -> bool:
    """Return whether bf16 arithmetic is done in hardware: by the GPU, or by a CPU's AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    ask = getattr(torch.cpu, "get_capabilities", None)  # missing in older torch; then fp32 is the safe choice
    capabilities = ask() if ask else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def write_shards(folder: Path, config: Config) -> tuple[Path, Path]:
    """Write the train and test patches as shard sets; return their folders. Sets that exist already are kept.

    Patches have the size that evaluation would resize them to: enlarging them there would show the trunk another scale
    than it was trained on (4 points of k-NN accuracy, measured).
    """
    size = stream.evaluation_side(config.data.global_crops.size)
    sets = []
    for split, patches in zip(("train", "test"), samples.demo_samples(size), strict=True):
        source = f"demo {split} patches of {size} pixels, {len(patches)}"
        shard_writer.write_samples(patches, folder / split, samples.CLASSES, SAMPLES_PER_SHARD, source)
        sets.append(folder / split)
    return sets[0], sets[1]


def pixels_result(config: Config, train: Path, test: Path) -> Json:
    """Return the k-NN result of raw pixels."""

    def pixels(source: Path) -> knn.LabelledSet:
        return knn.with_class_names(
            raw_pixels(source, config.data.global_crops.size, workers=config.data.workers), source
        )

    return _row(0, None, train, test) | knn.evaluate(pixels(train), pixels(test))


def untrained_result(config: Config, train: Path, test: Path) -> Json:
    """Return the k-NN result of the untrained teacher, rebuilt with the initial weights that `config.seed` gives."""
    network = build_network(config)
    initialize(network, config.seed)
    return _row(1, 0, train, test) | _evaluate(network.trunk, config, train, test)


def trained_result(out: Path, config: Config, train: Path, test: Path) -> Json:
    """Return the k-NN result of the trained teacher in `out`."""
    teacher = load_frozen_trunk(out)
    return _row(2, teacher.step, train, test) | _evaluate(teacher.trunk, config, train, test)


def comparison(results: list[Json], summary: Json) -> str:
    """Return the table of results, what training cost, and how to read the difference."""
    pixels, before, after = (result["results"][str(K)]["top1"] for result in results)
    seconds = summary["images_seen"] / summary["images_per_s"]
    return "\n".join(
        [
            knn.table(results, NAMES),
            "",
            f"pretraining  {summary['step']} steps, {summary['images_seen']:,} images in {seconds:.0f} s: "
            f"{summary['images_per_s']:.0f} images/s on {_machine()}",
            f"k = {K}        {after - before:+.1f} points over the untrained teacher, {after - pixels:+.1f} over raw pixels",
            "one seed and patches of a few photographs: this shows that the pipeline learns, not how good the method is",
        ]
    )


def _evaluate(trunk: torch.nn.Module, config: Config, train: Path, test: Path) -> Json:
    def features(source: Path) -> knn.LabelledSet:
        size = config.data.global_crops.size
        return knn.with_class_names(extract(trunk, source, size, workers=config.data.workers), source)

    return knn.evaluate(features(train), features(test))


def _row(which: int, step: int | None, train: Path, test: Path) -> Json:
    return {"name": NAMES[which], "checkpoint": None, "step": step, "train": str(train), "test": str(test)}


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"
