"""The commands `demo` (pretraining on bundled images), `pretrain` (on the user's) and `finetune` (with labels)."""

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_scale import presets
from esvit_scale.commands.parser import add_overrides, command, rank
from esvit_scale.errors import UserError

if TYPE_CHECKING:
    from esvit_scale.config import Config


def add(commands: Any) -> None:
    """Declare `demo`, `pretrain` and `finetune`."""
    demo = command(
        commands, "demo", _demo, "run everything on bundled photographs: shards, a tiny pretraining, k-NN, report"
    )
    demo.set_defaults(kept=lambda: _kept() or "training had not begun; what is complete is used by the next start")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run dir (default: runs/demo)")

    pretrain = command(
        commands, "pretrain", _pretrain, "start or continue a run, in one process or under torchrun or srun"
    )
    _add_run(pretrain, "train.global_batch=64 data.train=/data/shards")
    pretrain.epilog = (
        f"{pretrain.epilog}\n\n{textwrap.fill('presets: ' + ', '.join(presets.names()), 110, subsequent_indent='  ')}\n"
        "  `esvit-scale presets` says what each suits. `esvit-scale config swin_t` lists every key with value, unit and meaning."
    )
    finetune = command(
        commands,
        "finetune",
        _finetune,
        "train a pretrained trunk and a classifier on labelled shards, as pretrain does a run",
    )
    _add_run(finetune, "model.init_from=runs/photos data.train=/data/shards")


def _add_run(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the arguments of a command that starts or continues a run."""
    parser.add_argument("config", metavar="CONFIG", help="name of a preset, or a YAML file")
    add_overrides(parser, f"config values to change, for example {example}")
    add_crops_option(parser)


def add_crops_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--show-crops` of commands that train, and say what a run keeps that ctrl-C ends."""
    parser.set_defaults(kept=lambda: _kept() or "nothing was trained in this start, and nothing was changed")
    parser.add_argument(
        "--show-crops",
        type=Path,
        metavar="PNG",
        help="only draw the crops of some training images to this file, as the model will see them, or to one for each "
        "training stage (default: train)",
    )


def _demo(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()
    from esvit_scale.train import header

    header.say(header.IMPORTING)
    from esvit_scale import demo

    return demo.run(options.out)


def _pretrain(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()  # first: importing the rest takes seconds, and a signal in them must not be lost
    from esvit_scale import config as configs

    config = configs.resolve(options.config, options.overrides)
    configs.require_training_data(config)
    return run_config(options, " ".join([options.config, *options.overrides]), config)


def _finetune(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()
    from esvit_scale.train import finetuning

    config = finetuning.resolve(options.config, options.overrides)
    return run_config(options, " ".join([options.config, *options.overrides]), config)


def run_config(options: argparse.Namespace, asked: str, config: "Config") -> int:
    """Train a config, or draw its crops if the options ask for that; `asked` is how the header names the config."""
    if options.show_crops:
        return _show_crops(config, options.show_crops) if rank() == "0" else 0
    from esvit_scale.train import header

    header.show(config, asked)
    from esvit_scale.train import pretraining

    return pretraining.pretrain(config)


def _show_crops(config: "Config", path: Path) -> int:
    if path.suffix != ".png":
        raise UserError(f"--show-crops {path}: must end in .png")
    from esvit_scale import files
    from esvit_scale.report import sample_images
    from esvit_scale.train import header, startup

    path.parent.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(config.of_stages):
        sheet = path.with_stem(f"{path.stem}-stage-{number}") if config.stages else path
        files.write_bytes(sheet, sample_images.crop_sheet(stage))
        print(sheet)
        try:
            notes = startup.notes(stage, startup.planned_facts(stage))
        except UserError as error:
            notes = [f"{'note':<10} training would not begin: {error}"]
        header.say(*notes)
    return 0


def _kept() -> str:
    """Return what a run has on disk after ctrl-C ended it at once; "" if it had not begun."""
    from esvit_scale.train import signals

    return signals.kept()
