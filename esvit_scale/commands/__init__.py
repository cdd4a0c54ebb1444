"""The commands, one module a group: `add(commands)` declares them, a private function a command runs it.

Stations are imported inside those functions: `--help` and a mistyped command must not wait for torch.
"""
