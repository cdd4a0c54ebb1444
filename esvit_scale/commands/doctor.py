"""The `doctor` command: what works on this machine, and whether it can load data as fast as its GPUs train."""

import argparse
from typing import Any

from esvit_scale.commands.parser import add_overrides, command
from esvit_scale.errors import UserError


def add(commands: Any) -> None:
    """Declare `doctor`."""
    doctor = command(
        commands,
        "doctor",
        _doctor,
        "check what works on this machine; with --data, whether it loads data fast enough for its GPUs",
    )
    doctor.add_argument(
        "--data",
        metavar="SHARDS",
        help="shard set on which to measure the loading of data, 15 s (default: not measured)",
    )
    doctor.add_argument(
        "config", nargs="?", metavar="CONFIG", help="with --data: preset or YAML file of the run (default: swin_t)"
    )
    add_overrides(doctor, "with --data: config values to change")


def _doctor(options: argparse.Namespace) -> int:
    if options.data is None:
        if options.config:
            raise UserError(f"doctor {options.config}: a config is used only for measuring; add --data SHARDS")
        from esvit_scale import doctor

        return doctor.run()
    from esvit_scale import config as configs

    config = configs.resolve(
        options.config or "swin_t", [*options.overrides, f"data.train={options.data}", "data.mix=[]"]
    )
    from esvit_scale import feed

    return feed.run(config)
