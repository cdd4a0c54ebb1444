"""The `doctor` command: what works on this machine, and whether it can load data as fast as its GPUs train."""

import argparse
from typing import Any

from esvit_scale.commands.parser import add_overrides, command
from esvit_scale.errors import UserError


def add(commands: Any) -> None:
    """Declare `doctor`."""
    doctor = command(commands, "doctor", _doctor, "what works on this machine; with --data, whether it feeds its GPUs")
    doctor.add_argument("--data", metavar="SHARDS", help="measure the input pipeline on this set, about 15 s")
    doctor.add_argument("config", nargs="?", metavar="CONFIG", help="with --data: the run's config (default: swin_t)")
    add_overrides(doctor, "with --data: of the config")


def _doctor(options: argparse.Namespace) -> int:
    if options.data is None:
        if options.config:
            raise UserError(f"doctor {options.config}: a config is for measuring with it: add --data SHARDS")
        from esvit_scale import doctor

        return doctor.run()
    from esvit_scale import config as configs

    config = configs.resolve(
        options.config or "swin_t", [*options.overrides, f"data.train={options.data}", "data.mix=[]"]
    )
    from esvit_scale import feed

    return feed.run(config)
