"""What works on this machine."""

import argparse
from typing import Any

from esvit_scale.commands.parser import command


def add(commands: Any) -> None:
    command(commands, "doctor", _doctor, "what works on this machine")


def _doctor(options: argparse.Namespace) -> int:
    from esvit_scale import doctor

    return doctor.run()
